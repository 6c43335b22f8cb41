"""A wrapped model as a plain function of pixels: what an exporter can trace."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from shapadapter import __version__
from shapadapter.adapter.checks import check_mergeable
from shapadapter.adapter.weights import is_quantised
from shapadapter.backbone.forward import check_options
from shapadapter.core.errors import ImageError, ShapleyError, UnsupportedModelError
from shapadapter.core.phrases import argument, reason
from shapadapter.data.classes import class_names
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.passes import base_of, embed_texts, prepared_batches

OUTPUTS = ("logits", "attributions", "null_values")  # what an exported model returns: (B, K), (B, N, K) and (B, K)


LEVEL = "one forward pass"
"""What the attributions of an exported model are: a graph of forward operations has no backward pass and no coalitions."""


class Deployed(nn.Module):
    """A model in eval mode that takes pixels and returns tensors by name; texts (T, P) and options are fixed."""

    def __init__(self, model: nn.Module, options: dict[str, Any], text_embeds: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.register_buffer("text_embeds", text_embeds)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Logits (B, K), attributions (B, N, K) and null values (B, K) of images (B, C, H, W)."""
        output = self.output(pixel_values)
        return {name: getattr(output, name) for name in OUTPUTS}

    def output(self, pixel_values: Tensor) -> Any:
        """All that the model says of images (B, C, H, W)."""
        texts = {} if self.text_embeds is None else {"text_embeds": self.text_embeds}
        return self.model(pixel_values=pixel_values, return_dict=True, **texts, **self.options)


@dataclass(frozen=True)
class Job:
    """What there is to export, and what it has to compute."""

    deployed: Deployed  # the model, on the CPU, in fp32
    pixels: Tensor  # (B, C, H, W), the images on which it is traced and compared
    expected: dict[str, Tensor]  # what the user's own model says of them, by output
    labels: tuple[str, ...]  # the K names of the classes
    # Written into the file: the names of the classes, (rows, cols) of the players, (height, width) of the part of the
    # image that they tile, the level of the attributions.
    about: dict[str, str]

    def two_images(self) -> Tensor:
        """A batch to trace with, (2, C, H, W): from one image alone a tracer would conclude that there is always one."""
        return self.pixels[torch.arange(2, device="cpu") % len(self.pixels)].clone()

    def refused(self, target: str, error: BaseException) -> str:
        """What to say when a tracer gives up."""
        name = type(self.deployed.model).__name__
        return f"{name} cannot be exported to {target}: {type(error).__name__}: {reason(error).rstrip('.')}."


def prepare(
    model: nn.Module,
    function: Any,
    images: Any,
    processor: Any,
    texts: Sequence[str] | str | None,
    options: dict[str, Any],
) -> Job:
    """Copy a wrapped model, note what it says of the images, and make the copy easy to trace."""
    layer = active_layer(model)
    check_options(model, options, function)
    quantised = [name for name, parameter in model.named_parameters() if is_quantised(parameter)]
    if quantised:
        raise UnsupportedModelError(
            f"The weights {quantised[0]} are quantised, which cannot be exported. Load the base model in full precision and "
            "the adapter on it, then export."
        )
    pixels = _pixels(images, processor)
    labels, embeds = _classes(model, layer, texts, processor)
    copied = copy.deepcopy(base_of(model)).cpu().float().eval().requires_grad_(False)
    deployed = Deployed(copied, options, None if embeds is None else embeds.cpu().float())
    inner = active_layer(copied)
    tiling = inner.tiling(pixels, **options)
    with torch.no_grad():
        parts = [deployed(part) for part in pixels.split(8)]
        expected = {name: torch.cat([part[name] for part in parts]) for name in OUTPUTS}
        rule = inner.rules[str(inner.active)]
        if rule.prediction == "classifier":
            # No pixel enters v(empty): a second pass of the base model in the graph would compute it each time.
            output = deployed.output(pixels[:1])
            embeds = getattr(output, "null_embeds", None)
            empty = output.null_values if embeds is None else embeds  # (1, K or P)
            inner.rules[str(inner.active)] = replace(rule, empty=empty)
    with suppress(ShapleyError):  # where the sum of the weights does not compute the sum of the layers
        check_mergeable(copied)
        for module in copied.modules():
            if isinstance(module, LoraLayer):
                module.merge()
    about = {
        "shapadapter_version": __version__,
        "labels": json.dumps(labels),
        "players": json.dumps(tiling.players),
        "seen": json.dumps(tiling.seen),
        "prediction": rule.prediction,
        "level": LEVEL,
    }
    return Job(deployed, pixels, expected, labels, about)


def _pixels(images: Any, processor: Any) -> Tensor:
    """All images as one tensor (B, C, H, W) fp32."""
    batches = list(prepared_batches(images, processor, 32))
    if any(set(batch) != {"pixel_values"} or batch["pixel_values"].ndim != 4 for batch in batches):
        raise ImageError(
            "Only models that take pixel_values (B, C, H, W) alone can be exported; this one's processor cuts images "
            "into patches of varying grids (NaFlex)."
        )
    sizes = {tuple(batch["pixel_values"].shape[1:]) for batch in batches}
    if len(sizes) > 1:
        raise ImageError(f"An exported model takes images of one size, got {sorted(sizes)}.")
    return torch.cat([batch["pixel_values"] for batch in batches]).cpu().float()  # (B, C, H, W)


def _classes(
    model: nn.Module, layer: Any, texts: Sequence[str] | str | None, processor: Any
) -> tuple[tuple[str, ...], Tensor | None]:
    """The names of the classes, and the embeddings (T, P) of texts that take their place."""
    config: Any = model.config
    matching = layer.anatomy.kind == "matching"
    if matching and texts is None:
        raise ShapleyError(
            "The model matches images with texts, which are fixed in an exported file: pass "
            f"{argument('texts', [...])}."
        )
    if not matching and texts is not None:
        raise ShapleyError(f"{type(base_of(model)).__name__} does not match images with texts; leave texts out.")
    if texts is None:
        return class_names(config.id2label, layer.classes), None
    listed = (texts,) if isinstance(texts, str) else tuple(texts)
    return listed, embed_texts(model, listed, processor)


@contextmanager
def quiet() -> Iterator[None]:
    """Without gradients, and without what exporters print of their progress and of packages that do not matter here."""
    before = logging.root.manager.disable
    with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
