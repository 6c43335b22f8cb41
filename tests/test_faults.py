"""What is left of a run that was killed, ran out of disk or lost bytes, and how it goes on."""

import json
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from disks import small_disk
from lives import noise, train_and_kill
from test_trainer import assert_same, images, names_in, trained, trainer_of
from transformers import Trainer, TrainerCallback

from shapadapter.core.errors import CheckpointError
from shapadapter.data.augmentation import Augmented
from shapadapter.training import checkpoints, last_complete_checkpoint
from shapadapter.training.checkpoints import damage_in, newest_first, rotate
from shapadapter.training.publish import Publication

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


class Start(TrainerCallback):
    """Notes at which step a training starts."""

    step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def going_on(folder, wish, **options) -> tuple[int, dict[str, torch.Tensor]]:
    """The step at which a run goes on, and the weights at its end."""
    start = Start()
    trainer = trainer_of(folder, callbacks=[start], **{**STEPS, "save_strategy": "no", **options})
    trainer.train(resume_from_checkpoint=wish)
    return start.step, trained(trainer.model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of four steps with a checkpoint after each, and its weights."""
    trainer = trainer_of(tmp_path_factory.mktemp("saved"), **STEPS)
    trainer.train()
    return Path(trainer.args.output_dir), trained(trainer.model)


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of its first three checkpoints, to be damaged."""
    for step in (1, 2, 3):
        shutil.copytree(saved[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# -- whole or not ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_the_manifest_of_earlier_versions_is_resumed(saved, run):
    about = {"format": "shapadapter.checkpoint", "format_version": 1, "files": {"gone": {"bytes": 1, "sha256": "0"}}}
    (run / "checkpoint-3" / "complete.json").write_text(json.dumps(about))
    assert damage_in(run / "checkpoint-3") is None
    step, weights = going_on(run, True)
    assert step == 3
    assert_same(saved[1], weights, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("trainer_state.json", Path.unlink, "trainer_state.json is missing, so it was not saved to its end"),
        ("trainer_state.json", cut, "trainer_state.json cannot be read"),
        ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
        ("optimizer.pt", cut, "optimizer.pt cannot be read"),
        ("optimizer.pt", change_a_byte, "optimizer.pt cannot be read"),
        ("adapter_model.safetensors", cut, "adapter_model.safetensors cannot be read"),
        ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_is_used(run, name, damage, what):
    broken = run / "checkpoint-3"
    damage(broken / name)
    with pytest.warns(UserWarning, match=rf"Skipping damaged checkpoint .*checkpoint-3: .*{what}"):
        assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    with pytest.raises(
        CheckpointError, match=rf"Cannot resume from .*checkpoint-3: .*{what}.*Pass .*checkpoint-2 instead"
    ):
        trainer_of(run, **STEPS).train(resume_from_checkpoint=str(broken))


def test_the_trainer_goes_on_from_the_newest_whole_checkpoint(saved, run):
    cut(run / "checkpoint-3" / "optimizer.pt")
    with pytest.warns(UserWarning, match=r"Skipping damaged checkpoint .*checkpoint-3: optimizer.pt"):
        step, weights = going_on(run, True)
    assert step == 2
    assert_same(saved[1], weights, atol=0, rtol=0)


def test_whole_checkpoints_are_used_without_a_word(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert last_complete_checkpoint(run) == str(run / "checkpoint-3")
        assert going_on(run, True)[0] == 3
        choose = trainer_of(run, **STEPS).checkpoints.chosen
        assert choose("True") == choose(True) == str(run / "checkpoint-3")  # a word from a command line
        assert choose(run / "checkpoint-1") == str(run / "checkpoint-1")
        assert choose("False") is choose(False) is choose(None) is None


def test_several_broken_ones_are_all_named(run):
    cut(run / "checkpoint-3" / "scheduler.pt")
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    (run / "checkpoint-10").mkdir()  # newer than 3, though not by the alphabet
    with pytest.warns(UserWarning, match="Skipping damaged") as said:
        assert last_complete_checkpoint(run) == str(run / "checkpoint-1")
    passed = [str(one.message) for one in said if "Skipping damaged" in str(one.message)]
    assert ["checkpoint-10" in passed[0], "checkpoint-3" in passed[1], "checkpoint-2" in passed[2]] == [True] * 3


def test_nothing_whole_is_a_clear_error(run, tmp_path_factory):
    for step in (1, 2, 3):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with (
        pytest.warns(UserWarning, match="Skipping damaged"),
        pytest.raises(CheckpointError, match=r"none is complete .*checkpoint-1: optimizer.pt is missing.*Start again"),
    ):
        trainer_of(run, **STEPS).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="No other one beside it is complete"):
        trainer_of(run, **STEPS).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    nowhere = tmp_path_factory.mktemp("empty") / "run"
    with pytest.raises(CheckpointError, match="there is none"):
        trainer_of(nowhere, **STEPS).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        trainer_of(nowhere, **STEPS).train(resume_from_checkpoint=str(nowhere / "checkpoint-1"))
    assert last_complete_checkpoint(nowhere) is None


def test_a_damaged_best_model_is_not_loaded(tmp_path):
    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                cut(Path(state.best_model_checkpoint) / "adapter_model.safetensors")

    best = {"load_best_model_at_end": True, "metric_for_best_model": "shapley_loss", "greater_is_better": False}
    options = {**STEPS, **best, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = trainer_of(tmp_path, callbacks=[Damage()], **options)
    said = r"training is over.* best model .*adapter_model\.safetensors cannot be read.* trainer\.save_model"
    with pytest.raises(CheckpointError, match=said):
        trainer.train()


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [40_000, 100_000])  # the weights, or the optimiser, are written half
def test_a_full_disk_leaves_the_checkpoint_before_whole(saved, tmp_path, monkeypatch, most):
    usual = Trainer._save_checkpoint

    def save(trainer, *args):
        with small_disk(most) if trainer.state.global_step == 3 else nullcontext():
            usual(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", save)
        with pytest.raises(CheckpointError, match=r"checkpoint-3 .*MB were free.*resume from .*checkpoint-2"):
            trainer_of(tmp_path, **STEPS, save_total_limit=1).train()
    assert names_in(tmp_path) == {"checkpoint-2"}
    step, weights = going_on(tmp_path, True)
    assert step == 2
    assert_same(saved[1], weights, atol=0, rtol=0)


def test_an_error_in_saving_the_first_checkpoint(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_rng_state", fails)
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, **STEPS, **best)
    with pytest.raises(CheckpointError, match=r"checkpoint-1 \(OSError: .*No space left.*no earlier one"):
        trainer.train()
    assert names_in(tmp_path) == set()
    assert trainer.state.best_model_checkpoint is None


def test_old_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    whole = []
    usual = checkpoints.rotate

    def watched(run, *args):
        whole.append({path.name for path in newest_first(tmp_path) if damage_in(path) is None})
        usual(run, *args)

    monkeypatch.setattr(checkpoints, "rotate", watched)
    trainer_of(tmp_path, **STEPS, save_total_limit=1).train()
    assert whole == [{"checkpoint-1"}, *({f"checkpoint-{step}", f"checkpoint-{step + 1}"} for step in (1, 2, 3))]
    assert names_in(tmp_path) == {"checkpoint-4"}
    arguments = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert arguments.save_total_limit == 1


def test_nothing_of_a_checkpoint_has_its_name_before_all_of_it_is_there(tmp_path, monkeypatch):
    seen = []
    usual = Trainer._save_rng_state

    def save(trainer, folder):
        seen.append((names_in(tmp_path), Path(folder).name))
        usual(trainer, folder)

    monkeypatch.setattr(Trainer, "_save_rng_state", save)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "shapley_loss", "greater_is_better": False}
    trainer = trainer_of(tmp_path, **{**STEPS, **best, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2})
    trainer.train()
    assert [name for _, name in seen] == ["checkpoint-1", "checkpoint-2"]
    assert ["checkpoint-1" in there for there, _ in seen] == [False, True]
    assert "checkpoint-2" not in seen[1][0]
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")
    assert names_in(tmp_path) == {"checkpoint-1", "checkpoint-2"}


def test_the_best_and_the_last_checkpoint_stay(run):
    rotate(run, None, {run / "checkpoint-2"})
    assert len(names_in(run)) == 3
    rotate(run, 2, {run / "checkpoint-1"})
    assert names_in(run) == {"checkpoint-1", "checkpoint-3"}
    rotate(run, 1, {run / "checkpoint-1", run / "checkpoint-3"})
    assert names_in(run) == {"checkpoint-1", "checkpoint-3"}
    rotate(run, 1, {run / "checkpoint-1"})
    assert names_in(run) == {"checkpoint-1"}


def test_what_a_killed_run_left_under_a_name_is_not_mixed_with_the_new(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "rng_state_7.pth").write_text("old")
    trainer_of(tmp_path, **STEPS).train()
    assert "rng_state_7.pth" not in names_in(tmp_path / "checkpoint-1")


def test_whole_checkpoints_are_pushed(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Publication, "push_checkpoint", lambda _, folder: pushed.append((str(folder), damage_in(folder)))
    )
    trainer = trainer_of(tmp_path, **{**STEPS, "max_steps": 2})
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (1, 2)]


# -- the data after resuming -----------------------------------------------------------------------------------------


def test_a_data_set_knows_its_epoch_after_resuming_in_its_middle(tmp_path):
    class Rows(Augmented):
        def set_epoch(self, epoch):
            super().set_epoch(epoch)
            seen.append(epoch)

    seen = []
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "train": Rows(images(12), noise),
    }  # 3 steps an epoch
    trainer = trainer_of(tmp_path, **options)
    trainer.train()
    assert sorted(set(seen)) == [0, 1, 2]
    seen.clear()
    again = trainer_of(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(set(seen)) == [1, 2]
    assert_same(trained(trainer.model), trained(again.model), atol=0, rtol=0)


def test_a_run_resumed_at_its_end_takes_no_step_more(saved, tmp_path):
    shutil.copytree(saved[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = trainer_of(tmp_path, **STEPS, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert_same(saved[1], trained(trainer.model), atol=0, rtol=0)


@pytest.mark.slow
def test_killed_again_and_again_equals_an_undisturbed_run(tmp_path):
    # LoRA and the base drop out, two processes with a worker each read shuffled images and add noise to them, gradients are
    # accumulated, one checkpoint is kept.
    printed = train_and_kill(tmp_path, seed=0, times=3)
    deaths = (tmp_path / "killed" / "deaths.txt").read_text().splitlines()
    assert len(deaths) >= 2, deaths
    assert {line.partition(":")[0] for line in deaths} == {"saving", "step"}
    assert "Skipping damaged" not in printed
    whole, killed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "killed"))
    assert_same(whole, killed, atol=0, rtol=0)
