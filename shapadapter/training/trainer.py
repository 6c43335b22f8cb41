"""`Trainer` with the Shapley objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from typing_extensions import override

from shapadapter.adapter.answer import ShapleyOutput, task_loss
from shapadapter.backbone import Anatomy, original_name
from shapadapter.core.errors import ShapleyError
from shapadapter.core.losses import shapley_loss_of_sums
from shapadapter.core.shapley import sample_pairs
from shapadapter.data.collator import ImageCollator
from shapadapter.data.rows import Skipped, check_skipping, in_place, of_known, readable_rows
from shapadapter.data.texts import text_rules
from shapadapter.explanation.api import base_of
from shapadapter.explanation.game import active_layer
from shapadapter.training.arguments import ShapleyTrainingArguments
from shapadapter.training.callbacks import AttributionMaps
from shapadapter.training.loaders import LoadingTrainer, class_names, label_rules, refilled, without_repeats
from shapadapter.training.mixup import mixed
from shapadapter.training.record import RecordingTrainer
from shapadapter.training.resume import ResumableTrainer
from shapadapter.training.task_loss import check_labels, soft_task
from shapadapter.training.terms import TASK, FiniteTrainer, MeasuringTrainer
from shapadapter.training.validation import check_classes, check_game, check_setting, mean_color, warn_of_crops


def prepare_fsdp(plugin: Any, model: nn.Module, anatomy: Anatomy) -> None:
    """Choose FSDP's units and precision as a wrapped model needs them.

    Transformer blocks become units where the user named no others. By default accelerate takes the `_no_split_modules` of
    transformers. For vision models the embeddings are among them, whose weights it then splits a second time, as the
    model's input embeddings, and fails (accelerate 1.15). Token and head belong to the root: they are used in hooks on
    the model's forward, in which the root's weights are gathered.

    Mixed precision is left to autocast, as without FSDP. FSDP2's own policy would round the head's weights and all that
    the model returns, and attributions would no longer sum to the logits.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`, changed in place.
        model: the base model.
        anatomy: its parts.
    """
    if anatomy.blocks and getattr(plugin, "transformer_cls_names_to_wrap", None) is None:
        blocks = {type(module) for name, module in model.named_modules() if original_name(name) in anatomy.blocks}
        plugin.transformer_cls_names_to_wrap = sorted(block.__name__ for block in blocks)
    if plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy()


class ShardedTrainer(Trainer):
    """`Trainer` that computes in mixed precision by autocast under FSDP, too."""

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast around each step, where accelerate puts none around the model's forward."""
        # Without the cache: what it keeps of a weight is of no use once FSDP has given the weight back.
        if self.is_fsdp_enabled:
            return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))
        return super().autocast_smart_context_manager(cache_enabled)


class ShapleyTrainer(
    MeasuringTrainer, RecordingTrainer, LoadingTrainer, ResumableTrainer, FiniteTrainer, ShardedTrainer
):
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

    Raises:
        ShapleyError: the model holds no Shapley adapter, the data set has other classes than the model, or there is a label
            that is no class. In `train`: labels are missing, or the loss is not finite.
    """

    # The terms are means over the micro-batch, so the Trainer has to divide by the accumulation steps.
    loss_is_scaled_for_ga = False
    args: ShapleyTrainingArguments

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
        given, model = model, self._first_model(model, kwargs.get("model_init"), args)
        self.layer = active_layer(model)
        self.evaluator = evaluator
        self.matching = self.layer.anatomy.kind == "matching"
        rules = text_rules(model) if self.matching else None
        config: Any = getattr(base_of(model), "config", None)
        adapter = model.peft_config[self.layer.active]
        self.rules = label_rules(model, self.layer, args) if not self.matching else None
        found = kwargs.get("train_dataset")
        names = class_names(base_of(model), adapter, found, self.rules) if self.rules is not None else None
        self.class_names = names
        kwargs["data_collator"] = kwargs.get("data_collator") or ImageCollator(
            kwargs.get("processing_class"), rules, args.truncate_texts, args.corrupt_images, names, self.rules
        )
        for name in ("train_dataset", "eval_dataset"):
            if not self.matching:
                check_classes(kwargs.get(name), self.layer.classes)
            kwargs[name] = self._counted(kwargs.get(name), several=name == "eval_dataset")
        check_setting(model, args, kwargs.get("train_dataset") is not None)
        check_game(self.layer, args, kwargs.get("train_dataset") is not None)
        problem, own_loss = getattr(config, "problem_type", None), kwargs.get("compute_loss_func")
        self.soft_task = soft_task(args, self.layer, problem, kwargs.get("train_dataset"), names, own_loss)
        if args.corrupt_images == "skip":
            check_skipping(kwargs["data_collator"])
        kwargs["compute_metrics"] = kwargs.get("compute_metrics") and of_known(kwargs["compute_metrics"])
        super().__init__(given, args, **kwargs)
        self._skipped = Skipped()
        self._share = 1.0  # of the images of a batch that could be read
        self._say: Tensor | float = 1.0  # of the batch's labels in the task loss of its step, 1 on average
        self._known: Tensor | float = 0.0  # how many there are, each of several for itself
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator.state.fsdp_plugin, base_of(model), self.layer.anatomy)
        self.can_return_loss = True  # a batch of images and texts has no labels, yet a loss
        self._draws: dict[str, int] = {"train": 0, "mix": 0, "eval": 0}
        self._drawn_at = -1
        if args.log_attributions > 0:
            self.add_callback(AttributionMaps(self, args.log_attributions))

    # -- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective on one micro-batch; `inputs` may bring its own `coalitions` (B, M, N)."""
        inputs = self._prepared(inputs, model.training, num_items_in_batch)
        if inputs.get("coalitions") is None:
            inputs = {**inputs, **self._with_sizes(self._draw_coalitions(inputs, model.training))}
        gradient = self.args.coalition_gradients or self.args.coalition_task_weight > 0
        options = {"coalition_grad": gradient and model.training, "return_attributions": False, "return_dict": True}
        # A task loss of the trainer's own may have labels that the model would misread.
        given = inputs if self.soft_task is None else {**inputs, "labels": None}
        outputs: Any = model(**given, **options)
        terms = self._loss_terms(outputs, inputs)
        self._note(outputs, inputs, terms, "train" if model.training else "eval")
        weights = self._weights(model.training)
        says = {name: self._say if name in TASK else self._share for name in terms}
        loss = torch.stack([says[name] * weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        if model.training:
            self.note_finite(loss)
        return (loss, outputs) if return_outputs else loss

    def _loss_terms(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of the loss, not yet weighted, by their names in the logs."""
        labels, values = inputs.get("labels"), outputs.coalition_values
        targets = values if self.args.coalition_gradients else values.detach()
        sums, yardstick = outputs.coalition_attributions, outputs.expected_square  # (B, M, K), (B,)
        terms = {"shapley_loss": shapley_loss_of_sums(sums, yardstick, targets, outputs.null_values)}
        if labels is None:
            return terms if outputs.loss is None else {**terms, "task_loss": outputs.loss}
        terms["task_loss"] = self._task_loss(outputs, labels)
        if self.args.coalition_task_weight > 0:
            flat = values.flatten(0, 1)  # (B * M, K)
            repeated = labels.repeat_interleave(values.shape[1], dim=0)  # (B * M,) or (B * M, K)
            terms["coalition_task_loss"] = self._task_loss(ShapleyOutput(logits=flat), repeated)
        return terms

    def _task_loss(self, outputs: Any, labels: Tensor) -> Tensor:
        if self.compute_loss_func is not None:
            # Without the number of items: the Trainer divides by the accumulation steps, see `loss_is_scaled_for_ga`.
            return self.compute_loss_func(outputs, labels, num_items_in_batch=None)
        if self.soft_task is not None:
            return self.soft_task(outputs.logits, labels)
        if outputs.loss is not None:
            return outputs.loss
        return task_loss(self.accelerator.unwrap_model(self.model), labels, outputs.logits)

    def _prepared(
        self, inputs: dict[str, Any], training: bool, labels_in_batch: Tensor | int | None
    ) -> dict[str, Any]:
        """The images of a batch that could be read, in training mixed if that is asked for.

        Args:
            inputs: the batch.
            training: whether it is trained on.
            labels_in_batch: the mean of the batches of this step; None for this one's.
        """
        marked, (inputs, read, images) = "readable" in inputs, readable_rows(inputs)
        # Divided by all images, a batch counts by those it still has, and one without any has no say.
        self._say = self._share = read / images if training else float(read > 0)
        self._known = float(read)
        if marked and self._counting:
            self._skipped.add("train" if training else "eval", read, images)
        if self.matching:
            return {"return_loss": True, **inputs}
        inputs = self._checked(inputs, training)
        if inputs.get("labels") is not None:
            if self.soft_task is not None:
                check_labels(inputs["labels"])
            self._known = (read > 0) * self._labels_in(inputs)
            if training and self.compute_loss_func is None:
                whole = self._known + (images - read) * inputs["labels"][0].numel()
                whole = whole if labels_in_batch is None else labels_in_batch
                self._say = self._known / torch.as_tensor(whole, device=self._known.device).clamp(min=1e-3)
        alphas = (self.args.mixup_alpha, self.args.cutmix_alpha)
        if not training or max(alphas) == 0:
            return inputs
        # The 2 keeps these random numbers apart from those of the coalitions.
        key = (self.args.seed, 2, self.state.global_step, self._draw_number("mix"), self.args.process_index)
        return mixed(inputs, alphas, self.layer.tiling(**inputs), self.layer.classes, key)

    def _draw_coalitions(self, inputs: dict[str, Any], training: bool) -> Tensor:
        """Coalitions (B, 2 * pairs, N) that depend on seed, step, micro-step and rank alone: a resumed run repeats them."""
        number = self._draw_number("train" if training else "eval")
        key = [self.args.seed, int(training), self.state.global_step * training, number, self.args.process_index]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        images = inputs["pixel_values"]
        players = self.layer.tiling(**inputs).count
        return sample_pairs(images.shape[0], players, self.args.coalition_pairs, generator)

    def _draw_number(self, kind: str) -> int:
        """How many draws of a kind came before: of "train" and "mix" in this step, of "eval" in this evaluation."""
        if kind != "eval" and self._drawn_at != self.state.global_step:
            self._drawn_at = self.state.global_step
            self._draws |= {"train": 0, "mix": 0}
        self._draws[kind] += 1
        return self._draws[kind] - 1

    def _with_sizes(self, coalitions: Tensor) -> dict[str, Any]:
        """Coalitions (B, M, N) on the device, and their sizes where these are the same for all images.

        They are counted before they go there, so that the model need not ask the device.
        """
        sizes = coalitions.sum(dim=2)  # (B, M)
        same = bool((sizes == sizes[:1]).all())
        placed = coalitions.to(self.args.device, non_blocking=True)
        return {"coalitions": placed, **({"coalition_sizes": tuple(sizes[0].tolist())} if same else {})}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s training, after looking at the data, and measuring the colour of absent pixels where that is its mean."""
        if torch.is_inference_mode_enabled():
            raise ShapleyError(
                "There is no training in inference mode, which keeps no gradients: call train() outside of it."
            )
        self._look_at_data()
        self._measure_fill()
        if self.is_world_process_zero():
            warn_of_crops(self.train_dataset, self.data_collator)
        return super().train(*args, **kwargs)

    @override
    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # With `auto_find_batch_size` there are several attempts, and what one left behind is not the next one's.
        self._sums["train"], self._drawn_at, self._skipped = {}, -1, Skipped()
        return super()._inner_training_loop(*args, **kwargs)

    def _measure_fill(self) -> None:
        name = self.layer.active
        if name is None or self.train_dataset is None:
            return
        config = self.accelerator.unwrap_model(self.model).peft_config[name]
        if config.removal != "pixels" or config.fill == "learned" or config.fill_color is not None:
            return
        config.fill_color = mean_color(self._guarded(self.train_dataset), self.data_collator)
        self.layer.read_rules(name, config)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`Trainer`'s optimiser, in which token and head have a learning rate of their own."""
        if self.optimizer is not None:  # the user's
            return self.optimizer
        optimizer = super().create_optimizer(model)
        own = {id(parameter) for parameter in self.layer.parameters()}
        for group in list(optimizer.param_groups):
            head = [parameter for parameter in group["params"] if id(parameter) in own]
            rest = [parameter for parameter in group["params"] if id(parameter) not in own]
            if head and rest:
                group["params"] = rest
                optimizer.add_param_group({**group, "params": head, "lr": self.args.head_learning_rate})
            elif head:
                group["lr"] = self.args.head_learning_rate
        return optimizer

    # -- evaluation -----------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of a batch; the attributions of a whole data set are not gathered."""
        inputs = self._prepare_inputs(inputs)
        rows = len(inputs["pixel_values"])
        if not self.matching:  # whose loss is the batch's as a whole
            inputs, self._counting = without_repeats(inputs, self.accelerator)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        readable = inputs.get("readable")
        self._counting = True
        if prediction_loss_only:
            return loss.detach(), None, None
        # Similarities to the texts of a batch are nothing to be gathered over batches.
        logits, labels = None if self.matching else outputs.logits.detach(), inputs.get("labels")
        logits, labels = (logits, labels) if readable is None else in_place(logits, labels, readable)
        return loss.detach(), refilled(logits, rows), refilled(labels, rows)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """`Trainer`'s loop, with the loss's terms, the coalition fit and the evaluator's numbers among the metrics."""
        self._draws["eval"], self._sums["eval"] = 0, {}
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = self._measured()
        if self.evaluator is not None:
            model: Any = self.model
            dataset = (args[0] if args else kwargs["dataloader"]).dataset
            with self.compute_loss_context_manager():
                found |= self.evaluator(model, dataset, self.data_collator)
        means = {f"{prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **means})
