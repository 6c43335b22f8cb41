"""The proof at wrapping time: the base model is untouched, and a removed player has no influence at all.

Signatures prove nothing here: most vision models accept an attention mask, and several ignore it. So the effects are
measured, on a tiny batch of noise.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from shapadapter.errors import UnsupportedModelError

from .anatomy import Anatomy, evaluating, noise
from .carrier import Pass, Removal, TokenCarrier

# Rounding that a different split of the same sums may cause, relative to the logits' size.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def choose_removal(
    model: nn.Module, anatomy: Anatomy, removal: Literal["auto", "drop", "mask"], with_token: bool = True
) -> Removal:
    """Send a token through `model`, prove that it is harmless and that removal works, and say how players are removed.

    With "auto", tokens are dropped if that gives what masking gives (it does not with rotary or relative positions),
    else masked. The model is left as it was.

    Raises:
        UnsupportedModelError: the token changes the base logits, or an absent player has influence.
    """
    carrier = TokenCarrier(anatomy, partial(_token, model, anatomy) if with_token else _nothing)
    images = noise(model.get_submodule(anatomy.embedding), anatomy.sample)  # type: ignore[arg-type]  # (2, C, H, W)
    with torch.no_grad(), evaluating(model):
        plain = _logits(model, anatomy, images)  # (2, K)
        carrier.attach(model)
        try:
            _check_base(model, carrier, images, plain)
            if removal != "auto":
                _check_leak(model, carrier, images, removal)
                return removal
            return _cheapest_sound(model, carrier, images)
        except (RuntimeError, TypeError, AttributeError) as error:  # the model itself broke, e.g. on fewer tokens
            raise UnsupportedModelError(
                f"{type(model).__name__}: the self-test with removal={removal!r} failed ({error})."
            ) from error
        finally:
            carrier.detach()


def _token(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """Some token (1, 1, D): what it says does not matter, only that nobody hears it."""
    weight = next(model.get_submodule(anatomy.embedding).parameters())
    return torch.arange(anatomy.width, device=weight.device, dtype=weight.dtype).sin()[None, None]


def _nothing() -> None:
    return None


def _logits(model: nn.Module, anatomy: Anatomy, images: Tensor) -> Tensor:
    # `forward`, not a call: hooks on the model itself are the adapter's business.
    return model.forward(pixel_values=images, **anatomy.options).logits


def _run(model: nn.Module, carrier: TokenCarrier, images: Tensor, present: Tensor | None, removal: Removal) -> Pass:
    rows, cols = carrier.anatomy.grid(images)
    with carrier.passing(Pass(rows * cols, present, removal)) as current:
        _logits(model, carrier.anatomy, images)
    return current


def _check_base(model: nn.Module, carrier: TokenCarrier, images: Tensor, plain: Tensor) -> None:
    rows, cols = carrier.anatomy.grid(images)
    with carrier.passing(Pass(rows * cols)) as current:
        logits = _logits(model, carrier.anatomy, images)
    gap = (logits - plain).abs().max().item()
    if not gap <= _TOLERANCE.get(plain.dtype, 2e-2) * max(1.0, plain.abs().max().item()):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the Shapley token changes the model's own logits by {gap:.1e}; expected 0."
        )
    if carrier.has_token() and (current.token is None or torch.equal(current.token[0], current.token[1])):
        raise UnsupportedModelError(f"{type(model).__name__}: the Shapley token does not read the image.")


def _check_leak(model: nn.Module, carrier: TokenCarrier, images: Tensor, removal: Removal) -> Tensor:
    """Refuse if noise in absent players reaches anything; returns the present players' features (2, s, D)."""
    rows, cols = carrier.anatomy.grid(images)
    order = torch.stack([torch.arange(rows * cols), torch.arange(rows * cols).flip(0)])  # (2, N)
    present = order[:, ::2].sort(dim=1).values.to(images.device)  # (2, s)
    clean = _run(model, carrier, images, present, removal)
    dirty = _run(model, carrier, _with_noise(images, present, carrier.anatomy), present, removal)
    for name, one, other in (("features", clean.features, dirty.features), ("token", clean.token, dirty.token)):
        if one is not None and other is not None and not torch.equal(one, other):
            raise UnsupportedModelError(
                f"{type(model).__name__}: with removal={removal!r}, changing absent patches moves the {name} of the "
                f"present ones by {(one - other).abs().max().item():.1e}; expected exactly 0."
            )
    assert clean.features is not None
    return clean.features


def _cheapest_sound(model: nn.Module, carrier: TokenCarrier, images: Tensor) -> Removal:
    masked, refused = _try_leak(model, carrier, images, "mask")
    dropped, reason = _try_leak(model, carrier, images, "drop")
    if dropped is not None and (masked is None or _agree(dropped, masked)):
        return "drop"
    if masked is not None:
        return "mask"
    raise UnsupportedModelError(f"{refused} {reason}")


def _try_leak(
    model: nn.Module, carrier: TokenCarrier, images: Tensor, removal: Removal
) -> tuple[Tensor | None, Exception | None]:
    try:
        return _check_leak(model, carrier, images, removal), None
    except (RuntimeError, ValueError, TypeError) as error:  # a model may break outright on a shorter sequence
        return None, error


def _agree(one: Tensor, other: Tensor) -> bool:
    tolerance = 10 * _TOLERANCE.get(one.dtype, 2e-2) * max(1.0, one.abs().max().item())
    return bool((one - other).abs().max() <= tolerance)


def _with_noise(images: Tensor, present: Tensor, anatomy: Anatomy) -> Tensor:
    """The images (B, C, H, W) with other noise wherever a player is not `present` (B, s)."""
    rows, cols = anatomy.grid(images)
    absent = torch.ones(images.shape[0], rows * cols, dtype=torch.bool, device=images.device)
    absent = absent.scatter(1, present, False).unflatten(1, (rows, cols))  # (B, rows, cols)
    tiles = absent.repeat_interleave(anatomy.patch[0], 1).repeat_interleave(anatomy.patch[1], 2)  # (B, H, W)
    other = noise_like(images)
    return torch.where(tiles[:, None], other, images)


def noise_like(images: Tensor) -> Tensor:
    """Noise of the images' shape, from a generator of its own."""
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(images.shape, generator=generator)).to(images.device, images.dtype)
