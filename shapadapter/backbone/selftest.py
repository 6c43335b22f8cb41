"""The proof at wrapping time: the base model is untouched, and a removed player has no influence at all.

Signatures prove nothing here: most vision models accept an attention mask, and several ignore it. So the effects are
measured, on a tiny batch of noise.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shapadapter.backbone.anatomy import Anatomy, evaluating
from shapadapter.backbone.dry_run import Stream, configured_size, noise, unchanged, watched
from shapadapter.backbone.forward import score
from shapadapter.backbone.hooks import Carrier, Pass, Removal, with_patch_mask
from shapadapter.backbone.pixels import pixels_of
from shapadapter.backbone.precision import (
    TOLERANCE,
    FaintSignalError,
    exceeds_rounding,
    in_sufficient_precision,
    refuse_faint,
    same_but_rounding,
)
from shapadapter.backbone.readout import find_readout
from shapadapter.backbone.sequence import AmbiguousModelError, find_sequence, known
from shapadapter.backbone.token import TokenCarrier, keep_cells
from shapadapter.core.errors import UnsupportedModelError

_MISTAKEN = (
    "with removal='drop' the present patches are taken for others: the model has rotary or relative positions, or mixes "
    "patches in another way than by attention"
)

Choice = Literal["auto", "drop", "mask", "pixels"]


def settle(
    model: nn.Module, removal: Choice = "auto", grid: tuple[int, int] | None = None, with_token: bool = True
) -> tuple[Anatomy, Removal]:
    """Find the parts of a model, prove that they do what they seem to do, and say how players are removed.

    With "auto", tokens are dropped if that gives what masking gives (it does not with rotary or relative positions),
    else masked; where there are no tokens, or a player of `grid` is not a whole number of them, pixels are replaced.
    The model is left as it was.

    Args:
        model: the base model.
        removal: how players are to be removed.
        grid: (rows, cols) of the players; None for the cells.
        with_token: whether a Shapley token will travel.

    Raises:
        UnsupportedModelError: the parts are not there, a token would change the base logits, or an absent player has
            influence. The message says what was looked for and found, in each way that was tried.
    """
    known(model)
    return in_sufficient_precision(partial(_settle, model, removal, grid=grid, with_token=with_token), model)


def _settle(model: nn.Module, removal: Choice, **rules: Any) -> tuple[Anatomy, Removal]:
    try:
        anatomy = find_sequence(model)
        return anatomy, _proved(model, anatomy, removal, **rules)
    except FaintSignalError:
        raise
    except AmbiguousModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error}.") from error
    except UnsupportedModelError as error:
        no_sequence = error
    if removal in ("drop", "mask"):
        raise UnsupportedModelError(
            f"{type(model).__name__}: {str(no_sequence).rstrip('.')}. removal={removal!r} takes patches out of a sequence of "
            "tokens, which this model does not allow; leave it at 'auto'."
        ) from no_sequence
    try:
        anatomy = find_readout(model)
        return anatomy, _proved(model, anatomy, removal, **rules)
    except FaintSignalError:
        raise
    except UnsupportedModelError as error:
        told = dict.fromkeys([str(no_sequence).rstrip("."), str(error).rstrip(".")])
        raise UnsupportedModelError(f"{type(model).__name__}: {'; '.join(told)}.") from error


def choose_removal(
    model: nn.Module,
    anatomy: Anatomy,
    removal: Choice = "auto",
    grid: tuple[int, int] | None = None,
    with_token: bool = True,
) -> Removal:
    """Prove that what `anatomy` says is harmless and that removal works, and say how players are removed.

    Raises:
        UnsupportedModelError: the token changes the base logits, or an absent player has influence.
    """
    return in_sufficient_precision(partial(_proved, model, anatomy, removal, grid, with_token), model)


def _proved(
    model: nn.Module, anatomy: Anatomy, removal: Choice, grid: tuple[int, int] | None, with_token: bool
) -> Removal:
    carrier = carrier_for(anatomy, partial(_token, model, anatomy) if with_token else _nothing)
    inputs = {**noise(model, anatomy.family, anatomy.sample), **anatomy.options}
    plain, scores = Stream(), None
    with torch.no_grad(), evaluating(model), unchanged(model):
        if anatomy.blocks:  # a carrier without them only reads
            with watched(model, anatomy) as plain:
                scores = score(model, anatomy.kind, anatomy.family, inputs)  # (2, K)
        carrier.attach(model)
        try:
            _check_base(model, carrier, inputs, plain, scores)
            return _chosen(model, carrier, inputs, removal, grid)
        except FaintSignalError:
            raise
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
            # The model itself broke, e.g. on fewer tokens.
            raise UnsupportedModelError(f"the self-test with removal={removal!r} failed ({error})") from error
        finally:
            carrier.detach()


def carrier_for(anatomy: Anatomy, token: Any) -> Carrier:
    """The carrier of a model of this anatomy; `token` gives the token (1, 1, D) to take along, or None."""
    if not anatomy.blocks:
        return Carrier(anatomy)
    return TokenCarrier(anatomy, token if anatomy.attentions else _nothing)


def _token(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """Some token (1, 1, D): what it says does not matter, only that nobody hears it."""
    weight = next(model.get_submodule(anatomy.entrance).parameters())
    return torch.arange(anatomy.width, device=weight.device, dtype=weight.dtype).sin()[None, None]


def _nothing() -> None:
    return None


def _run(
    model: nn.Module,
    carrier: Carrier,
    inputs: dict[str, Any],
    present: Tensor | None = None,
    removal: Removal = "mask",
) -> tuple[Pass, Tensor | None]:
    """One pass with the cells `present` (2, cells) bool, and the scores."""
    anatomy = carrier.anatomy
    rows, cols = anatomy.cells(**inputs)
    current = Pass(rows * cols)
    if present is not None:
        index = present.nonzero()[:, 1].view(len(present), -1)  # (2, s)
        current = Pass(rows * cols, index, removal, native=anatomy.family.patches)
        inputs = with_patch_mask(inputs, present) if current.native else inputs
    with carrier.passing(current):
        scores = score(model, anatomy.kind, anatomy.family, inputs)
    return current, scores


def _check_base(
    model: nn.Module, carrier: Carrier, inputs: dict[str, Any], plain: Stream, scores: Tensor | None
) -> None:
    """Refuse a token that the base model hears, and features that know nothing of the image."""
    with watched(model, carrier.anatomy) as stream:
        current, again = _run(model, carrier, inputs)
    if scores is not None and again is not None:
        gap = (again - scores).abs().max().item()
        if not gap <= TOLERANCE.get(scores.dtype, 2e-2) * max(1.0, scores.abs().max().item()):
            raise UnsupportedModelError(f"the Shapley token changes the model's own logits by {gap:.1e}; expected 0")
    features = current.features
    if features is None or not exceeds_rounding(features[0] - features[1], features):
        message = f"the features of {carrier.anatomy.source} do not depend on the image"
        raise UnsupportedModelError(message) if features is None else refuse_faint(message, features)
    if carrier.anatomy.blocks:
        _check_blocks(carrier.anatomy, plain, stream)
    if isinstance(carrier, TokenCarrier) and carrier.has_token():
        token = current.token
        if token is None or not exceeds_rounding(token[0] - token[1], token):
            raise refuse_faint("the Shapley token does not read the image", features)


def _check_blocks(anatomy: Anatomy, plain: Stream, stream: Stream) -> None:
    """Refuse a token that moves what the blocks make of the image, however little a head may show of that."""
    moved, one, other = plain.moved(), plain.leaving, stream.leaving
    assert one is not None
    assert other is not None
    if one.dtype != torch.float64 and not exceeds_rounding(moved, one):
        raise FaintSignalError(f"the blocks up to {anatomy.source} change nothing")
    if not same_but_rounding(one, other, moved):
        gap = (other - one).abs().max().item() / moved.abs().max().item()
        raise UnsupportedModelError(
            f"the Shapley token changes the model's own features by {gap:.1e} of what its blocks add; expected 0"
        )


def _chosen(
    model: nn.Module, carrier: Carrier, inputs: dict[str, Any], removal: Choice, grid: tuple[int, int] | None
) -> Removal:
    anatomy = carrier.anatomy
    if removal == "pixels" or not anatomy.blocks:
        if anatomy.blocks and not anatomy.attentions:
            # Without a token in it, a sequence is worth its blocks only if tokens can be removed. Asked for pixels as
            # well, so that a model has the same parts when it is loaded again.
            _cheapest_sound(model, carrier, inputs)
        return _only_pixels(anatomy, removal)
    if removal != "auto":
        return _as_told(model, carrier, inputs, removal)
    sound = _cheapest_sound(model, carrier, inputs)
    return "pixels" if _cuts_patches(model, anatomy, grid) else sound


def _only_pixels(anatomy: Anatomy, removal: Choice) -> Removal:
    if anatomy.family.patches:
        raise UnsupportedModelError(f"removal={removal!r} needs images, this model takes patches; use removal='mask'")
    if removal not in ("auto", "pixels"):
        raise UnsupportedModelError(
            f"removal={removal!r} needs a sequence of patch tokens, which was not found; use removal='pixels'"
        )
    return "pixels"


def _as_told(model: nn.Module, carrier: Carrier, inputs: dict[str, Any], removal: Removal) -> Removal:
    if removal == "drop" and carrier.anatomy.family.patches:
        raise UnsupportedModelError("this model masks patches by itself; use removal='mask'")
    features = _check_leak(model, carrier, inputs, removal)
    masked, _ = _try_leak(model, carrier, inputs, "mask") if removal == "drop" else (None, None)
    if removal == "drop" and not _in_place(model, carrier, inputs, features, masked):
        raise UnsupportedModelError(f"{_MISTAKEN}; use removal='mask' or 'pixels'")
    return removal


def _check_leak(model: nn.Module, carrier: Carrier, inputs: dict[str, Any], removal: Removal) -> Tensor:
    """Refuse if noise in absent players reaches anything; returns the present players' features (2, s, D)."""
    present = _every_other(carrier, inputs)
    clean, _ = _run(model, carrier, inputs, present, removal)
    dirty, _ = _run(model, carrier, _with_noise(inputs, present, carrier.anatomy), present, removal)
    for name, one, other in (("features", clean.features, dirty.features), ("token", clean.token, dirty.token)):
        if one is not None and other is not None and not torch.equal(one, other):
            raise UnsupportedModelError(
                f"with removal={removal!r}, changing absent patches moves the {name} of the present ones by "
                f"{(one - other).abs().max().item():.1e}; expected exactly 0"
            )
    assert clean.features is not None
    return clean.features


def _every_other(carrier: Carrier, inputs: dict[str, Any]) -> Tensor:
    """Half of the cells of each of two images, (2, cells) bool; of the second the others, if that is as many."""
    rows, cols = carrier.anatomy.cells(**inputs)
    present = torch.arange(rows * cols, device=inputs["pixel_values"].device) % 2 == 0
    return torch.stack([present, ~present if rows * cols % 2 == 0 else present.flip(0)])


def _cheapest_sound(model: nn.Module, carrier: Carrier, inputs: dict[str, Any]) -> Removal:
    anatomy = carrier.anatomy
    masked, refused = _try_leak(model, carrier, inputs, "mask")
    dropped, reason = (None, None) if anatomy.family.patches else _try_leak(model, carrier, inputs, "drop")
    if dropped is not None and _in_place(model, carrier, inputs, dropped, masked):
        return "drop"
    if masked is not None:
        return "mask"
    if anatomy.attentions and not anatomy.family.patches:
        return "pixels"
    raise UnsupportedModelError(f"{refused}; {reason or _MISTAKEN}")


def _in_place(
    model: nn.Module, carrier: Carrier, inputs: dict[str, Any], dropped: Tensor, masked: Tensor | None
) -> bool:
    """Whether patches whose neighbours are dropped are still taken for themselves.

    They are if masking the neighbours gives the same. Where nothing can be masked, blocks and head must take patches as
    a set: then only the embeddings in front of them know a place.
    """
    if masked is None:
        return _unordered(model, carrier, inputs)
    with watched(model, carrier.anatomy) as stream:
        _run(model, carrier, inputs)
    present = _every_other(carrier, inputs).nonzero()[:, 1].view(2, -1)  # (2, s)
    assert stream.entering is not None
    entering = keep_cells(stream.entering, present, carrier.anatomy.prefix)[:, carrier.anatomy.prefix :]  # (2, s, D)
    return same_but_rounding(dropped, masked, masked - entering, TOLERANCE.get(masked.dtype, 2e-2))


def _unordered(model: nn.Module, carrier: Carrier, inputs: dict[str, Any]) -> bool:
    """Whether the blocks say the same of every patch when all come in another order, and so do the scores."""
    anatomy = carrier.anatomy
    rows, cols = anatomy.cells(**inputs)
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(2), device="cpu").to(
        inputs["pixel_values"].device
    )
    entering: list[Tensor] = []

    def shuffle(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        entering.append(keep_cells(hidden, order.expand(len(hidden), -1), anatomy.prefix))  # (2, P + cells, D)
        return ((entering[0], *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": entering[0]})

    plain, scores = _run(model, carrier, inputs)
    with model.get_submodule(anatomy.blocks[0]).register_forward_pre_hook(shuffle, prepend=True, with_kwargs=True):
        shuffled, again = _run(model, carrier, inputs)
    assert plain.features is not None
    assert shuffled.features is not None
    moved = shuffled.features - entering[0][:, anatomy.prefix :]  # (2, cells, D), what the blocks add
    tolerance = None if scores is None else TOLERANCE.get(scores.dtype, 2e-2)
    same = scores is None or again is None or same_but_rounding(scores, again, scores, tolerance)
    return same and same_but_rounding(plain.features[:, order], shuffled.features, moved)


def _cuts_patches(model: nn.Module, anatomy: Anatomy, grid: tuple[int, int] | None) -> bool:
    """Whether players of `grid` are no whole number of patches at the size the model is configured for."""
    if grid is None or anatomy.family.patches:
        return False
    size = configured_size(model) or anatomy.sample
    return any(size[axis] // anatomy.cell[axis] % grid[axis] for axis in (0, 1))


def _try_leak(
    model: nn.Module, carrier: Carrier, inputs: dict[str, Any], removal: Removal
) -> tuple[Tensor | None, Exception | None]:
    try:
        return _check_leak(model, carrier, inputs, removal), None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a model may break outright on fewer tokens
        return None, error


def _with_noise(inputs: dict[str, Any], present: Tensor, anatomy: Anatomy) -> dict[str, Any]:
    """The inputs with other noise wherever a cell is not `present` (2, cells) bool."""
    images = inputs["pixel_values"]
    other = noise_like(images)
    if anatomy.family.patches:
        kept = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)  # (2, N)
        kept[:, : present.shape[1]] = present
        return {**inputs, "pixel_values": torch.where(kept[..., None], images, other)}
    cells = anatomy.cells(images)
    seen = anatomy.seen(images, cells)
    kept = torch.ones(images.shape[0], *images.shape[2:], dtype=torch.bool, device=images.device)  # (2, H, W)
    kept[:, : seen[0], : seen[1]] = pixels_of(present, cells, seen)
    return {**inputs, "pixel_values": torch.where(kept[:, None], images, other)}


def noise_like(images: Tensor) -> Tensor:
    """Noise of the images' shape, from a generator of its own."""
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(images.shape, generator=generator, device="cpu")).to(images.device, images.dtype)
