"""`Trainer` with the Shapley objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, enable_full_determinism
from typing_extensions import override

from shapadapter.core.errors import ShapleyError
from shapadapter.core.files import report_full_disk
from shapadapter.data.collator import FAULT, TEXT_COLUMNS, ImageCollator, text_rules
from shapadapter.data.images import IMAGE_COLUMNS
from shapadapter.data.labels import LABEL_COLUMNS, READY, ROW
from shapadapter.data.rows import check_skipping, guarded, in_place, of_known
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.passes import base_of
from shapadapter.training.arguments import ShapleyTrainingArguments, check_setting, prepare_fsdp, set_head_rate
from shapadapter.training.checkpoints import Checkpoints, running_alone
from shapadapter.training.objective import LossMonitor, Objective, placed, refilled, without_repeats
from shapadapter.training.publish import Publication, without_token
from shapadapter.training.record import AttributionMaps, Record
from shapadapter.training.validation import LabelledData, as_model_reads, look_at, soft_task


class ShapleyTrainer(Trainer):
    """Fine-tune a wrapped model with task loss and Shapley loss in one stage.

    Takes what `Trainer` takes, by keyword; what `model_init` makes is a wrapped model as well. A data set with `image` and
    `label` columns, or of pairs (image, label), and `processing_class=` an image processor are enough; for a model that
    matches images with texts, `image` and `text` columns and the processor of both. Labels that are -1, -100, None or NaN
    are not known and have no say. Every step is one call of the wrapped model. The loss is

        task_loss + shapley_weight * shapley_loss [+ coalition_task_weight * coalition_task_loss]

    and its terms are logged by name, with `coalition_fit`: the share of the coalitions' values, beyond what equal shares
    for all players give, that the attributions explain; 1 for a game without interactions, less for exact Shapley
    values where patches interact. In `eval_*` all terms are measured on held-out images and coalitions.
    `compute_metrics` receives the logits. Where data set and model name their classes, labels are mapped by name.

    With an `evaluator`, each evaluation ends with `evaluator(model, dataset, collator) -> dict of numbers`, which stand
    among the `eval_*`: `evaluator=Evaluator(images=16)` and `metric_for_best_model="eval_error"` keep the checkpoint that
    explains best. Every process measures the same images of the whole set and finds the same numbers.

    Each part is an object of its own: `objective` is what the loss is made of, `monitor` what the log says of it,
    `checkpoints` writes and judges checkpoints, `record` keeps what the model card tells, `publication` uploads.

    Private methods of `Trainer` that are overridden:

    | method | why |
    | --- | --- |
    | `_get_dataloader` | the row of an image that cannot be read is named, or left out |
    | `_get_output_dir` | while a checkpoint is written, it is beside its place |
    | `_load_best_model` | a damaged checkpoint must not cost the weights that were trained |
    | `_push_from_checkpoint` | does nothing: `publication` pushes a checkpoint once it is complete |
    | `_run_epoch` | a resumed data set is told its epoch, and a finished run takes no step more |
    | `_save_checkpoint` | a checkpoint takes its name, and older ones go, when it is complete |

    Raises:
        ShapleyError: the model holds no Shapley adapter, the data set has other classes than the model, or there is a label
            that is no class. In `train`: labels are missing, or the loss is not finite.
    """

    # The terms are means over the micro-batch, so the Trainer has to divide by the accumulation steps.
    loss_is_scaled_for_ga = False
    args: ShapleyTrainingArguments
    counting = True  # whether any image of a batch is not there to fill it up

    def __init__(
        self,
        model: Any = None,
        args: ShapleyTrainingArguments | None = None,
        *,
        evaluator: Callable[[nn.Module, Any, Any], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or ShapleyTrainingArguments("trainer_output")
        if not isinstance(args, ShapleyTrainingArguments):
            raise ShapleyError(f"Expected ShapleyTrainingArguments, got {type(args).__name__}.")
        self.evaluator = evaluator
        self.checkpoints, self.monitor = Checkpoints(self), LossMonitor(self)
        self.record, self.publication = Record(self), Publication(self)
        self._first: Any = None  # model of `model_init` that the settings are checked with, until it is asked for
        given, maker = model, kwargs.get("model_init")
        if model is None and maker is not None:
            self.model_init = maker
            (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
            model = self._first = super().call_model_init()
        self.layer = active_layer(model)
        self.matching = self.layer.anatomy.kind == "matching"
        data, processor = kwargs.get("train_dataset"), kwargs.get("processing_class")
        self.labelled = None if self.matching else LabelledData(model, self.layer, args, data)
        rules, names = (None, None) if self.labelled is None else (self.labelled.rules, self.labelled.names)
        texts = text_rules(model) if self.matching else None
        own = ImageCollator(processor, texts, args.truncate_texts, args.corrupt_images, names, rules)
        kwargs["data_collator"] = kwargs.get("data_collator") or own
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = as_model_reads(kwargs.get(name), self.labelled, several=name == "eval_dataset")
        check_setting(model, self.layer, args, data is not None)
        task = soft_task(args, self.layer, self.labelled, kwargs["train_dataset"], kwargs.get("compute_loss_func"))
        if args.corrupt_images == "skip":
            check_skipping(kwargs["data_collator"])
        kwargs["compute_metrics"] = kwargs.get("compute_metrics") and of_known(kwargs["compute_metrics"])
        super().__init__(given, args, **kwargs)
        self.can_return_loss = True  # a batch of images and texts has no labels, yet a loss
        self._set_signature_columns_if_needed()
        ours = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *TEXT_COLUMNS, ROW, FAULT, READY, "coalitions"}
        self._signature_columns: Any = sorted(ours | set(self._signature_columns))
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator.state.fsdp_plugin, base_of(model), self.layer.anatomy)
        self.objective: Objective = Objective(self, task)
        self.add_callback(self.monitor)
        if args.log_attributions > 0:
            self.add_callback(AttributionMaps(self, args.log_attributions))

    def call_model_init(self, trial: Any = None) -> Any:
        """`Trainer`'s, of which every model has to be wrapped; it gets the names of the classes, too."""
        model, self._first = self._first or super().call_model_init(trial), None
        self.layer = active_layer(model)
        if self.labelled is not None:
            self.labelled.give_names(model, self.layer)
        return model

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Autocast around each step, where accelerate puts none around the model's forward."""
        if self.is_fsdp_enabled:
            # Without the cache: what it keeps of a weight is of no use once FSDP took the weight back.
            return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))
        return super().autocast_smart_context_manager(cache_enabled)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """`Trainer`'s loader; classes are found by name."""
        if not isinstance(eval_dataset, str):  # the name of one of several, which are counted as the model does
            eval_dataset = as_model_reads(eval_dataset, self.labelled, several=True)
        return super().get_eval_dataloader(self._checked(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """`Trainer`'s loader; classes are found by name."""
        return super().get_test_dataloader(self._checked(as_model_reads(test_dataset, self.labelled)))

    def _checked(self, dataset: Any) -> Any:
        """The data, or its name, once its labels are known to be some."""
        own: Any = self.eval_dataset
        if self.labelled is not None:
            self.labelled.check(own[dataset] if isinstance(dataset, str) else dataset, self.data_collator)
        return dataset

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """`Trainer`'s, with the mean number of known labels of the step's micro-batches, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.objective.known_labels(batches, device)

    def guarded(self, dataset: Any) -> Any:
        """The data set that names, or passes over, what it cannot read."""
        names = None if self.labelled is None else self.labelled.names
        return guarded(dataset, self.data_collator, self.args.corrupt_images, names)

    @override
    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._get_dataloader(self.guarded(dataset), *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective on one micro-batch; `inputs` may bring its own `coalitions` (B, M, N)."""
        inputs, shares = self.objective.prepared(inputs, model.training, num_items_in_batch)
        if inputs.get("coalitions") is None:
            inputs = {**inputs, **placed(self._draw_coalitions(inputs, model.training), self.args.device)}
        gradient = self.args.coalition_gradients or self.args.coalition_task_weight > 0
        options = {"coalition_grad": gradient and model.training, "return_attributions": False, "return_dict": True}
        # A task loss of the trainer's own may have labels that the model would misread.
        given = inputs if self.objective.soft_task is None else {**inputs, "labels": None}
        outputs: Any = model(**given, **options)
        terms = self._loss_terms(outputs, inputs)
        mode, counts = "train" if model.training else "eval", shares.images > 0 and self.counting
        self.monitor.add_batch(mode, outputs, inputs["coalitions"], terms, shares.known, counts)
        loss = self.objective.total(terms, shares, model.training)
        if model.training:
            self.monitor.add_loss(loss)
        return (loss, outputs) if return_outputs else loss

    def _draw_coalitions(self, inputs: dict[str, Any], training: bool) -> Tensor:
        """Coalitions (B, M, N) of the images of a batch; for variants of the objective to override, like the next."""
        return self.objective.coalitions(inputs, training)

    def _loss_terms(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of the loss, not yet weighted, by their names in the logs."""
        return self.objective.terms(outputs, inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean of each term since the last log."""
        if "loss" in logs and self.monitor.sums["train"]:
            weight = self.objective.weights(training=True)["shapley_loss"]
            logs = {**logs, **self.monitor.means("train"), "shapley_weight": weight}
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """`Trainer`'s training, after a look at the data, from a complete checkpoint.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint in `output_dir`, or the path of one.
            trial: as for `Trainer`.
            ignore_keys_for_eval: as for `Trainer`.

        Raises:
            CheckpointError: the checkpoint is not complete, or with True none is.
            ShapleyError: another run is writing into the same folder, or the data cannot be trained on.
        """
        if torch.is_inference_mode_enabled():
            raise ShapleyError("There are no gradients in inference mode: call train() outside of it.")
        if self.train_dataset is not None:
            look_at(self)
        with running_alone(self.args, self._get_output_dir(trial)):
            checkpoint = self.checkpoints.chosen(resume_from_checkpoint)
            with self.record.timed(checkpoint):
                result = super().train(checkpoint, trial, ignore_keys_for_eval)
            self.publication.finish()
            return result

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`Trainer`'s optimizer, in which token and head have a learning rate of their own."""
        made = self.optimizer is None  # or it is the user's
        optimizer = super().create_optimizer(model)
        if made:
            set_head_rate(optimizer, self.layer, self.args.head_learning_rate)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """`Trainer`'s step, after which a loss that is not finite stops the training with a `ShapleyError`."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.monitor.check_finite(model, inputs)
        return loss

    @override
    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last checkpoint: transformers would take one step more before it looks.
            self.control.should_training_stop = True
            return None
        # accelerate tells a data set its epoch, but not in an epoch resumed in its middle, nor on several processes.
        dataset = kwargs["train_dataloader"].dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    @override
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.checkpoints.save(lambda: super(ShapleyTrainer, self)._save_checkpoint(model, trial), folder)

    @override
    def _get_output_dir(self, trial: Any) -> str:
        unfinished = self.checkpoints.unfinished
        return super()._get_output_dir(trial) if unfinished is None else str(unfinished.parent)

    @override
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pass

    @override
    def _load_best_model(self) -> None:
        self.checkpoints.check_best()
        super()._load_best_model()
        self.record.best_loaded()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer`'s saving, with a model card; one that is not a checkpoint gets pictures of held-out images."""
        folder, pushed = Path(str(output_dir or self.args.output_dir)), self.args.push_to_hub and not _internal_call
        pictures = self.checkpoints.unfinished is None and not pushed  # which saves once more
        saving = self.checkpoints.saving_model()
        with saving, report_full_disk(folder), self.record.kept_in(folder, pictures), without_token(self.args):
            super().save_model(output_dir, _internal_call=True)
        if pushed:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card in `output_dir` with what only a person knows; it is kept for later saves."""
        self.record.write_card({name: value for name, value in locals().items() if name != "self"})

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and upload it, with its processor and card.

        Args:
            commit_message: of the one commit.
            blocking: whether to wait for the upload.
            token: that may write; by default `hub_token`, or that of `hf auth login`.
            revision: the branch, made if it is not there; by default `hub_revision`.
            private: whether a new repository is private; by default `hub_private_repo`.
            **kwargs: for `create_model_card`.

        Returns:
            What `huggingface_hub` says of the commit, or a future of it if not `blocking`; None but in the first process.
        """
        return self.publication.push(commit_message or "End of training", blocking, token, revision, private, kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of a batch; the attributions of a whole data set are not gathered."""
        inputs = self._prepare_inputs(inputs)
        rows = len(inputs["pixel_values"])
        if not self.matching:  # whose loss is the batch's as a whole
            inputs, self.counting = without_repeats(inputs, self.accelerator)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self.counting = True
        if prediction_loss_only:
            return loss.detach(), None, None
        # Similarities to the texts of a batch are nothing to be gathered over batches.
        logits, labels = None if self.matching else outputs.logits.detach(), inputs.get("labels")
        if inputs.get("readable") is not None:
            logits, labels = in_place(logits, labels, inputs["readable"])
        return loss.detach(), refilled(logits, rows), refilled(labels, rows)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """`Trainer`'s loop, with the loss's terms, the coalition fit and the evaluator's numbers among the metrics."""
        self.monitor.restart("eval")
        output = super().evaluation_loop(*args, **kwargs)
        found = self.monitor.measured()
        if self.evaluator is not None:
            dataset = (args[0] if args else kwargs["dataloader"]).dataset
            with self.compute_loss_context_manager():
                found |= self.evaluator(self.model, dataset, self.data_collator)  # type: ignore[arg-type]
        means = {f"{kwargs.get('metric_key_prefix', 'eval')}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **means})
