"""What the tests of several processes run in each of them."""

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather_object
from test_finetune_example import train_on_given_coalitions
from test_trainer import PLAYERS, CoalitionCollator, Processor, images, trained, trainer_of, wrapped

from shapadapter import CheckpointError, explain
from shapadapter.core.shapley import sample_pairs


def pretend_accelerators() -> None:
    """Let accelerate take these CPU processes for GPUs': it offers FSDP and DeepSpeed to no others."""
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    PartialState.wait_for_everyone = lambda self: dist.barrier()


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    """The trained weights, gathered from all processes."""
    if trainer.is_deepspeed_enabled:
        import deepspeed

        parameters = [parameter for parameter in trainer.model.parameters() if hasattr(parameter, "ds_id")]
        with deepspeed.zero.GatheredParameters(parameters):
            return trained(trainer.model)
    return {name: getattr(v, "full_tensor", v.clone)() for name, v in trained(trainer.model).items()}


def accuracy(evaluation) -> dict[str, float]:
    logits, labels = evaluation
    return {"accuracy": float((logits.argmax(axis=-1) == labels).mean()), "seen": len(labels)}


def evaluate(folder, batch_size=2, count=7) -> dict[str, float]:
    """Metrics of images that no number of processes shares evenly."""
    pairs = sample_pairs(count, PLAYERS, 1, torch.Generator().manual_seed(3), sizes=torch.tensor([5]))
    trainer = trainer_of(
        folder,
        held_out=images(count, labels=[0, 1, 2, 2, 2, 0, 1], coalitions=pairs.tolist()),
        data_collator=CoalitionCollator(Processor(size={"height": 32, "width": 32})),
        compute_metrics=accuracy,
        per_device_eval_batch_size=batch_size,
    )
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in METRICS} | {"processes": trainer.args.world_size}


def failing_save(folder) -> dict:
    """What each process says where the main one cannot write a checkpoint, and what their state calls the best one."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "shapley_loss", "greater_is_better": False}
    trainer = trainer_of(
        folder, max_steps=1, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, **best
    )
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained = lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No room"))
    try:
        trainer.train()
        said = "nothing"
    except CheckpointError as error:
        said = str(error)
    return {"said": gather_object([said]), "best": gather_object([trainer.state.best_model_checkpoint])}


METRICS = ("loss", "task_loss", "shapley_loss", "coalition_fit", "accuracy", "seen")


def weights(folder, **options):
    """Three steps on coalitions that the rows bring, saved: the weights that one process reaches alone."""
    trainer = train_on_given_coalitions(folder, 4, **options)
    found = whole_weights(trainer)
    trainer.save_model(folder + "/saved")
    return trainer, found


def fsdp(folder) -> dict:
    """All that has to hold under FSDP."""
    trainer, reached = weights(folder)
    found = {"weights": reached, "type": str(trainer.accelerator.distributed_type)}
    found["units"] = sorted({type(m).__name__ for m in trainer.model.modules() if type(m).__name__.startswith("FSDP")})
    # One process draws half of the players, so that a coalition and its complement have one size: as many passes.
    sizes = torch.tensor([PLAYERS // 2 if trainer.is_world_process_zero() else 5])
    drawn = sample_pairs(2, PLAYERS, 1, torch.Generator().manual_seed(0), sizes=sizes)
    trainer._draw_coalitions = lambda inputs, training: drawn
    trainer.model.train()
    trainer.compute_loss(trainer.model, {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2).long()})
    found["explained"] = explain(trainer.model, images(3)["image"], trainer.processing_class).attributions

    # With AdamW: torch cannot load the state of an optimiser that has none.
    adam = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    found["whole run"] = whole_weights(train_on_given_coalitions(folder, 4, **adam))
    found["resumed"] = whole_weights(train_on_given_coalitions(folder, 4, resume=f"{folder}/checkpoint-2", **adam))

    rounded = trainer_of(folder, wrapped(), bf16=True, max_steps=1)
    rounded.train()
    head, block = rounded.layer.lora_shapley_vote["default"], rounded.layer.anatomy.blocks[0]
    seen = []
    linear = rounded.model.get_base_model().get_submodule(block).mlp.fc2
    linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.no_grad(), rounded.compute_loss_context_manager():
        output = rounded.model(pixel_values=torch.randn(4, 3, 32, 32))
    sums = output.null_values.double() + output.attributions.double().sum(dim=1)
    found["bf16"] = (str(seen[0]), str(head.weight.dtype), (sums - output.logits.double()).abs().max().item())
    return found


def zero(folder, stage) -> dict:
    """Law 8 under DeepSpeed."""
    config = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    trainer, reached = weights(folder, use_cpu=False, deepspeed=config)
    shown = explain(trainer.model, images(3)["image"], trainer.processing_class).attributions
    return {"weights": reached, "type": str(trainer.accelerator.distributed_type), "explained": shown}


def main(task: str, folder: str) -> None:
    if task == "evaluate":
        found = evaluate(folder)
    elif task == "failing save":
        found = failing_save(folder)
    else:
        pretend_accelerators()
        found = fsdp(folder) if task == "fsdp" else zero(folder, int(task.removeprefix("zero")))
    if PartialState().is_main_process:
        torch.save(found, f"{folder}/found.pt")
    # Gloo's threads would meet a closing interpreter.
    PartialState().destroy_process_group()
