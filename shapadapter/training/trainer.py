"""`Trainer` with the Shapley objective."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput
from typing_extensions import override

from shapadapter.adapter.answer import task_loss
from shapadapter.collator import ImageCollator
from shapadapter.errors import ShapleyCollapseWarning, ShapleyError
from shapadapter.explaining import base_of
from shapadapter.game import active_layer
from shapadapter.objective import coalition_fit, shapley_loss_of_sums, warmup_weight
from shapadapter.outputs import ShapleyOutput
from shapadapter.shapley import sample_pairs
from shapadapter.texts import text_rules

from .arguments import ShapleyTrainingArguments
from .carding import CardingTrainer
from .checks import check_classes, check_game, check_setting, is_constant
from .color import mean_color
from .loading import LoadingTrainer, class_names
from .mixing import mixed
from .reading import Skipped, check_skipping, in_place, of_readable, readable_rows
from .repeats import refilled, without_repeats
from .resuming import ResumableTrainer
from .sharding import ShardedTrainer, prepare_fsdp
from .task import check_labels, soft_task
from .watching import AttributionMaps


class ShapleyTrainer(CardingTrainer, LoadingTrainer, ResumableTrainer, ShardedTrainer):
    """Fine-tune a wrapped model with task loss and Shapley loss in one stage.

    Takes what `Trainer` takes, by keyword; a ready model, not `model_init`. A data set with `image` and `label` columns
    and `processing_class=` an image processor are enough; for a model that matches images with texts, `image` and `text`
    columns and the processor of both. Every step is one call of the wrapped model. The loss is

        task_loss + shapley_weight * shapley_loss [+ coalition_task_weight * coalition_task_loss]

    and its terms are logged by name, with `coalition_fit`: the share of the coalitions' values, beyond what equal shares
    for all players give, that the attributions explain; 1 for a game without interactions, less for exact Shapley
    values where patches interact. In `eval_*` all terms are measured on held-out images and coalitions.
    `compute_metrics` receives the logits. Where data set and model name their classes, labels are mapped by name.

    With an `evaluator`, each evaluation ends with `evaluator(model, dataset, collator) -> dict of numbers`, which stand
    among the `eval_*`: `evaluator=Evaluator(images=16)` and `metric_for_best_model="eval_error"` keep the checkpoint that
    explains best. Every process measures the same images of the whole set and finds the same numbers.

    Raises:
        ShapleyError: the model holds no Shapley adapter, or the data set has other classes than the model.
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
        self.layer = active_layer(model)
        self.evaluator = evaluator
        args = args or ShapleyTrainingArguments("trainer_output")
        if not isinstance(args, ShapleyTrainingArguments):
            raise ShapleyError(f"Expected ShapleyTrainingArguments, got {type(args).__name__}.")
        self.matching = self.layer.anatomy.kind == "matching"
        rules = text_rules(model) if self.matching else None
        config: Any = getattr(base_of(model), "config", None)
        adapter = model.peft_config[self.layer.active]
        names = None if self.matching else class_names(base_of(model), adapter, kwargs.get("train_dataset"))
        self.class_names = names
        kwargs["data_collator"] = kwargs.get("data_collator") or ImageCollator(
            kwargs.get("processing_class"), rules, args.truncate_texts, args.corrupt_images, names
        )
        for name in ("train_dataset", "eval_dataset"):
            if not self.matching:
                check_classes(kwargs.get(name), self.layer.classes)
            kwargs[name] = self._counted(kwargs.get(name))
        check_setting(model, args, kwargs.get("train_dataset") is not None)
        check_game(self.layer, args, kwargs.get("train_dataset") is not None)
        problem, own_loss = getattr(config, "problem_type", None), kwargs.get("compute_loss_func")
        self.soft_task = soft_task(args, self.layer, problem, kwargs.get("train_dataset"), names, own_loss)
        if args.corrupt_images == "skip":
            check_skipping(kwargs["data_collator"])
            kwargs["compute_metrics"] = kwargs.get("compute_metrics") and of_readable(kwargs["compute_metrics"])
        super().__init__(model, args, **kwargs)
        self._skipped = Skipped()
        self._share = 1.0  # of the images of a batch that could be read
        self._counting = True  # whether any image of a batch is not there to fill it up
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator.state.fsdp_plugin, base_of(model), self.layer.anatomy)
        self.can_return_loss = True  # a batch of images and texts has no labels, yet a loss
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._draws: dict[str, int] = {"train": 0, "mix": 0, "eval": 0}
        self._drawn_at = -1
        self._collapsed = False  # of a collapse; once is enough
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
        inputs = self._prepared(inputs, model.training)
        if inputs.get("coalitions") is None:
            inputs = {**inputs, **self._with_sizes(self._draw_coalitions(inputs, model.training))}
        gradient = self.args.coalition_gradients or self.args.coalition_task_weight > 0
        options = {"coalition_grad": gradient and model.training, "return_attributions": False, "return_dict": True}
        # A task loss of the trainer's own may have labels that the model would misread.
        given = inputs if self.soft_task is None else {**inputs, "labels": None}
        outputs: Any = model(**given, **options)
        terms = self._loss_terms(outputs, inputs)
        self._note(outputs, inputs, terms, "train" if model.training else "eval")
        weights = {
            "shapley_loss": self._weight() if model.training else self.args.shapley_weight,
            "coalition_task_loss": self.args.coalition_task_weight,
        }
        loss = self._share * torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
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

    def _prepared(self, inputs: dict[str, Any], training: bool) -> dict[str, Any]:
        """The images of a batch that could be read, in training mixed if that is asked for."""
        marked, (inputs, read, images) = "readable" in inputs, readable_rows(inputs)
        # Divided by all images, a batch counts by those it still has, and one without any has no say.
        self._share = read / images if training else float(read > 0)
        if marked and self._counting:
            self._skipped.add("train" if training else "eval", read, images)
        if self.matching:
            return {"return_loss": True, **inputs}
        if self.soft_task is not None and inputs.get("labels") is not None:
            check_labels(inputs["labels"])
        alphas = (self.args.mixup_alpha, self.args.cutmix_alpha)
        if not training or max(alphas) == 0:
            return inputs
        # The 2 keeps these random numbers apart from those of the coalitions.
        key = (self.args.seed, 2, self.state.global_step, self._draw_number("mix"), self.args.process_index)
        return mixed(inputs, alphas, self.layer.tiling(**inputs), self.layer.classes, key)

    def _weight(self) -> float:
        progress = self.state.global_step / max(1, self.state.max_steps)
        return warmup_weight(self.args.shapley_weight, progress, self.args.shapley_warmup)

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
        """`Trainer`'s training, after measuring the colour of absent pixels where that is the data's mean."""
        self._measure_fill()
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

    # -- evaluation and logs -----------------------------------------------------------------------------------------

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
        readable, size = inputs.get("readable"), len(outputs.logits)
        self._add("eval", "loss", size * loss, size)  # which counts images alike, whatever their batch
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
        found = self._gather("eval")
        if self.evaluator is not None:
            model: Any = self.model
            dataset = (args[0] if args else kwargs["dataloader"]).dataset
            with self.compute_loss_context_manager():
                found |= self.evaluator(model, dataset, self.data_collator)
        means = {f"{prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean of each term since the last log."""
        if "loss" in logs and self._sums["train"]:
            means = self._gather("train")
            if "logit_spread" in means:
                self._warn_if_collapsed(means.pop("logit_spread"))
            logs = {**logs, **means, "shapley_weight": self._weight()}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def _note(self, outputs: Any, inputs: dict[str, Any], terms: dict[str, Tensor], mode: str) -> None:
        # Sums stay on the device and are read at the next log: reading one here would halt the device every step.
        size = outputs.logits.shape[0]
        for name, term in terms.items():
            self._add(mode, name, size * term, size)
        arguments = (inputs["coalitions"], outputs.coalition_values, outputs.null_values, outputs.logits)
        self._add(mode, "coalition_fit", *coalition_fit(outputs.coalition_attributions, *arguments))
        if mode == "train" and not self.matching:
            # One image has no spread; its weight is 0, so that all processes sum up the same names.
            counted = size if size > 1 else 0
            self._add(mode, "logit_spread", counted * outputs.logits.float().std(dim=0, correction=0).mean(), counted)

    def _add(self, mode: str, name: str, part: Tensor, whole: Tensor | float) -> None:
        # Filled in on the device: a number that is brought there would halt it, too.
        whole = whole if isinstance(whole, Tensor) else part.new_full((), whole, dtype=torch.float32)
        added = torch.stack([part.detach().float(), whole.detach().float()])  # (2,)
        added = added * float(self._share > 0 and self._counting)
        sums = self._sums[mode]
        sums[name] = sums[name] + added if name in sums else added

    def _gather(self, mode: str) -> dict[str, float]:
        """Part / whole of each term over batches and processes, where defined, and a fresh start."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        names = sorted(sums)
        parts = self.accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum").tolist()
        found = {name: part / whole for name, (part, whole) in zip(names, parts, strict=True) if whole > 0}
        skips = self.args.corrupt_images == "skip"
        return {**found, "skipped_images": self._skipped.total(mode, self.accelerator)} if skips else found

    def _warn_if_collapsed(self, spread: float) -> None:
        warmed_up = self.state.global_step >= self.args.shapley_warmup * self.state.max_steps
        if self._collapsed or not (self.args.shapley_weight > 0 and warmed_up):
            return
        self._collapsed = is_constant(spread, self.layer.classes)
        if self._collapsed:
            warnings.warn(
                f"The model says nearly the same about every image: its logits vary by {spread:.1e} between images. "
                "The Shapley loss has a trivial minimum there. Train the task longer before it sets in (shapley_warmup, "
                f"now {self.args.shapley_warmup}), lower shapley_weight (now {self.args.shapley_weight}) or the "
                "learning rate.",
                ShapleyCollapseWarning,
                stacklevel=2,
            )
