"""Trainings that lose their lives: run as a program, this trains undisturbed, then again with deaths on the way.

The interpreter imports everything once and forks a process for each life, so that many lives cost little. A death is
SIGKILL at a random moment, by its own hand so that the moment is the same in every test: when a step begins or ends or is
between two micro-batches, or while a file of a checkpoint is opened, half written, renamed or deleted. As a launcher does,
the other processes are ended after it; then the next life goes on from what is left.
"""

import contextlib
import os
import random
import signal
import socket
import sys
import traceback
from pathlib import Path

import numpy as np
import peft.peft_model
import torch
from PIL import Image
from test_trainer import images, tiny_vit, trained, trainer_of, wrapped
from transformers import TrainerCallback

from shapadapter.data.augmentation import Augmented
from shapadapter.training import last_whole_checkpoint

OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "max_steps": -1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "dataloader_num_workers": 2,
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


def live(folder: Path, noisy: bool, *death) -> None:
    """One life: go on from what the one before left whole, and train to the end."""
    rows = Augmented(images(18), noise) if noisy else images(18)
    base = tiny_vit(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = wrapped(base=base, lora_dropout=0.1)
    trainer = trainer_of(folder / "run", model, rows, callbacks=[Death(folder, *death)], **OPTIONS)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder / "run"))
    if trainer.is_world_process_zero():
        torch.save(trained(trainer.model), folder / "weights.pt")


def born(rank: int, processes: int, port: int) -> int:
    """A process of its own group with what torchrun tells it; 0 inside it, else its number."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if processes > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in places.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return child


def life(folder: Path, noisy: bool, deaths: list[tuple]) -> bool:
    """Run the processes of one life; whether they reached its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, codes = [], []
    for rank, death in enumerate(deaths):
        children.append(born(rank, len(deaths), port))
        if children[-1] == 0:
            try:
                live(folder, noisy, *death)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
    for _ in children:
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
        if codes[-1] != 0:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
    if any(codes) and codes[0] != -signal.SIGKILL:
        raise SystemExit(f"A process failed by itself: {codes}")
    return not any(codes)


def main(home: Path, processes: int, noisy: bool, seed: int, times: int) -> None:
    """Once undisturbed in `whole/`, once in `killed/` with deaths of random processes at random moments."""
    for name in ("whole", "killed"):
        (home / name).mkdir()
    assert life(home / "whole", noisy, [()] * processes)
    chance = random.Random(seed)
    for number in range(times):
        deaths: list[tuple] = [()] * processes
        rank = chance.randrange(processes)
        # Only the first process writes more than its random state.
        kind, most = (("saving", 36 if rank == 0 else 2), ("step", 12))[number % 2]
        deaths[rank] = (kind, chance.randint(1, most))
        if life(home / "killed", noisy, deaths):
            return
    assert life(home / "killed", noisy, [()] * processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:]))
