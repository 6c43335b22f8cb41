"""One run at a time in a folder: who is refused, what a killed one leaves, and where no lock can be."""

import errno
import os
import shutil
import signal
import socket
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from test_trainer import assert_same, trained, trainer_of
from transformers import Trainer

from shapadapter import ShapleyError
from shapadapter.core import files
from shapadapter.core.files import LOCK, alone_in
from shapadapter.demo import run as demo
from shapadapter.demo.models import claim
from shapadapter.training.checkpoints import running_alone

pytest.importorskip("fcntl")
HOST = socket.gethostname()


def process(action) -> int:
    """Start an action in a process of its own; its exit code is 0, or 3 if it was refused."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(action() or 0)
        except ShapleyError:
            os._exit(3)
        except BaseException:
            os._exit(1)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def another_run(folder, end=signal.SIGKILL):
    """Another process is in a folder, until it is killed; gives its number."""
    reading, writing = os.pipe()

    def stay():
        with alone_in(folder):
            os.write(writing, b"1")
            signal.pause()

    child = process(stay)
    os.read(reading, 1)
    try:
        yield child
    finally:
        os.kill(child, end)
        os.waitpid(child, 0)


def test_a_second_run_is_refused_with_the_number_of_the_first(tmp_path):
    folder = tmp_path / "deep" / "out"
    with another_run(folder) as child:
        with pytest.raises(ShapleyError) as said, alone_in(folder):
            pass
        assert str(said.value) == (
            f"{folder} is in use by another run (process {child} on {HOST}): wait until it has ended, or choose another "
            "folder."
        )
    assert (folder / LOCK).exists()  # it was killed
    with alone_in(folder):
        assert (folder / LOCK).read_text() == f"process {os.getpid()} on {HOST}\n"
        assert code_of(process(lambda: alone_in(folder).__enter__())) == 3
    assert not folder.exists() or not list(folder.iterdir())


def test_an_empty_folder_of_its_own_goes_again_and_others_stay(tmp_path):
    with alone_in(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    with alone_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
    with alone_in(tmp_path):
        pass
    assert tmp_path.exists()


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_blocks_of_one_process_may_be_inside_each_other(tmp_path, error):
    def enter():
        return code_of(process(lambda: alone_in(tmp_path).__enter__() and None))

    with nullcontext() if error is None else pytest.raises(error), alone_in(tmp_path):
        with alone_in(tmp_path / ".." / tmp_path.name):
            assert enter() == 3
        assert enter() == 3
        if error is not None:
            raise error
    assert enter() == 0


def test_a_forked_worker_neither_shares_the_lock_nor_takes_it_away(tmp_path):
    reading, writing = os.pipe()

    def worker():
        os.close(writing)
        os.read(reading, 1)  # until its parent has ended

    def run():
        with alone_in(tmp_path):
            process(worker)
            os.kill(os.getpid(), signal.SIGKILL)

    assert code_of(process(run)) == -signal.SIGKILL
    with alone_in(tmp_path):  # though the worker lives
        pass
    os.close(writing)
    with alone_in(tmp_path):

        def leave():
            files._held.clear()

        assert code_of(process(leave)) == 0
        assert code_of(process(lambda: alone_in(tmp_path).__enter__() and None)) == 3


def test_disks_without_locks_and_folders_that_cannot_be_written_stop_nobody(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for folder in ("/proc/none", file / "in"):
        with alone_in(type(tmp_path)(folder)):
            pass
    with alone_in(None):
        pass

    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with another_run(tmp_path), monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", without)
        with alone_in(tmp_path):
            pass
    monkeypatch.setattr(files, "fcntl", None)
    with alone_in(tmp_path):
        pass


# -- who takes it ----------------------------------------------------------------------------------------------------


def test_two_trainings_cannot_share_a_folder_and_a_killed_one_is_resumed(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", **options)
    whole.train()
    assert LOCK not in {path.name for path in (tmp_path / "whole").iterdir()}
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "out" / "checkpoint-1")
    with another_run(tmp_path / "out") as child:
        trainer = trainer_of(tmp_path / "out", **options)
        with pytest.raises(ShapleyError, match=rf"out is in use by another run \(process {child} on "):
            trainer.train()
        assert trainer.state.global_step == 0
    trainer.train(resume_from_checkpoint=True)
    assert_same(trained(whole.model), trained(trainer.model), atol=0, rtol=0)


def test_trials_of_a_search_have_folders_of_their_own(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, max_steps=1, save_strategy="no")
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / f"run-{trial}"))
    monkeypatch.setattr(Trainer, "train", lambda trainer, resumed, trial, *_: trial)
    with another_run(tmp_path / "run-0"):
        with pytest.raises(ShapleyError, match="run-0 is in use"):
            trainer.train(trial=0)
        assert trainer.train(trial=1) == 1


def test_all_processes_of_a_training_are_refused_together_or_run_together(tmp_path):
    def rank(number, port):
        places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
        PartialState._reset_state()
        state = PartialState(cpu=True)
        assert state.num_processes == 2
        with running_alone(SimpleNamespace(process_index=number), tmp_path / "out"):
            state.wait_for_everyone()
            there = (tmp_path / "out" / LOCK).exists()
            state.wait_for_everyone()
            return 0 if there else 1

    def codes():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [code_of(child) for child in [process(lambda number=number: rank(number, port)) for number in (0, 1)]]

    with another_run(tmp_path / "out"):
        assert codes() == [3, 3]
    assert codes() == [0, 0]


def test_the_demo_is_alone_in_its_folder(tmp_path):
    (tmp_path / "out").mkdir()
    claim(tmp_path / "out")
    with (
        another_run(tmp_path / "out") as child,
        pytest.raises(ShapleyError, match=rf"in use by another run \(process {child} "),
    ):
        demo(tmp_path / "out", quick=True)
