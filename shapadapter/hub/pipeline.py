"""`pipeline("image-attribution", model=...)`: the likeliest classes of images, each with its map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers.pipelines.base import Pipeline
from typing_extensions import override

from shapadapter.core.errors import ShapleyError
from shapadapter.data.classes import class_names, find_classes
from shapadapter.data.download import fetch
from shapadapter.data.images import as_list, each, image_side, is_one, open_image, prepare_images
from shapadapter.data.processors import load_processor
from shapadapter.explanation.api import explain
from shapadapter.explanation.explanation import Explanation
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.presence import LEVEL
from shapadapter.hub.tasks import TASK, LoadedCheckpoint
from shapadapter.visual import overlay as laid_over
from shapadapter.visual import symmetric_limit

_FIELDS = ("attributions", "classes", "logits", "null_values", "probabilities", "images")
_WITH_ERRORS = ("standard_errors", "evaluations")  # beside them, with a backward pass
_FUNCTIONS = ("softmax", "sigmoid", "none")


class ImageAttributionPipeline(Pipeline):
    """Image classification that says why, by `pipeline("image-attribution", model=...)`.

    Args:
        model: the folder of an adapter, its name on the Hub, a `PeftModel`, or a transformers model with an adapter in
            it. A name brings base model and processor along, as `shapadapter.load` does.
        image_processor: with a model that is no name, the image processor it was trained with.
        processor: with a model that matches images with texts, the processor of both.
        **kwargs: what every pipeline takes (`device`, `batch_size`), and the arguments of a call as its defaults.
    """

    # A name brings the right ones along; transformers would take those of the base model.
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    def __init__(self, model: Any, image_processor: Any = None, processor: Any = None, **kwargs: Any) -> None:
        if isinstance(model, LoadedCheckpoint):
            model, own = model
            processor = own if processor is None and image_processor is None else processor
        active_layer(model)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ShapleyError(
                "A pipeline moves its model to a device, which accelerate's offload does not allow. Explain an offloaded "
                "model by explain(model, images, processor)."
            )
        if isinstance(image_processor, str | Path):
            image_processor = load_processor(image_processor)
        self.prepares = image_processor if processor is None else processor
        if self.prepares is None:
            raise ShapleyError(
                f"pipeline({TASK!r}) needs the image processor of a model that is no name: pass "
                "image_processor=AutoImageProcessor.from_pretrained(...)."
            )
        side, task = image_side(self.prepares), kwargs.pop("task", TASK)
        super().__init__(model=model, image_processor=side, task=task, **kwargs)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Explain one image or many.

        Args:
            inputs: an image (PIL image, path, address that begins with http:// or https://, array, content of a file) or
                a list, generator or data set of them or of rows with one, such as `KeyDataset`. An address is one of the
                public network, with at most 50 MB.
            **kwargs: `top_k`: how many classes, the likeliest first, 5 by default. `targets`: names or indices of the
                classes to explain instead. `overlay`: whether to add each map as a picture. `function_to_apply`:
                "softmax", "sigmoid" or "none", by default what the model was trained with. `candidate_labels`: for a
                model that matches images with texts, what takes the place of classes, and `hypothesis_template`: the
                text around each. `refine`: "gradient" for a backward pass of each class, too, with maps that are nearer to
                the Shapley values; 0, the default, for one forward pass. `timeout`: seconds that an image from the web may take in all, 60 by default.
                `batch_size`: images in a pass.

        Returns:
            For each image a list with a dict for each class: `label`; `score`, the probability; `logit`;
            `null_value`, the logit with no patch present; `attributions`, rows x cols nested lists of what each patch adds
            to the logit; with `overlay` a PIL image `overlay`; with `refine="gradient"` the `expected_error` of the map, as
            a share of its length (L2). One list for one image, a list of lists for a list, an
            iterator for a generator or data set.

        Raises:
            ImageError: an image cannot be read or fetched.
            ClassNotFoundError: a target the model does not have.
            ShapleyError: texts are missing, or of no use to the model.
            UnsupportedModelError: `refine="gradient"`, and the model has no gradient by the presence of its patches.
            ValueError: both `top_k` and `targets`, no such function, or another `refine`.
        """
        if not isinstance(inputs, Dataset) and not is_one(inputs):
            inputs = as_list(inputs) if hasattr(inputs, "__len__") else each(inputs)
        return super().__call__(inputs, **kwargs)

    @override
    def _sanitize_parameters(  # type: ignore[override]
        self,
        top_k: int | None = None,
        targets: Sequence[str | int] | str | int | None = None,
        function_to_apply: str | None = None,
        overlay: bool | None = None,
        candidate_labels: Sequence[str] | str | None = None,
        hypothesis_template: str | None = None,
        timeout: float | None = None,
        refine: Literal["gradient", 0] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if top_k is not None and targets is not None:
            raise ValueError(f"Pass either targets or top_k, got top_k={top_k} and targets={targets}.")
        if function_to_apply not in (None, *_FUNCTIONS):
            raise ValueError(f"function_to_apply must be one of {list(_FUNCTIONS)}, got {function_to_apply!r}.")
        if refine not in (None, 0, LEVEL):
            raise ValueError(
                f"refine must be {LEVEL!r} or 0 in a pipeline, got {refine!r}. More evaluations are spent by explain(model, "
                "images, processor, refine=256)."
            )
        labels = [candidate_labels] if isinstance(candidate_labels, str) else candidate_labels
        named = {} if labels is None else {"candidate_labels": list(labels)}
        chosen = {} if top_k is None and targets is None else {"top_k": top_k, "targets": targets}

        def given(**options: Any) -> dict[str, Any]:
            return {name: value for name, value in options.items() if value is not None}

        return (
            given(timeout=timeout),
            {**chosen, **named, **given(hypothesis_template=hypothesis_template, refine=refine)},
            {**named, **given(overlay=overlay, function_to_apply=function_to_apply)},
        )

    def preprocess(self, input_: Any, timeout: float | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """An image as pixel values (1, C, H, W)."""
        if isinstance(input_, str) and input_.lower().startswith(("http://", "https://")):
            input_ = fetch(input_, timeout)
        return prepare_images([open_image(input_)], self.prepares)

    @override
    def _forward(  # type: ignore[override]
        self,
        input_tensors: dict[str, Tensor],
        top_k: int | None = 5,
        targets: Sequence[str | int] | str | int | None = None,
        candidate_labels: list[str] | None = None,
        hypothesis_template: str = "This is a photo of {}.",
        refine: Literal["gradient", 0] = 0,
    ) -> dict[str, Tensor]:
        """The tensors of an `Explanation` of images (B, C, H, W)."""
        if self._matches != (candidate_labels is not None):
            raise ShapleyError(
                "The model matches images with texts: pass candidate_labels=[...]."
                if self._matches
                else "The model has classes of its own; candidate_labels are for one that matches images with texts."
            )
        texts = candidate_labels and [hypothesis_template.format(label) for label in candidate_labels]
        chosen = None if targets is None else find_classes(self._labels(candidate_labels), targets)
        explanation = explain(
            self.model,
            input_tensors,
            self.prepares,
            texts=texts,
            top_k=top_k,
            targets=chosen,
            batch_size=len(input_tensors["pixel_values"]),
            refine=refine,
        )
        return {name: getattr(explanation, name) for name in (*_FIELDS, *(_WITH_ERRORS if refine else ()))}

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: dict[str, Tensor],
        function_to_apply: str | None = None,
        overlay: bool = False,
        candidate_labels: list[str] | None = None,
    ) -> list[dict[str, Any]]:
        """A dict for each shown class of one image."""
        tensors: dict[str, Any] = {
            name: model_outputs[name] for name in (*_FIELDS, *_WITH_ERRORS) if name in model_outputs
        }
        one = Explanation(**tensors, labels=self._labels(candidate_labels))
        logits, own = one.logits[0], one.probabilities[0]  # (K,) each
        functions = {"softmax": logits.softmax(dim=0), "sigmoid": logits.sigmoid(), "none": logits}
        usual = logits if own.isnan().any() else own  # quantities have no probabilities
        scores = usual if function_to_apply is None else functions[function_to_apply]  # (K,)
        answers = [
            {
                "label": one.labels[index],
                "score": float(scores[index]),
                "logit": float(one.logits[0, index]),
                "null_value": float(one.null_values[0, index]),
                "attributions": one.attributions[0, :, :, column].tolist(),  # (rows, cols)
            }
            for column, index in enumerate(one.classes[0].tolist())
        ]
        if one.relative_errors is not None:
            for answer, error in zip(answers, one.relative_errors[0].tolist(), strict=True):
                answer["expected_error"] = error
        if overlay:
            # One scale for all maps of an image, so that their colours can be compared.
            limit = symmetric_limit(one.attributions.numpy())
            picture = one.images[0].numpy()  # (H, W, 3)
            for answer, index in zip(answers, one.classes[0].tolist(), strict=True):
                answer["overlay"] = Image.fromarray(laid_over(picture, one.heatmap(index), limit))
        return answers

    @property
    def _matches(self) -> bool:
        """Whether the model compares images with texts, and has no classes of its own."""
        return active_layer(self.model).anatomy.kind == "matching"

    def _labels(self, candidate_labels: list[str] | None) -> tuple[str, ...]:
        if candidate_labels is not None:
            return tuple(candidate_labels)
        config: Any = self.model.config
        return class_names(config.id2label, active_layer(self.model).classes)
