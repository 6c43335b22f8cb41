"""The example as its user runs it: by python, on two processes, and what two processes change (nothing)."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("datasets")

from peft import AutoPeftModel
from test_trainer import PLAYERS, CoalitionCollator, Processor, images, tiny_vit, trained, trainer_of
from transformers import AutoImageProcessor

from shapadapter import explain
from shapadapter.core.shapley import sample_pairs

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
TWO_PROCESSES = EXAMPLE.parent / "configs" / "cpu-two-processes.yaml"


def watched(script, folder, log):
    """Run a script; each file below the folder that is opened for writing is noted, with the process that does it."""

    def note(event, args):
        if event == "open" and isinstance(args[0], str) and args[0].startswith(f"{folder}/") and args[2] & 3:
            with log.open("a") as lines:
                lines.write(f"{os.environ.get('RANK', '0')} {os.path.basename(args[0])}\n")  # noqa: PTH119

    sys.addaudithook(note)
    script()


def train_and_draw(folder):
    """Train in one of two processes on rows that bring their own coalitions, and show what it would draw."""
    trainer = train_on_given_coalitions(folder, 4)
    assert trainer.args.world_size == 2
    drawn = trainer._draw_coalitions({"pixel_values": torch.zeros(4, 3, 32, 32)}, True)
    torch.save(drawn, folder / f"drawn-{trainer.args.process_index}.pt")
    if trainer.is_world_process_zero():
        torch.save(trained(trainer.model), folder / "weights.pt")


def train_on_given_coalitions(folder, batch_size, resume=None, **options):
    pairs = sample_pairs(8, PLAYERS, 1, torch.Generator().manual_seed(3), sizes=torch.tensor([5]))
    usual = {
        "per_device_train_batch_size": batch_size,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,  # clipping would hide a wrong scale
        "max_steps": 3,
        "shapley_warmup": 0.0,
        "coalition_task_weight": 0.5,
    }
    trainer = trainer_of(
        folder,
        train=images(8, coalitions=pairs.tolist()),
        data_collator=CoalitionCollator(Processor(size={"height": 32, "width": 32})),
        **usual | options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """24 images of three classes in a train and a test folder, and a checkpoint to start from."""
    root = tmp_path_factory.mktemp("example")
    rng = np.random.default_rng(0)
    for index in range(24):
        channel = index % 3
        pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
        pixels[..., channel] += 150
        home = root / "images" / ("train" if index < 18 else "test") / ("red", "green", "blue")[channel]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / f"{index}.png")
    tiny_vit(classes=5).save_pretrained(root / "base")
    Processor(size={"height": 32, "width": 32}).save_pretrained(root / "base")
    return root


@pytest.mark.parametrize(("launcher", "steps"), [("python", 15), ("accelerate", 9)])
def test_the_example_trains_saves_and_explains(folder, launcher, steps):
    out = folder / launcher
    options = f"--image_folder {folder}/images --model_name_or_path {folder}/base --output_dir {out} --use_cpu"
    options += " --num_train_epochs 3 --per_device_train_batch_size 4 --learning_rate 1e-2 --logging_steps 1"
    options += " --explained_images 2 --lora_rank 4 --report_to none --disable_tqdm True"
    action = partial(watched, forks.script(EXAMPLE, *options.split()), out, folder / f"{launcher}.log")
    printed = forks.run_whole(action) if launcher == "python" else forks.run_as_accelerate(TWO_PROCESSES, action)

    assert printed.count("***** eval metrics *****") == 1
    state = json.loads((out / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["global_step"] == steps
    results = json.loads((out / "all_results.json").read_text())
    assert {"train_loss", "eval_coalition_fit", "eval_shapley_loss", "eval_task_loss"} <= results.keys()
    losses = [logs["task_loss"] for logs in state["log_history"] if "task_loss" in logs]
    assert len(losses) == steps
    assert results["eval_task_loss"] < losses[0]
    card = (out / "README.md").read_text()
    assert f"| Accuracy ↑ | {results['eval_accuracy']:.3f} |" in card
    assert "Nothing is measured" not in card
    assert (out / "explanations.html").stat().st_size > 5_000
    assert (out / "attributions.png").read_bytes().startswith(b"\x89PNG")
    written = [line.split() for line in (folder / f"{launcher}.log").read_text().splitlines()]
    # Every process keeps its own random state beside a checkpoint; all else is the first one's business.
    assert {name for rank, name in written if rank != "0"} <= {"rng_state_1.pth"}
    assert {"explanations.html", "attributions.png"} <= {name.lstrip(".")[:17].rstrip(".") for _, name in written}

    model = AutoPeftModel.from_pretrained(str(out), num_labels=3, ignore_mismatched_sizes=True)
    held_out = sorted((folder / "images" / "test").glob("*/*.png"))
    explanation = explain(model, held_out, AutoImageProcessor.from_pretrained(out))
    assert explanation.labels == ("blue", "green", "red")
    assert explanation.efficiency_gap.max() < 1e-5
    said = [explanation.labels[index] for index in explanation.logits.argmax(dim=1)]
    right = np.mean([label == path.parent.name for label, path in zip(said, held_out, strict=True)])
    assert right == pytest.approx(results["eval_accuracy"])


def test_two_processes_equal_one_and_draw_coalitions_of_their_own(tmp_path):
    forks.run_together(partial(train_and_draw, tmp_path))
    alone = trained(train_on_given_coalitions(tmp_path, 8).model)
    together = torch.load(tmp_path / "weights.pt")
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=1e-6, rtol=0)
    one, other = (torch.load(tmp_path / f"drawn-{rank}.pt") for rank in (0, 1))
    assert not torch.equal(one, other)
