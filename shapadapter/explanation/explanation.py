"""What a model said and why, as plain data: frozen, on the CPU, saveable, needing neither model nor display."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shapadapter.core.errors import CheckpointError, FieldError
from shapadapter.core.estimates import relative_error
from shapadapter.core.grid import frame_of, laid_out
from shapadapter.core.phrases import some
from shapadapter.data.classes import check_names, find_class
from shapadapter.explanation.forms import as_dict, as_shap, read_explanation, write_explanation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# How far a map may be from its sum by rounding, as a share of all it gives and takes, and of the logit.
_SUM_TOLERANCE = (1e-3, 1e-5)

_OPTIONAL = ("standard_errors", "evaluations", "frames")


@dataclass(frozen=True)
class Prediction:
    """One class of one image: its name, its index among the model's K classes, its logit and probability in 0..1."""

    label: str
    index: int
    logit: float
    probability: float


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """The predictions for B images and what each player contributed to them.

    For every shown class, null value + attributions = logit, with methods that share the logit out (Grad-CAM does not).
    All tensors are detached and on the CPU.

    Attributes:
        attributions: (B, rows, cols, C) float32, the contribution of each player to each shown class, in logits.
        classes: (B, C) int64, the class index of each column; columns may differ from image to image.
        logits: (B, K) float32.
        null_values: (B, K) float32, the logits with no player present.
        probabilities: (B, K) float32, in 0..1; NaN where the scores are quantities (regression).
        labels: The K class names.
        images: (B, H, W, 3) uint8, what the model saw; the grid lies exactly over it.
        standard_errors: (B, rows, cols, C) float32, how far each attribution is from its Shapley value, in logits: one
            standard deviation of what refinement leaves open. NaN where nothing is known, None without refinement.
        evaluations: (B,) int64, the model evaluations spent on each image beyond the one pass, or None if not counted.
        frames: (B, 6) float64, height and width of each image as it came, upright, then top, left, bottom and right of
            `images` on it, in its pixels: beyond its edges where `images` are padded, NaN where the image processor does
            more than resize, crop and pad. None if they came prepared.
        method: What made the attributions: "shapadapter", "refined" or the name of another method.

    Raises:
        FieldError: If a field is of another type, or a shape, dtype or class index does not fit the others.
    """

    attributions: Tensor
    classes: Tensor
    logits: Tensor
    null_values: Tensor
    probabilities: Tensor
    labels: tuple[str, ...]
    images: Tensor
    standard_errors: Tensor | None = None
    evaluations: Tensor | None = None
    frames: Tensor | None = None
    method: str = "shapadapter"

    def __post_init__(self) -> None:
        check_names(self.labels, "labels")
        check_names([self.method], "method")
        shapes = [tuple(getattr(value, "shape", ())) for value in (self.attributions, self.logits, self.images)]
        if [len(shape) for shape in shapes] != [4, 2, 4]:
            raise FieldError(
                "Expected attributions (B, rows, cols, C), logits (B, K) and images (B, H, W, 3), but got shapes "
                f"{shapes[0]}, {shapes[1]} and {shapes[2]}."
            )
        (_, *players, shown), (batch, classes), (_, *pixels, _) = shapes
        maps, scores = ((batch, *players, shown), torch.float32), ((batch, classes), torch.float32)
        for name, (shape, dtype) in {
            "attributions": maps,
            "classes": ((batch, shown), torch.int64),
            "logits": scores,
            "null_values": scores,
            "probabilities": scores,
            "images": ((batch, *pixels, 3), torch.uint8),
            "standard_errors": maps,
            "evaluations": ((batch,), torch.int64),
            "frames": ((batch, 6), torch.float64),
        }.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                _check(name, getattr(self, name), shape, dtype)
        if len(self.labels) != classes:
            raise FieldError(f"Expected {classes} labels, one per logit, but got {len(self.labels)}.")
        if 0 in (*players, shown, *pixels):
            raise FieldError("Expected at least one player, one shown class and one pixel.")
        ordered = self.classes.sort(dim=1).values  # (B, C)
        if ((ordered < 0) | (ordered >= classes)).any() or (ordered.diff(dim=1) == 0).any():
            raise FieldError(f"Expected different classes in 0..{classes - 1}, but got {some(ordered.tolist())}.")

    def __len__(self) -> int:
        return self.logits.shape[0]

    def __getitem__(self, item: int | slice) -> "Explanation":
        if isinstance(item, slice):
            chosen = item
        elif -len(self) <= item < len(self):
            chosen = slice(item % len(self), item % len(self) + 1)
        else:
            raise IndexError(f"There is no image {item} among {len(self)}.")
        parts: dict[str, Any] = {
            name: value[chosen] for name, value in self._tensors().items()
        }  # (B, ...) -> (b, ...)
        return replace(self, **parts)

    def __repr__(self) -> str:
        rows, cols, shown = self.attributions.shape[1:]
        gap = f", gap {self.efficiency_gap.max():.0e}" if len(self) and self.sums_to_logits else ""
        method = "" if self.method == "shapadapter" else f", {self.method}"
        spent = ""
        if self.evaluations is not None and self.evaluations.any():
            low, high = int(self.evaluations.min()), int(self.evaluations.max())
            counted = f"{low}" if low == high else f"{low} to {high}"
            spent = f", {counted} evaluation{'' if counted == '1' else 's'}"
        players = f"{rows}x{cols} players, {shown} of {len(self.labels)} classes"
        return f"Explanation({len(self)} images, {players}{method}{spent}{gap})"

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def efficiency_gap(self) -> Tensor:
        """(B,) float64: how far null value + attributions are from the logit, at most, over the shown classes."""
        return self._gaps().amax(dim=1)  # (B, C) -> (B,)

    def _gaps(self) -> Tensor:
        # Summed in double precision, so that the gap is that of the numbers and not of this sum.
        total = self.attributions.double().sum(dim=(1, 2))  # (B, rows, cols, C) -> (B, C)
        rest = (self.null_values.double() - self.logits.double()).gather(1, self.classes)  # (B, K) -> (B, C)
        return (total + rest).abs()  # (B, C)

    @property
    def sums_to_logits(self) -> bool:
        """Whether null value + attributions = logit, up to rounding, for all images and shown classes."""
        size = self.attributions.double().abs().sum(dim=(1, 2))  # (B, rows, cols, C) -> (B, C)
        ends = torch.maximum(self.logits.abs(), self.null_values.abs()).gather(1, self.classes)  # (B, K) -> (B, C)
        return bool((self._gaps() <= _SUM_TOLERANCE[0] * size + _SUM_TOLERANCE[1] * ends).all())

    @property
    def relative_errors(self) -> Tensor | None:
        """(B, C) float64: the expected L2 error of each map as a share of its length, None without standard errors."""
        if self.standard_errors is None:
            return None
        return relative_error(*(p.double().flatten(1, 2) for p in (self.attributions, self.standard_errors)))

    def class_index(self, name_or_id: str | int) -> int:
        """The index of a class, 0..K-1, from its name or index; see `find_class`."""
        return find_class(self.labels, name_or_id)

    def for_label(self, name_or_id: str | int) -> Tensor:
        """The attributions of one class, by name or index: (B, rows, cols) float32, in logits.

        Raises:
            ClassNotFoundError: If the model has no such class.
            ValueError: If the class was not among the columns computed for every image.
        """
        return self.column(self.attributions, name_or_id)

    def interval(self, name_or_id: str | int | None = None, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Where the Shapley values of one class are, as far as refinement can tell.

        Attribution plus and minus standard error times the quantile of the normal law: 1.96 for a level of 0.95.

        Args:
            name_or_id: A class name or a class index; None takes each image's shown class with the largest logit.
            level: The share of players whose Shapley value lies inside, in 0..1.

        Returns:
            low and high (B, rows, cols) float32, in logits; NaN where no error is known.

        Raises:
            ValueError: As `for_label`; or the level is not between 0 and 1, or there are no standard errors.
        """
        if self.standard_errors is None:
            raise ValueError("This explanation has no standard errors: explain again with refine=256.")
        if not 0 < level < 1:
            raise ValueError(f"Expected a level between 0 and 1, such as 0.95, but got {level}.")
        parts = (self.attributions, self.standard_errors)
        values, errors = (self._best(part) if name_or_id is None else self.column(part, name_or_id) for part in parts)
        reach = NormalDist().inv_cdf((1 + level) / 2) * errors  # (B, rows, cols)
        return values - reach, values + reach

    def column(self, values: Tensor, name_or_id: str | int) -> Tensor:
        """The entries of one class, (B, rows, cols), of values (B, rows, cols, C); raises as `for_label` does."""
        index = self.class_index(name_or_id)
        found = self.classes == index  # (B, C)
        missing = (~found.any(dim=1)).nonzero().flatten().tolist()  # (B, C) -> (B,) -> list
        if missing:
            raise ValueError(
                f"Class {self.labels[index]!r} was not among the columns computed for image {some(missing)}. Explain "
                f"again with targets=[{name_or_id!r}] or a larger top_k, or pick an image that shows it."
            )
        return self._picked(values, found.int().argmax(dim=1))

    def _best(self, values: Tensor) -> Tensor:
        """The entries of each image's likeliest shown class, (B, rows, cols), of values (B, rows, cols, C)."""
        return self._picked(values, self.logits.gather(1, self.classes).argmax(dim=1))

    def _picked(self, values: Tensor, column: Tensor) -> Tensor:
        """One column (B,) of each image: (B, rows, cols, C) -> (B, rows, cols)."""
        return values[torch.arange(len(self), device="cpu"), :, :, column]

    def top(self, k: int = 3) -> list[list[Prediction]]:
        """For each image the `k` classes, or all K, with the largest logits, best first."""
        best = self.logits.argsort(dim=1, descending=True, stable=True)[:, : max(k, 0)]  # (B, K) -> (B, k)
        return [
            [Prediction(self.labels[c], c, float(self.logits[b, c]), float(self.probabilities[b, c])) for c in row]
            for b, row in enumerate(best.tolist())
        ]

    def heatmap(
        self, label: str | int | None = None, *, index: int = 0, smooth: bool = False, original: bool = False
    ) -> NDArray[np.float32]:
        """The attributions of one class, enlarged to the size of the image.

        Args:
            label: A class name or index; None takes the image's shown class with the largest logit.
            index: Which image.
            smooth: Interpolate bicubically; otherwise every pixel of a player has the player's value.
            original: Lay the map on the image as it came, instead of what the image processor made of it.

        Returns:
            (H, W) float32, in logits per player; on the original NaN where the model never saw it.

        Raises:
            ClassNotFoundError: If the model has no such class.
            ValueError: If the class was not computed for this image, or the frame of the original is not known.
        """
        one = self[index]
        values = one._best(one.attributions) if label is None else one.for_label(label)  # (1, rows, cols)
        seen = (one.images.shape[1], one.images.shape[2])
        size, box = (seen, (0, 0, *seen)) if not original else frame_of(None if one.frames is None else one.frames[0])
        return laid_out(values[0].numpy(), size, box, smooth)  # (rows, cols) -> (H, W)

    def figure(self, index: int = 0, **options: Any) -> "Figure":
        """Draw one image and its maps; options as in `shapadapter.visual.draw_explanation`: `labels`, `smooth`, ..."""
        from shapadapter.visual import draw_explanation

        return draw_explanation(self, index, **options)

    def save_html(self, path: str | Path, *, title: str = "Explanation", **options: Any) -> Path:
        """Write one self-contained page; `names`, `true_labels`, ... as in `shapadapter.visual.write_page`. Its path."""
        from shapadapter.visual import write_page

        return write_page(self, path, title=title, **options)

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """All tensors as numpy arrays, copied, by their names here: `numpy.savez("why.npz", **explanation.to_numpy())`."""
        return {name: tensor.numpy().copy() for name, tensor in self._tensors().items()}

    def to_dict(self) -> dict[str, Any]:
        """What json takes: an entry for each image, with the shown classes best first; without the pixels.

        A class has `label`, `index`, `logit`, `probability`, `null_value`, `sum` and `attributions` (rows lists of cols
        numbers), with refinement `standard_errors`; a number that is not finite is None.
        """
        return as_dict(self)

    def to_shap(self, label: str | int | None = None) -> Any:
        """A `shap.Explanation`, for the plots of the shap library.

        Args:
            label: None for `shap.plots.image`, with values (B, rows, cols, 1, C) of the shown classes; a class name or index
                for `shap.plots.waterfall`, `bar`, `beeswarm` and others, which show N named features: values (B, N), with
                a player's mean brightness, in 0..1, as the feature's value.

        Raises:
            ImportError: The shap library is missing.
            ClassNotFoundError: If the model has no such class.
            ValueError: If the class was not computed for every image.
        """
        return as_shap(self, label)

    def save(self, directory: str | Path) -> Path:
        """Write the explanation as `explanation.safetensors` and `explanation.json`.

        The directory is created if missing, and returned. Other files in it stay; an explanation saved there before is
        replaced, once both files are complete.

        Raises:
            FileExistsError: If a file of one of the two names is there that is not part of an explanation.
        """
        write_explanation(Path(directory), self._tensors(), {"labels": self.labels, "method": self.method})
        return Path(directory)

    @classmethod
    def load(cls, directory: str | Path) -> "Explanation":
        """Read what `save` wrote into a directory, bit for bit.

        Raises:
            CheckpointError: If a file is missing, damaged, of a newer version or does not belong to the other.
        """
        tensors, words = read_explanation(Path(directory))
        try:
            return cls(**tensors, labels=tuple(words["labels"]), method=words.get("method", "shapadapter"))
        except (TypeError, FieldError) as error:  # a tensor that is none of an explanation's, or is missing
            raise CheckpointError(f"The Explanation in {directory} is incomplete: {error}") from error


def _check(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    here = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not here or value.dtype != dtype or tuple(value.shape) != shape or value.requires_grad:
        said = ("dtype", "layout", "device", "shape")
        came = ", ".join(f"{one} {getattr(value, one)}" for one in said if hasattr(value, one))
        grad = ", requiring grad" if getattr(value, "requires_grad", False) else ""
        raise FieldError(
            f"Expected {name} to be a detached {dtype} CPU tensor of shape {shape}, but got {type(value).__name__} {came}{grad}."
        )
