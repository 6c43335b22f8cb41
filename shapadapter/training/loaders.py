"""How the rows of data sets reach a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, set_seed
from transformers.trainer_utils import enable_full_determinism
from typing_extensions import override

from shapadapter.adapter import ShapleyLayer
from shapadapter.core.errors import ShapleyError
from shapadapter.data.classes import are_numbers, as_model_counts, named_classes
from shapadapter.data.collator import FAULT, TEXT_COLUMNS, ImageCollator
from shapadapter.data.images import IMAGE_COLUMNS, undecoded
from shapadapter.data.labels import IGNORED, LABEL_COLUMNS, PROBLEMS, READY, ROW, LabelRules, known_labels
from shapadapter.data.rows import GuardedRows, guarded, is_transformed
from shapadapter.explanation.api import base_of
from shapadapter.explanation.game import active_layer
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.validation import LABEL_REMEDY, check_labelled, labels_of, no_labels, number_remedy


def without_repeats(inputs: dict[str, Any], accelerator: Any) -> tuple[dict[str, Any], bool]:
    """This process's part of a batch of an evaluation, without what only fills it up.

    Args:
        inputs: tensors of B images.
        accelerator: accelerate's, whose data loader the batch came from.

    Returns:
        The inputs of the R images that are the data set's, in the order of `gather_for_metrics`, and whether any is.
        Where none is, one stays all the same, for every process has to take part in a step.
    """
    state, rows = accelerator.gradient_state, len(inputs["pixel_values"])
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs, True
    own = state.remainder - accelerator.process_index * rows
    kept = min(max(own, 1), rows)
    part = {
        name: value[:kept] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in inputs.items()
    }
    return part, own > 0


def refilled(values: Tensor | None, rows: int) -> Tensor | None:
    """Values (R, ...) with the last one repeated, (B, ...): a gather wants as many from every process."""
    if values is None or len(values) == rows:
        return values
    return values[torch.arange(rows, device=values.device).clamp(max=len(values) - 1)]


def label_rules(model: Any, layer: ShapleyLayer, args: ShapleyTrainingArguments) -> LabelRules:
    """What the labels of a wrapped model may be, and the columns they are in: those of `label_names` come first."""
    problem = getattr(getattr(base_of(model), "config", None), "problem_type", None)
    return LabelRules(layer.classes, problem, tuple(dict.fromkeys([*(args.label_names or ()), *LABEL_COLUMNS])))


def class_names(base: Any, adapter: Any, dataset: Any, rules: LabelRules) -> Mapping[int, str] | None:
    """The names of the model's classes, by index; those of the training data where it had none, which it then has.

    Args:
        base: the base model.
        adapter: config of the active adapter, which keeps the names for the checkpoint.
        dataset: the training data.
        rules: of the labels.

    Raises:
        ShapleyError: the data has names for another number of classes than the model, which has none.
    """
    config: Any = getattr(base, "config", None)
    names = getattr(config, "id2label", None)
    column, own = named_classes(dataset, rules.columns)
    if not own or [str(name) for name in (names or {}).values()] != [
        f"LABEL_{index}" for index in range(rules.classes)
    ]:
        return names
    if len(own) != rules.classes:
        remedy = LABEL_REMEDY if not are_numbers(own) else number_remedy(len(own))
        raise ShapleyError(
            f"The data's column {column!r} has {len(own)} classes, the model {rules.classes} without names. {remedy}"
        )
    if not are_numbers(own):
        found = dict(enumerate(own))
        config.id2label, adapter.id2label = dict(found), dict(found)
        config.label2id = {name: index for index, name in found.items()}
    return config.id2label


class LoadingTrainer(Trainer):
    """A `Trainer` whose data sets may name classes in another order than the model, be streams, and hold damaged images.

    Attributes:
        class_names: of the model, by index, if it has any.
        rules: what labels may be; None for a model that matches images with texts.
    """

    args: ShapleyTrainingArguments
    layer: ShapleyLayer
    class_names: Mapping[int, str] | None
    rules: LabelRules | None
    _first: Any = None  # the model of `model_init` that the trainer was checked with, until it is asked for

    # -- models ------------------------------------------------------------------------------------------------------

    def _first_model(self, model: Any, model_init: Any, args: ShapleyTrainingArguments) -> Any:
        """The model to check settings with: the one given, or the first that `model_init` makes."""
        if model is not None or model_init is None:
            return model
        (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
        self.model_init = model_init
        self._first = super().call_model_init()
        return self._first

    def call_model_init(self, trial: Any = None) -> Any:
        """`Trainer`'s, of which every model has to be wrapped; it gets the names of the classes, too."""
        model: Any = self._first or super().call_model_init(trial)
        self._first = None
        self.layer = active_layer(model)
        config: Any = getattr(base_of(model), "config", None)
        if self.class_names is not None and config is not None and self.rules is not None:
            config.id2label = dict(self.class_names)
            config.label2id = {name: index for index, name in self.class_names.items()}
            model.peft_config[self.layer.active].id2label = dict(self.class_names)
        return model

    # -- data --------------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """`Trainer`'s loader; classes are found by name."""
        if isinstance(eval_dataset, str):  # one of several, which have been counted as the model does
            several: Any = self.eval_dataset
            self._looked_at(several[eval_dataset])
            return super().get_eval_dataloader(eval_dataset)
        return super().get_eval_dataloader(self._looked_at(self._counted(eval_dataset, several=True)))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """`Trainer`'s loader; classes are found by name."""
        return super().get_test_dataloader(self._looked_at(self._counted(test_dataset)))

    def _counted(self, dataset: Any, several: bool = False) -> Any:
        """The data set, or several by name, with labels as the model counts classes of the same name; streams undecoded.

        Raises:
            ShapleyError: it has splits, or other classes than the model.
        """
        if isinstance(dataset, Mapping) and not hasattr(dataset, "features"):
            if several:
                return {name: self._counted(part) for name, part in dataset.items()}
            raise ShapleyError(
                f"Expected a data set, got the splits {list(dataset)}: choose one, e.g. "
                f"dataset[{next(iter(dataset), 'train')!r}]."
            )
        if self.rules is None:
            return undecoded(dataset)
        return as_model_counts(undecoded(dataset), self.class_names, LABEL_REMEDY, self.rules.columns)

    def _looked_at(self, dataset: Any) -> Any:
        """The data set, or several by name, in whose column of labels there is nothing else, as far as it can be read.

        Raises:
            ShapleyError: there is.
        """
        if isinstance(dataset, Mapping) and not hasattr(dataset, "features"):
            return {name: self._looked_at(part) for name, part in dataset.items()}
        collator: Any = self.data_collator
        if self.rules is None or type(collator) is not ImageCollator:  # which may make labels of anything
            return dataset
        found = None if is_transformed(dataset) else labels_of(dataset, self.rules.columns)
        if found is not None and len(found[1]):
            kind, known = self.rules.check(found[1], found[0])
            if self.rules.problem is None and known:
                self.rules = LabelRules(self.rules.classes, PROBLEMS[kind], self.rules.columns)
                collator.labels = collator.labels and self.rules
        return dataset

    def _look_at_data(self) -> None:
        """Refuse, before the first step, labels that are none, a vote without any, and images that cannot be used."""
        if self.train_dataset is None:
            return
        self._looked_at(self.train_dataset)
        if self.args.eval_strategy != "no":
            self._looked_at(self.eval_dataset)
        if self._votes and type(self.data_collator) is ImageCollator:
            assert self.rules is not None
            check_labelled(self.train_dataset, self.rules)
        rows = self._guarded(self.train_dataset)
        if isinstance(rows, GuardedRows) and self.args.corrupt_images == "fail":
            rows.look(self.args.process_index, self.args.world_size)

    def _checked(self, inputs: dict[str, Any], training: bool) -> dict[str, Any]:
        """A batch whose labels, where they are not of the trainer's own collator, are classes or marked as not known.

        Raises:
            ShapleyError: one is no class, or there is none and a vote is trained.
        """
        assert self.rules is not None
        labels = inputs.get("labels")
        if labels is None and training and self._votes:
            raise no_labels([name for name in inputs if name != "coalitions"], self.rules)
        if labels is None or getattr(self.data_collator, "labels", None) is not None:
            return inputs
        self.rules.check_batch(labels.cpu())
        quantities = self.rules.kind(several=False) == "quantity"
        labels = labels.float() if quantities else labels
        missing = torch.nan if labels.is_floating_point() else IGNORED
        return {**inputs, "labels": labels.where(known_labels(labels, quantities), missing)}

    @property
    def _votes(self) -> bool:
        """Whether the prediction is learned from labels alone."""
        name = self.layer.active
        return self.rules is not None and name is not None and self.layer.rules[name].prediction == "vote"

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """`Trainer`'s, with the number of labels by which each micro-batch of this step divides its task loss.

        It is their mean over the micro-batches of all processes, so that each label that is known has the same say.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rules is None or not batches:
            return batches, None
        counts = [self._labels_in(batch).to(device, torch.float32) for batch in batches if isinstance(batch, Mapping)]
        total = sum(counts, torch.zeros((), device=device))
        return batches, self.accelerator.reduce(total, reduction="mean") / len(batches)

    def _labels_in(self, inputs: Mapping[str, Any]) -> Tensor:
        """How many labels of a batch are known, (); one whose image could not be read counts, though it has no say."""
        assert self.rules is not None
        labels, readable = inputs.get("labels"), inputs.get("readable")
        if not isinstance(labels, Tensor):
            return torch.zeros((), device="cpu")
        known = known_labels(labels, self.rules.kind(several=False) == "quantity")  # (B,) or (B, K)
        if readable is not None:
            known = known | ~readable.view(-1, *[1] * (known.ndim - 1))
        return known.sum()

    def _guarded(self, dataset: Any) -> Any:
        """The data set that names, or passes over, what it cannot read."""
        return guarded(dataset, self.data_collator, self.args.corrupt_images, self.class_names)

    @override
    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._get_dataloader(self._guarded(dataset), *args, **kwargs)

    @override
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: Any = self._signature_columns
        ours = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *TEXT_COLUMNS, ROW, FAULT, READY, "coalitions"}
        self._signature_columns: Any = sorted(ours | set(known))
