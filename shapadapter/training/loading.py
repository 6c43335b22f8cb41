"""How the rows of data sets reach a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer
from typing_extensions import override

from shapadapter.collator import FAULT, IMAGE_COLUMNS, ROW, TEXT_COLUMNS
from shapadapter.images import undecoded
from shapadapter.labels import LABEL_COLUMNS, as_model_counts, names_for_numbers

from .arguments import ShapleyTrainingArguments
from .checks import LABEL_REMEDY
from .reading import guarded


def class_names(base: Any, adapter: Any, dataset: Any) -> Mapping[int, str] | None:
    """The names of the model's classes, by index; those of the training data where it had none, which it then has.

    Args:
        base: the base model.
        adapter: config of the active adapter, which keeps the names for the checkpoint.
        dataset: the training data.
    """
    config: Any = getattr(base, "config", None)
    found = names_for_numbers(dataset, getattr(config, "id2label", None))
    if found is not None:
        config.id2label, adapter.id2label = dict(found), dict(found)
        config.label2id = {name: index for index, name in found.items()}
    return getattr(config, "id2label", None)


class LoadingTrainer(Trainer):
    """A `Trainer` whose data sets may name classes in another order than the model, be streams, and hold damaged images.

    Attributes:
        class_names: of the model, by index, if it has any.
    """

    args: ShapleyTrainingArguments
    class_names: Mapping[int, str] | None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """`Trainer`'s loader; classes are found by name."""
        return super().get_eval_dataloader(self._counted(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """`Trainer`'s loader; classes are found by name."""
        return super().get_test_dataloader(self._counted(test_dataset))

    def _counted(self, dataset: Any) -> Any:
        """The data set, or several by name, with labels as the model counts classes of the same name; streams undecoded."""
        if isinstance(dataset, Mapping) and not hasattr(dataset, "features"):
            return {name: self._counted(part) for name, part in dataset.items()}
        return as_model_counts(undecoded(dataset), self.class_names, LABEL_REMEDY)

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
        ours = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *TEXT_COLUMNS, ROW, FAULT, "coalitions"}
        self._signature_columns: Any = sorted(ours | set(known))
