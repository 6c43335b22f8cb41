"""Batches of images through one forward pass of a wrapped model: what goes in, what comes out, and what that says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from shapadapter.adapter.tuning import end_of_gradients
from shapadapter.backbone import Tiling, configured_size, evaluation_view, normalised
from shapadapter.core.errors import ImageError, ShapleyError, UnsupportedModelError
from shapadapter.core.phrases import argument
from shapadapter.data.classes import class_names, find_classes
from shapadapter.data.collator import prepare_texts, text_rules
from shapadapter.data.images import IMAGE_INPUTS, each, image_side, open_image, prepare_opened, unpatchify, unprocess
from shapadapter.data.processors import frames
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.game import active_layer


@dataclass(frozen=True)
class Predicted:
    """A batch of images after its forward pass."""

    inputs: dict[str, Any]  # the keyword arguments of that pass, texts and options among them
    output: Any  # what the model returned
    tiling: Tiling  # how the players lie on the images
    seen: Tensor  # (B, H, W, 3) uint8, the part of the images that the players tile
    classes: Tensor  # (B, C) int64, those to show
    labels: tuple[str, ...]  # of the K classes
    likelihood: str  # how scores become probabilities: "softmax", "sigmoid", or "none" where they are quantities
    frames: Tensor | None = None  # (B, 6), of `shapadapter.data.processors.frames`; None of prepared images
    presence: Tensor | None = (
        None  # (B, N) ones, by which `output.logits` can be differentiated, if that was asked for
    )


def predictions(
    model: nn.Module,
    images: Any,
    processor: Any | None,
    texts: Sequence[str] | str | None,
    top_k: int | None,
    targets: Sequence[str | int] | str | int | None,
    batch_size: int,
    options: dict[str, Any],
    graph: Literal["try"] | bool = False,
) -> Iterator[Predicted]:
    """Prepare images, check what is asked of them, and run one forward pass on each batch; arguments as `explain`.

    With `graph`, the pass keeps what the gradient by the players' presence takes; to "try" it is to do without where the
    model does not allow it. Not for inference mode.
    """
    layer = active_layer(model)
    if top_k is not None and (targets is not None or top_k < 1):
        raise ValueError(f"Pass either targets or a top_k of at least 1, got top_k={top_k} and targets={targets}.")
    wanted: Any = targets
    wanted = wanted.tolist() if hasattr(wanted, "tolist") else wanted
    if batch_size < 1 or (hasattr(wanted, "__len__") and not len(wanted)):
        raise ValueError(f"Expected a batch_size of at least 1 and some targets, got {batch_size} and {targets}.")
    config: Any = model.config
    if layer.anatomy.kind == "matching":
        if texts is None:
            raise ShapleyError(f"The model matches images with texts: pass {argument('texts', [...])}.")
        labels = (texts,) if isinstance(texts, str) else tuple(texts)
        options = {**options, "text_embeds": embed_texts(model, labels, processor)}
    elif texts is not None:
        name = type(base_of(model)).__name__
        raise ShapleyError(f"{name} does not match images with texts; leave texts out.")
    else:
        labels = class_names(config.id2label, layer.classes)
    chosen = range(len(labels)) if targets is None else find_classes(labels, targets)
    for opened, inputs in _batches(images, processor, batch_size):
        tiling = layer.tiling(**inputs, **options)
        seen = as_pictures(_seen(inputs["pixel_values"], tiling), processor)
        given = {**inputs_on(inputs, model), "return_dict": True, **options}
        if graph:
            # Clones, for tensors of an inference mode that is over cannot take part in a gradient.
            given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
        output, presence = _pass(model, given, tiling.count, graph)
        if top_k is None:
            kept = torch.tensor(chosen, device=output.logits.device).expand(len(output.logits), -1)  # (B, C)
        else:
            kept = output.logits.detach().topk(min(top_k, output.logits.shape[1]), dim=1).indices  # (B, C)
        places = frames(opened, processor, (seen.shape[1], seen.shape[2])) if opened else None
        yield Predicted(given, output, tiling, seen, kept, labels, _likelihood(model), places, presence)


def _pass(
    model: nn.Module, given: dict[str, Any], players: int, graph: Literal["try"] | bool
) -> tuple[Any, Tensor | None]:
    """What the model returns and, if it keeps the graph, the presence (B, N) of the players, all ones."""
    if graph:
        presence = torch.ones(
            len(given["pixel_values"]), players, device=given["pixel_values"].device, requires_grad=True
        )
        try:
            if path := end_of_gradients(model):
                raise UnsupportedModelError(
                    f"The weights of {path} are quantised in a way that passes on no gradient here, so that the gradient by "
                    "presence would lack all that lies before them. Refine by coalitions, refine=256, or load the base in another way."
                )
            with torch.enable_grad():
                output = _forward(model, {**given, "presence": presence})
            if graph != "try" or output.logits.requires_grad:
                return output, presence
        except UnsupportedModelError:
            if graph != "try":
                raise
    return _forward(model, given), None


def _forward(model: nn.Module, given: dict[str, Any]) -> Any:
    """One pass; says what to do about images of a size that the model does not take."""
    try:
        return model(**given)
    except ShapleyError:
        raise
    except ValueError as error:
        size = tuple(given["pixel_values"].shape[2:])
        if configured_size(base_of(model)) in (None, size):
            raise
        raise ImageError(
            f"The model takes no images of {' x '.join(map(str, size))} pixels: {error} Use an image processor that resizes."
        ) from error


def _likelihood(model: nn.Module) -> str:
    config: Any = model.config
    if hasattr(model, "logit_bias") or config.problem_type == "multi_label_classification":
        return "sigmoid"
    single = config.problem_type is None and config.num_labels == 1
    return "none" if single or config.problem_type == "regression" else "softmax"


# -- what the model is given -------------------------------------------------------------------------------------------


def embed_texts(model: nn.Module, texts: Sequence[str], processor: Any) -> Tensor:
    """Normalized embeddings (T, P) of texts: the directions along which a matching model's attributions are read."""
    inputs = prepare_texts(texts, processor, text_rules(model))
    device, base = device_of(model), base_of(evaluation_view(model))
    with torch.no_grad():
        return normalised(base.get_text_features(**{name: value.to(device) for name, value in inputs.items()}))


def base_of(model: nn.Module) -> Any:
    """The model inside PEFT's wrapper, or itself where it is without."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def inputs_on(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The inputs on the device of `model`, pixels in its precision."""
    placed = {name: value.to(device_of(model)) for name, value in inputs.items()}
    return {**placed, "pixel_values": placed["pixel_values"].to(next(model.parameters()).dtype)}


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: where its weights are or, if accelerate offloads them, where it brings them."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    for hook in (inner for outer in hooks for inner in getattr(outer, "hooks", [outer])):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    raise ShapleyError(
        f"{type(base_of(model)).__name__} has no weights, they are on the meta device: load it, for instance by "
        "shapadapter.load(adapter)."
    )


def prepared_batches(images: Any, processor: Any | None, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """`pixel_values` (b, C, H, W) and what goes with them, batch by batch."""
    return (inputs for _, inputs in _batches(images, processor, batch_size))


def _batches(images: Any, processor: Any | None, batch_size: int) -> Iterator[tuple[list[Any], dict[str, Tensor]]]:
    """Opened images, none where they come prepared, and `pixel_values` (b, C, H, W) with what goes with them."""
    if isinstance(images, Mapping) and "pixel_values" in images:
        known = {name: images[name] for name in IMAGE_INPUTS if name in images}
        if not isinstance(known.get("pixel_values"), Tensor) or not len(known["pixel_values"]):
            raise ImageError(f"Expected pixel_values of at least one image as a tensor, got {sorted(images)}.")
        if not known["pixel_values"].is_floating_point():
            raise ImageError(
                f"Expected pixel_values as the image processor makes them, got {known['pixel_values'].dtype}. Pass the images "
                "themselves with processor=..."
            )
        for start in range(0, len(known["pixel_values"]), batch_size):
            yield [], {name: value[start : start + batch_size] for name, value in known.items()}
        return
    listed = each(images)
    part = list(islice(listed, batch_size))
    if not part:
        raise ImageError("Expected at least one image, got none.")
    while part:
        opened = [] if processor is None else [open_image(image) for image in part]
        yield opened, prepare_opened(opened, processor) if opened else {"pixel_values": _stack(part)}
        part = list(islice(listed, batch_size))


def _stack(images: list[Tensor]) -> Tensor:
    if not all(isinstance(image, Tensor) and image.is_floating_point() for image in images):
        came = sorted({str(getattr(image, "dtype", type(image).__name__)) for image in images})
        raise ImageError(f"Without a processor expected prepared tensors (C, H, W), got {came}. Pass processor=...")
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise ImageError(f"Expected tensors (C, H, W) of one size, got {sorted(shapes)}.")
    return torch.stack(images)  # (B, C, H, W)


# -- explanations ------------------------------------------------------------------------------------------------------


def _seen(pixels: Tensor, tiling: Tiling) -> Tensor:
    """The part of the pixels (B, C, H, W) that the players tile; what lies beyond the last patch is not seen."""
    if pixels.ndim == 3:
        return unpatchify(pixels, tiling.cells)
    return pixels[..., : tiling.seen[0], : tiling.seen[1]]


def as_pictures(pixels: Tensor, processor: Any | None) -> Tensor:
    """Undo the processor's arithmetic, (B, C, H, W) to (B, H, W, 3) uint8; without one, stretch each image."""
    pixels = pixels.float().cpu()[:, :3]
    if processor is None:
        low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
        scaled = (pixels - low) / (high - low).clamp(min=1e-12) * 255
    else:
        scaled = unprocess(pixels, image_side(processor))
    scaled = scaled.round().clamp(0, 255).to(torch.uint8)  # (B, C, H, W)
    return scaled.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()  # (B, H, W, 3)


def one_pass(batch: Predicted) -> Explanation:
    """What the model itself says about a batch."""
    output, kept = batch.output, batch.classes
    index = kept[:, None].expand(-1, output.attributions.shape[1], -1)  # (B, N, C)
    maps = output.attributions.detach().gather(2, index)  # (B, N, C)
    attributions = maps.unflatten(1, batch.tiling.players)  # (B, rows, cols, C)
    logits = output.logits.detach().float()
    probabilities = {
        "softmax": logits.softmax(dim=1),
        "sigmoid": logits.sigmoid(),
        "none": torch.full_like(logits, torch.nan),
    }[batch.likelihood]  # (B, K)
    return Explanation(
        attributions=attributions.float().cpu().clone(),
        classes=kept.cpu().clone(),
        logits=logits.cpu().clone(),
        null_values=output.null_values.float().cpu().clone(),
        probabilities=probabilities.cpu().clone(),
        labels=batch.labels,
        images=batch.seen,
        evaluations=torch.zeros(len(kept), dtype=torch.int64, device="cpu"),
        frames=batch.frames,
    )


def join(parts: Sequence[Explanation]) -> Explanation:
    """One explanation of the images of several, of one size."""
    sizes = sorted({tuple(part.images.shape[1:3]) for part in parts})
    if len(sizes) > 1:
        raise ImageError(f"Images of different sizes {sizes} cannot share one explanation; explain them separately.")
    names = [field.name for field in fields(Explanation) if isinstance(getattr(parts[0], field.name), Tensor)]
    together: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **together)
