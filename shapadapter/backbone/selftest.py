"""The proof at wrapping time: the base model is untouched, and a removed player has no influence at all.

Signatures prove nothing here: most vision models accept an attention mask, and several ignore it. So the effects are
measured, on a tiny batch of noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shapadapter.backbone.anatomy import Anatomy, first_tensor
from shapadapter.backbone.dry_run import (
    TOLERANCE,
    FaintSignalError,
    configured_size,
    equal_up_to_rounding,
    exceeds_rounding,
    in_sufficient_precision,
    noise,
    undisturbed,
)
from shapadapter.backbone.families import original_name, profile_of
from shapadapter.backbone.forward import score
from shapadapter.backbone.hooks import FeatureHooks, ForwardCall, Removal, keep_cells, with_patch_mask
from shapadapter.backbone.search import AmbiguousModelError, find_readout, find_sequence
from shapadapter.backbone.tiling import pixels_of
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
    """
    profile_of(model)
    return in_sufficient_precision(partial(_settle, model, removal, grid, with_token), model)


def _settle(model: nn.Module, removal: Choice, *rules: Any) -> tuple[Anatomy, Removal]:
    name, told = type(model).__name__, []
    for find in (find_sequence, find_readout):
        try:
            anatomy = find(model)
            return anatomy, _proved(model, anatomy, removal, *rules)
        except FaintSignalError:
            raise
        except AmbiguousModelError as error:
            raise UnsupportedModelError(f"{name}: {error}.") from error
        except UnsupportedModelError as error:
            told.append(str(error).rstrip("."))
            refused = error
        if removal in ("drop", "mask"):
            raise UnsupportedModelError(
                f"{name}: {told[0]}. removal={removal!r} takes patches out of a sequence of tokens, which this model does "
                "not allow; leave it at 'auto'."
            ) from refused
    raise UnsupportedModelError(f"{name}: {'; '.join(dict.fromkeys(told))}.") from refused


def choose_removal(
    model: nn.Module,
    anatomy: Anatomy,
    removal: Choice = "auto",
    grid: tuple[int, int] | None = None,
    with_token: bool = True,
) -> Removal:
    """Prove that what `anatomy` says is harmless and that removal works, and say how players are removed."""
    return in_sufficient_precision(partial(_proved, model, anatomy, removal, grid, with_token), model)


def _proved(
    model: nn.Module, anatomy: Anatomy, removal: Choice, grid: tuple[int, int] | None, with_token: bool
) -> Removal:
    weight = next(model.get_submodule(anatomy.entrance).parameters())
    # What the token (1, 1, D) says does not matter, only that nobody hears it.
    token = torch.arange(anatomy.width, device=weight.device, dtype=weight.dtype).sin()[None, None]
    hooks = FeatureHooks(anatomy, (lambda: token) if with_token else None)
    test = _SelfTest(model, anatomy, hooks, {**noise(model, anatomy.family, anatomy.sample), **anatomy.options})
    plain, scores = Stream(), None
    with undisturbed(model):
        if anatomy.blocks:  # hooks on a model without them only read
            with _watched(model, anatomy) as plain:
                scores = score(model, anatomy, test.inputs)  # (2, K)
        hooks.attach(model)
        try:
            test.check_base(plain, scores)
            return test.choose(removal, grid)
        except FaintSignalError:
            raise
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
            # The model itself broke, e.g. on fewer tokens.
            raise UnsupportedModelError(f"the self-test with removal={removal!r} failed ({error})") from error
        finally:
            hooks.detach()


@dataclass
class Stream:
    """What enters the first block, and what the module with the features returns to those behind it: (2, T, D) each."""

    entering: Any = None
    leaving: Any = None


@contextmanager
def _watched(model: nn.Module, anatomy: Anatomy) -> Iterator[Stream]:
    """Watch the passes in the context from outside of hooks that are attached already."""
    stream = Stream()

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.entering = args[0] if args else kwargs["hidden_states"]

    def leave(source: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stream.leaving = first_tensor(output)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if original_name(name) in anatomy.blocks[:1]:
                hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            if original_name(name) == anatomy.source:
                hooks.enter_context(module.register_forward_hook(leave))
        yield stream


@dataclass(frozen=True)
class _SelfTest:
    """Passes of one model with hooks attached, on `inputs` of noise."""

    model: nn.Module
    anatomy: Anatomy
    hooks: FeatureHooks
    inputs: dict[str, Any]

    def run(
        self, present: Tensor | None = None, removal: Removal = "mask", inputs: dict[str, Any] | None = None
    ) -> tuple[ForwardCall, Tensor | None]:
        """One pass with the cells `present` (2, cells) bool, and the scores."""
        inputs = inputs or self.inputs
        rows, cols = self.anatomy.cells(**inputs)
        call = ForwardCall(rows * cols)
        if present is not None:
            index = present.nonzero()[:, 1].view(len(present), -1)  # (2, s)
            call = ForwardCall(rows * cols, index, removal, patch_mask=self.anatomy.family.patches)
            inputs = with_patch_mask(inputs, present) if call.patch_mask else inputs
        with self.hooks.during(call):
            return call, score(self.model, self.anatomy, inputs)

    def check_base(self, plain: Stream, scores: Tensor | None) -> None:
        """Refuse a token that the base model hears, and features that know nothing of the image."""
        with _watched(self.model, self.anatomy) as stream:
            call, again = self.run()
        if scores is not None and again is not None:
            gap = (again - scores).abs().max().item()
            if not gap <= TOLERANCE.get(scores.dtype, 2e-2) * max(1.0, scores.abs().max().item()):
                raise UnsupportedModelError(
                    f"the Shapley token changes the model's own logits by {gap:.1e}; expected 0"
                )
        message = f"the features of {self.anatomy.source} do not depend on the image"
        if call.features is None:
            raise UnsupportedModelError(message)
        _refuse_alike(message, call.features, call.features.dtype)
        if self.anatomy.blocks:
            self._check_blocks(plain, stream)
        if self.hooks.token_in_sequence():
            _refuse_alike("the Shapley token does not read the image", call.token, call.features.dtype)

    def _check_blocks(self, plain: Stream, stream: Stream) -> None:
        """Refuse a token that moves what the blocks make of the image, however little a head may show of that."""
        moved = plain.leaving - plain.entering  # (2, T, D), what the blocks add
        if moved.dtype != torch.float64 and not exceeds_rounding(moved, plain.leaving):
            raise FaintSignalError(f"the blocks up to {self.anatomy.source} change nothing")
        if not equal_up_to_rounding(plain.leaving, stream.leaving, moved):
            gap = (stream.leaving - plain.leaving).abs().max().item() / moved.abs().max().item()
            raise UnsupportedModelError(
                f"the Shapley token changes the model's own features by {gap:.1e} of what its blocks add; expected 0"
            )

    def choose(self, removal: Choice, grid: tuple[int, int] | None) -> Removal:
        """The removal that was asked for, or with "auto" the cheapest that is sound."""
        anatomy, patches = self.anatomy, self.anatomy.family.patches
        if removal == "pixels" or not anatomy.blocks:
            if anatomy.blocks and not anatomy.attentions:
                # Without a token in it, a sequence is worth its blocks only if tokens can be removed. Asked for pixels as
                # well, so that a model has the same parts when it is loaded again.
                self._cheapest()
            if patches:
                raise UnsupportedModelError(
                    f"removal={removal!r} needs images, this model takes patches; use removal='mask'"
                )
            if removal not in ("auto", "pixels"):
                raise UnsupportedModelError(
                    f"removal={removal!r} needs a sequence of patch tokens, which was not found; use removal='pixels'"
                )
            return "pixels"
        if removal == "auto":
            sound, size = self._cheapest(), configured_size(self.model) or anatomy.sample
            cut = grid is not None and any(size[axis] // anatomy.cell[axis] % grid[axis] for axis in (0, 1))
            return "pixels" if cut and not patches else sound
        if removal == "drop" and patches:
            raise UnsupportedModelError("this model masks patches by itself; use removal='mask'")
        features = self.check_leak(removal)
        if removal == "drop" and not self._in_place(features, self._try_leak("mask")[0]):
            raise UnsupportedModelError(f"{_MISTAKEN}; use removal='mask' or 'pixels'")
        return removal

    def _cheapest(self) -> Removal:
        patches = self.anatomy.family.patches
        masked, refused = self._try_leak("mask")
        dropped, reason = (None, None) if patches else self._try_leak("drop")
        if dropped is not None and self._in_place(dropped, masked):
            return "drop"
        if masked is not None:
            return "mask"
        if self.anatomy.attentions and not patches:
            return "pixels"
        raise UnsupportedModelError(f"{refused}; {reason or _MISTAKEN}")

    def _try_leak(self, removal: Removal) -> tuple[Tensor | None, Exception | None]:
        try:
            return self.check_leak(removal), None
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ) as error:  # a model may break outright on fewer tokens
            return None, error

    def check_leak(self, removal: Removal) -> Tensor:
        """Refuse if noise in absent players reaches anything; returns the present players' features (2, s, D)."""
        present = self._every_other()
        clean, _ = self.run(present, removal)
        dirty, _ = self.run(present, removal, self._with_noise(present))
        for name, one, other in (("features", clean.features, dirty.features), ("token", clean.token, dirty.token)):
            if one is not None and other is not None and not torch.equal(one, other):
                raise UnsupportedModelError(
                    f"with removal={removal!r}, changing absent patches moves the {name} of the present ones by "
                    f"{(one - other).abs().max().item():.1e}; expected exactly 0"
                )
        assert clean.features is not None
        return clean.features

    def _every_other(self) -> Tensor:
        """Half of the cells of each of two images, (2, cells) bool; of the second the others, if that is as many."""
        rows, cols = self.anatomy.cells(**self.inputs)
        present = torch.arange(rows * cols, device=self.inputs["pixel_values"].device) % 2 == 0
        return torch.stack([present, ~present if rows * cols % 2 == 0 else present.flip(0)])

    def _with_noise(self, present: Tensor) -> dict[str, Any]:
        """The inputs with other noise wherever a cell is not `present` (2, cells) bool."""
        images = self.inputs["pixel_values"]
        generator = torch.Generator().manual_seed(1)
        other = (3 * torch.randn(images.shape, generator=generator, device="cpu")).to(images)
        if self.anatomy.family.patches:
            kept = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)  # (2, N)
            kept[:, : present.shape[1]] = present
            return {**self.inputs, "pixel_values": torch.where(kept[..., None], images, other)}
        cells = self.anatomy.cells(images)
        seen = self.anatomy.seen(images, cells)
        kept = torch.ones(images.shape[0], *images.shape[2:], dtype=torch.bool, device=images.device)  # (2, H, W)
        kept[:, : seen[0], : seen[1]] = pixels_of(present, cells, seen)
        return {**self.inputs, "pixel_values": torch.where(kept[:, None], images, other)}

    def _in_place(self, dropped: Tensor, masked: Tensor | None) -> bool:
        """Whether patches whose neighbours are dropped are still taken for themselves.

        They are if masking the neighbours gives the same. Where nothing can be masked, blocks and head must take patches
        as a set: then only the embeddings in front of them know a place.
        """
        if masked is None:
            return self._unordered()
        with _watched(self.model, self.anatomy) as stream:
            self.run()
        present = self._every_other().nonzero()[:, 1].view(2, -1)  # (2, s)
        prefix = self.anatomy.prefix
        entering = keep_cells(stream.entering, present, prefix)[:, prefix:]  # (2, s, D)
        return equal_up_to_rounding(dropped, masked, masked - entering, TOLERANCE.get(masked.dtype, 2e-2))

    def _unordered(self) -> bool:
        """Whether the blocks say the same of every patch when all come in another order, and so do the scores."""
        prefix, generator = self.anatomy.prefix, torch.Generator().manual_seed(2)
        rows, cols = self.anatomy.cells(**self.inputs)
        order = torch.randperm(rows * cols, generator=generator, device="cpu").to(self.inputs["pixel_values"].device)
        entering: list[Tensor] = []

        def shuffle(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            entering.append(keep_cells(hidden, order.expand(len(hidden), -1), prefix))  # (2, P + cells, D)
            return ((entering[0], *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": entering[0]})

        plain, scores = self.run()
        first = self.model.get_submodule(self.anatomy.blocks[0])
        with first.register_forward_pre_hook(shuffle, prepend=True, with_kwargs=True):
            shuffled, again = self.run()
        assert plain.features is not None
        assert shuffled.features is not None
        moved = shuffled.features - entering[0][:, prefix:]  # (2, cells, D), what the blocks add
        tolerance = None if scores is None else TOLERANCE.get(scores.dtype, 2e-2)
        same = scores is None or again is None or equal_up_to_rounding(scores, again, scores, tolerance)
        return same and equal_up_to_rounding(plain.features[:, order], shuffled.features, moved)


def _refuse_alike(message: str, found: Tensor | None, dtype: torch.dtype) -> None:
    """Refuse what is the same for two images; in less than float64 it may be too faint to show."""
    if found is None or not exceeds_rounding(found[0] - found[1], found):
        raise (UnsupportedModelError if dtype == torch.float64 else FaintSignalError)(message)
