"""Trainings that lose their lives: one that is undisturbed, and again with deaths on the way.

Each life is a fork, so that many of them cost little. A death is SIGKILL at a random moment, by its own hand so that the
moment is the same in every test: when a step begins or ends or is between two micro-batches, or while a file of a
checkpoint is opened, half written, renamed or deleted. As a launcher does, the other processes are ended after it; then
the next life goes on from what is left.
"""

import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import forks
import numpy as np
import peft.peft_model
import torch
from PIL import Image
from test_trainer import images, tiny_vit, trained, trainer_of, wrapped
from transformers import TrainerCallback

from shapadapter.data.augmentation import Augmented
from shapadapter.training import last_complete_checkpoint

PROCESSES = 2
OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "max_steps": -1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "dataloader_num_workers": 1,
}


def noise(image: Image.Image) -> Image.Image:
    """The image with some random pixels added, by two of the generators that augmentations draw from."""
    drawn = np.random.randint(0, 40, (32, 32, 3)) + torch.randint(40, (32, 32, 3)).numpy()  # noqa: NPY002
    return Image.fromarray(np.asarray(image) ^ drawn.astype(np.uint8))


class Death(TrainerCallback):
    """Comes at the n-th moment of a kind, "step" or "saving"; never without a kind."""

    def __init__(self, folder: Path, kind: str = "", moment: int = 0) -> None:
        self.folder, self.kind, self.left = folder, kind, moment
        if kind == "saving":
            torch.save = self.cut_off(torch.save)
            peft.peft_model.safe_save_file = self.cut_off(peft.peft_model.safe_save_file)
            sys.addaudithook(self.hear)

    def near(self, kind: str) -> bool:
        self.left -= kind == self.kind
        return self.left == 0 and kind == self.kind

    def come(self, where: str) -> None:
        with (self.folder / "deaths.txt").open("a") as deaths:
            deaths.write(f"{self.kind}: {where}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def cut_off(self, save):
        def saves(content, path, *args, **kwargs):
            save(content, path, *args, **kwargs)
            if self.near("saving"):
                os.truncate(path, Path(path).stat().st_size // 2)
                self.come(f"{path} half written")

        return saves

    def hear(self, event, args) -> None:
        written = event == "open" and isinstance(args[0], str) and (args[2] or 0) & 3
        if (
            (written or event in ("os.rename", "shutil.rmtree"))
            and str(args[0]).startswith(f"{self.folder}/run/")
            and self.near("saving")
        ):
            self.come(f"{args[0]} {event}")

    def on_step_begin(self, args, state, control, **kwargs):
        if self.near("step"):
            self.come(f"step {state.global_step} of epoch {state.epoch}")

    on_substep_end = on_pre_optimizer_step = on_step_end = on_save = on_step_begin


def live(folder: Path, *death) -> None:
    """One life: go on from what the one before left whole, and train to the end."""
    rows = Augmented(images(18), noise)
    base = tiny_vit(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = wrapped(base=base, lora_dropout=0.1)
    trainer = trainer_of(folder / "run", model, rows, callbacks=[Death(folder, *death)], **OPTIONS)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder / "run"))
    if trainer.is_world_process_zero():
        torch.save(trained(trainer.model), folder / "weights.pt")


def life(folder: Path, deaths: list[tuple]) -> tuple[bool, str]:
    """Run the processes of one life; whether they reached its end, and what they printed."""
    actions = [partial(live, folder, *death) for death in deaths]
    done = forks.run_all(actions, variables=forks.places(len(deaths)))
    printed = "".join(one.printed for one in done)
    assert {one.code for one in done} <= {0, -signal.SIGKILL}, f"a process failed by itself: {printed[-4000:]}"
    return not any(one.code for one in done), printed


def train_and_kill(home: Path, seed: int, times: int) -> str:
    """Once undisturbed in `whole/`, once in `killed/` with deaths of random processes at random moments.

    Returns what was printed on the way.
    """
    for name in ("whole", "killed"):
        (home / name).mkdir()
    assert life(home / "whole", [()] * PROCESSES)[0]
    chance, printed = random.Random(seed), ""
    for number in range(times + 1):
        deaths: list[tuple] = [()] * PROCESSES
        if number < times:
            rank = chance.randrange(PROCESSES)
            # Only the first process writes more than its random state.
            kind, most = (("saving", 36 if rank == 0 else 2), ("step", 8))[number % 2]
            deaths[rank] = (kind, chance.randint(1, most))
        ended, said = life(home / "killed", deaths)
        printed += said
        if ended:
            return printed
    raise AssertionError("a life without a death did not reach its end")
