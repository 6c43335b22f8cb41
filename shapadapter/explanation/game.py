"""A wrapped model and images as cooperative games: values of coalitions, and Shapley values the slow way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.adapter import CHILD, ShapleyLayer
from shapadapter.adapter.coalitions import evaluate_coalitions
from shapadapter.backbone import evaluation_view, reached
from shapadapter.core.errors import ImageError, ShapleyError, UnsupportedModelError
from shapadapter.core.estimates import exact_shapley_values, kernel_shap, kernel_shap_error
from shapadapter.core.shapley import all_coalitions, pays_for_all, sample_paired_coalitions
from shapadapter.data.images import IMAGE_INPUTS

GRADIENT_COST = 1.75
"""What a backward pass for one class costs, in evaluations of coalitions, of which half of the patches is absent on average.

A forward pass of the whole image costs about as much or a little more: so a sample for C classes costs (1 + C) of them.
"""

_COALITIONS = 32  # of an image in a call of the model, which also evaluates the whole image each time
_PER_IMAGE = 8  # coalitions, of all images, in a call: so many times `batch_size`. Most are much smaller than an image


def active_layer(model: nn.Module) -> ShapleyLayer:
    """The Shapley layer of a wrapped model."""
    layers = [m for m in model.modules() if isinstance(m, ShapleyLayer)] if isinstance(model, nn.Module) else []
    if len(layers) != 1 or layers[0].active is None:
        raise ShapleyError(
            f"Expected a model with an active Shapley adapter, got {type(model).__name__}"
            + (" whose adapters are disabled." if layers else ". Wrap it: get_peft_model(model, ShapleyConfig()).")
        )
    # What hands attributes on to the model inside, as `torch.compile` and FSDP do, serves as that model.
    if getattr(model, CHILD, None) is not layers[0]:
        inner = next(name for name, m in model.named_modules() if name and getattr(m, CHILD, None) is layers[0])
        raise ShapleyError(
            f"Expected the wrapped model itself, got {type(model).__name__} around it. Pass the model inside: "
            f"{reached('outer', inner)}, as in explain({reached('outer', inner)}, ...)."
        )
    return layers[0]


@dataclass(frozen=True)
class BatchGame:
    """The games of a batch of images, with values of the classes (B, C) alone.

    `inputs` are keyword arguments of the wrapped model's forward for the batch, `batch_size` is images in a forward pass.
    After each call of the model, `count` is called with the number of evaluations.
    """

    model: nn.Module
    inputs: dict[str, Any]
    classes: Tensor
    batch_size: int
    count: Callable[[int], Any] = field(default=lambda evaluations: None)

    def values(self, images: Tensor, coalitions: Tensor) -> Tensor:
        """v(S) of some images (b,), each with its coalitions (b, M, N) of the same sizes: (b, M, C) fp32, on the CPU."""
        together = max(1, _PER_IMAGE * self.batch_size // _COALITIONS)
        parts = zip(images.split(together), coalitions.split(together), strict=True)
        return torch.cat([self._values(some, chosen) for some, chosen in parts])

    def _values(self, images: Tensor, coalitions: Tensor) -> Tensor:
        rows = images.to(self.classes.device)
        inputs = {name: value[rows] if name in IMAGE_INPUTS else value for name, value in self.inputs.items()}

        def shown(values: Tensor) -> Tensor:
            self.count(values.shape[0] * values.shape[1])
            classes = self.classes[rows][:, None].expand(-1, values.shape[1], -1)  # (b, C) -> (b, m, C)
            return values.gather(2, classes).float().cpu()

        return evaluate_coalitions(self.model, inputs, coalitions, _COALITIONS, shown)

    def gradients(self, images: Tensor, presence: Tensor) -> Tensor:
        """The soft game's gradient by presence (b, R, N) of some images (b,): (b, R, N, C) fp32, on the CPU.

        Of players that are present at all; at 0 it is not asked for. A pass holds about `batch_size` samples, and needs the
        whole image as well.
        """
        together = max(1, self.batch_size // presence.shape[1])
        parts = zip(images.split(together), presence.split(together), strict=True)
        return torch.cat([self._gradients(some, degrees) for some, degrees in parts])

    def _gradients(self, images: Tensor, presence: Tensor) -> Tensor:
        rows = images.to(self.classes.device)
        inputs = {name: value[rows] if name in IMAGE_INPUTS else value for name, value in self.inputs.items()}
        found = []
        for part in presence.split(max(1, self.batch_size), dim=1):
            degrees = part.to(rows.device).requires_grad_()  # (b, r, N)
            with torch.enable_grad():
                values = self.model(**inputs, coalitions=degrees, coalition_grad="present").coalition_values
                classes = self.classes[rows][:, None].expand(-1, values.shape[1], -1)  # (b, C) -> (b, r, C)
                self.count(math.ceil(part.shape[0] * part.shape[1] * GRADIENT_COST * (1 + classes.shape[-1])))
                found.append(presence_gradients(values.gather(2, classes), degrees).float().cpu())  # (b, r, N, C)
        return torch.cat(found, dim=1)


def presence_gradients(scores: Tensor, presence: Tensor) -> Tensor:
    """The gradient of each class's scores by the presence of the players.

    Args:
        scores: (B, C) or (B, M, C), of which each row depends on the same row of presence alone.
        presence: (B, N) or (B, M, N), from which the scores were computed. The graph is used up.

    Returns:
        (..., N, C) in the unit of the scores.

    Raises:
        UnsupportedModelError: no gradient reaches the players.
    """
    if not scores.requires_grad:
        raise UnsupportedModelError(
            "No gradient of the model's scores reaches its players: refine by coalitions, refine=256."
        )
    columns = scores.unbind(dim=-1)
    maps = [
        torch.autograd.grad(column.sum(), presence, retain_graph=number < len(columns))[0]
        for number, column in enumerate(columns, start=1)
    ]
    return torch.stack(maps, dim=-1).detach()


class PatchGame:
    """The game of one image: players are its patches, v(S) the logits with only S present.

    Args:
        model: a wrapped model.
        pixel_values: (C, H, W) or (1, C, H, W), prepared by the image processor; with NaFlex (N, 3 * p * p) or
            (1, N, 3 * p * p).
        batch_size: coalitions evaluated at a time.
        **options: further keyword arguments of the model's forward, e.g. `interpolate_pos_encoding=True`.

    Raises:
        ImageError: there is more than one image.
        ShapleyError: the model has no active adapter, or matches images with texts and got none.
    """

    def __init__(self, model: nn.Module, pixel_values: Tensor, batch_size: int = 256, **options: Any) -> None:
        self.model = model
        layer = active_layer(model)
        alone = 2 if layer.anatomy.family.patches else 3  # dimensions of an image without a batch
        self.pixel_values = pixel_values[None] if pixel_values.ndim == alone else pixel_values  # (1, C, H, W)
        if self.pixel_values.shape[0] != 1:
            raise ImageError(f"A game is about one image, got a batch of {self.pixel_values.shape[0]}.")
        self.batch_size = batch_size
        self.options = options
        self.players = layer.tiling(self.pixel_values, **options).count
        with torch.inference_mode():
            output = evaluation_view(model)(pixel_values=self.pixel_values, **options)
        if output.logits is None:
            raise ShapleyError(
                "The model matches images with texts: pass text_embeds=embed_texts(model, texts, processor), from "
                "shapadapter.explanation.api."
            )
        self.full_values: Tensor = output.logits[0].detach().float()  # (K,)
        self.null_values: Tensor = output.null_values[0].detach().float()  # (K,)
        self.attributions: Tensor = output.attributions[0].detach()  # (N, K)

    def values(self, coalitions: Tensor) -> Tensor:
        """v(S) of coalitions (M, N) bool: (M, K) fp32."""
        inputs = {"pixel_values": self.pixel_values, **self.options}
        with torch.inference_mode():
            return evaluate_coalitions(evaluation_view(self.model), inputs, coalitions[None], self.batch_size)[0]

    def value(self, presence: Tensor) -> Tensor:
        """The soft game: v(m) of players that are present to a degree, (M, N) in 0..1: (M, K) fp32, differentiable.

        At 0 and 1 it is `values`. In between, attention weighs tokens by m, and so do votes and means of tokens; where
        pixels are replaced, they are blended with what would replace them. The gradient by `presence` is what each player
        adds, there: see `shapadapter.explanation.presence`.
        """
        with torch.inference_mode(False), torch.set_grad_enabled(presence.requires_grad):
            # Clones, for tensors of an inference mode that is over cannot take part in a gradient.
            given = {"pixel_values": self.pixel_values, **self.options}
            inputs = {name: part.clone() if isinstance(part, Tensor) else part for name, part in given.items()}
            found = evaluation_view(self.model)(**inputs, coalitions=presence[None], coalition_grad=True)
            return found.coalition_values[0]

    def exact(self) -> Tensor:
        """The Shapley values by enumeration of all 2^N coalitions, (N, K) float64; at most 16 players."""
        return exact_shapley_values(self.values(all_coalitions(self.players)).cpu())

    def kernel_shap(self, evaluations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The Shapley values estimated from sampled coalitions; exact where so many evaluations pay for all 2^N - 2.

        Args:
            evaluations: M, coalitions evaluated; a multiple of 4.
            generator: source of the coalitions.

        Returns:
            estimate (N, K) float64, and its relative L2 error (K,), itself estimated by the difference of two halves.
        """
        if pays_for_all(evaluations, self.players):
            return self.exact(), torch.zeros(len(self.full_values), dtype=torch.float64, device="cpu")
        coalitions = sample_paired_coalitions(self.players, evaluations, generator)  # (M, N)
        arguments = (coalitions, self.values(coalitions).cpu(), self.null_values.cpu(), self.full_values.cpu())
        return kernel_shap(*arguments), kernel_shap_error(*arguments)
