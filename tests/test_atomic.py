"""Files and folders that are whole or not there: killed at any step, written by two, on a full disk."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest
import torch
from disks import small_disk
from safetensors import SafetensorError
from spaces import noise, write_checkpoint
from test_explanation import explanation  # noqa: F401
from test_trainer import trainer_of

from shapadapter import ShapleyError, explain, export_program
from shapadapter.core import files as atomic
from shapadapter.core.errors import DiskFullError
from shapadapter.core.files import (
    atomic_file,
    atomic_folder,
    remove_leftovers,
    report_full_disk,
    temporary_path,
    write_together,
)
from shapadapter.evaluation.records import Records
from shapadapter.hub.card.renewal import update_card
from shapadapter.hub.space import write_space
from shapadapter.visual import draw_explanation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
WRITTEN = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.copyfile")


def killed_at(step: int, folder: Path, action) -> bool:
    """Run an action in a process that is killed at its n-th change below a folder; False if it came to its end."""

    def hear(event, args):
        nonlocal step
        changed = event in WRITTEN or (event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if changed and os.path.realpath(str(args[0])).startswith(str(folder)):
            step -= 1
            if step == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(hear)
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def a_dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# -- killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_space_is_the_old_or_the_new_one_whenever_its_writer_is_killed(
    checkpoint, tmp_path, monkeypatch, in_one_step
):
    if not in_one_step:  # as on systems that cannot exchange two folders
        monkeypatch.setattr(atomic, "_exchanged", lambda one, other: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    monkeypatch.setattr(
        "shapadapter.core.installation.ON_INDEX", True
    )  # the package's own files would be hundreds of steps more
    picture, place = tmp_path / "picture.png", tmp_path / "place"
    noise().save(picture)
    place.mkdir()
    space = write_space("ada/birds", place / "space")
    (space / ".git" / "refs").mkdir(parents=True)
    (space / ".git" / "refs" / "main").write_text("mine")
    (space / "notes.txt").write_text("mine")
    old = contents(space)
    write_space(checkpoint, space, title="New", examples=[picture], copy_base=True)
    new = contents(space)
    assert new.items() > {".git/refs/main": b"mine", "notes.txt": b"mine"}.items()
    assert set(new) - set(old) >= {"adapter/adapter_model.safetensors", "base/model.safetensors", "examples/001.png"}
    states, step = set(), -4
    while True:
        step += (
            5 if step < 25 else 1
        )  # of the first ones, which write file after file beside the old folder, every fifth
        if step == 1 or contents(space) == new:
            write_space("ada/birds", space)
        assert contents(space) == old
        assert names_in(place) == ["space"]
        killed = killed_at(
            step, place, lambda: write_space(checkpoint, space, title="New", examples=[picture], copy_base=True)
        )
        remove_leftovers(place)
        assert contents(space) in (old, new), step
        states.add(contents(space) == new)
        if not killed:
            break
    assert step > 35
    assert states == {True, False}


def test_new_names_are_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "fsync_folder", synced.append)
    with atomic_file(tmp_path / "file") as file:
        file.write_text("a")
    assert synced == [tmp_path]
    write_together({tmp_path / "one": b"1", tmp_path / "two": b"2"})
    assert synced == [tmp_path] * 2
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
    assert synced[2:] == [folder, folder / "inner", tmp_path]


@pytest.mark.parametrize("single", [True, False])
def test_files_are_the_old_or_the_new_ones_and_nothing_is_left(tmp_path, single):
    def write(content):
        if single:
            with atomic_file(tmp_path / "a.png") as file:
                file.write_bytes(content)
        else:
            write_together({tmp_path / "a.png": content, tmp_path / "b.json": content})

    step, left, killed = 0, 0, True
    while killed:
        step += 1
        write(b"old")
        killed = killed_at(step, tmp_path, lambda: write(b"new"))
        found = contents(tmp_path)
        assert {found.pop(name) for name in ("a.png", "b.json")[: 1 if single else 2]} <= {b"old", b"new"}
        left += len(found)  # its passing files
        write(b"next")
        assert names_in(tmp_path) == ["a.png", "b.json"][: 1 if single else 2]
    assert step > (3 if single else 6)
    assert left > (0 if single else 3)


def test_the_weights_of_an_adapter_are_the_old_or_the_new_ones(tmp_path):
    model = families.wrap("vit")
    model.save_pretrained(tmp_path)
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(part for name, part in model.named_parameters() if "lora_B" in name).fill_(1)
    seen, step = set(), 0
    while killed_at(step := step + 1, tmp_path, lambda: model.save_pretrained(tmp_path)):
        seen.add((tmp_path / "adapter_model.safetensors").read_bytes())
        if step % 4 == 0:
            type(model).from_pretrained(families.base("vit"), tmp_path)  # whole, whichever
    new = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert old in seen
    assert seen <= {old, new}
    assert old != new
    assert names_in(tmp_path) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_leftovers_are_told_from_what_is_written_now_and_from_the_users_files(tmp_path, a_dead_process):
    mine = temporary_path(tmp_path / "page.html")
    theirs, yesterday = "0" * 8, time.time() - 2 * 86400

    here = atomic._machine()

    def of(process, machine=here, run="0" * 8):
        return tmp_path / f".page.html.shapadapter-{machine}-{process}-{run}-0.tmp"

    stay = [mine, of(os.getppid()), of(6, theirs)]
    stay += [tmp_path / name for name in (".page.html.tmp", ".page.html.0a1b2c3d.tmp", "shapadapter.tmp")]
    left = [of(a_dead_process), of(os.getpid()), of(7, theirs), of(8, theirs)]  # a number is given again after a while
    for path in (*stay, *left[:-1]):
        path.write_text("")
    (left[-1] / "page.html").mkdir(parents=True)
    for path in left[2:]:
        os.utime(path, (yesterday, yesterday))
    write_together({tmp_path / "other": b""})
    assert names_in(tmp_path) == sorted([*(path.name for path in stay), "other"])


def test_leftovers_are_not_followed(tmp_path, a_dead_process):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    link = tmp_path / f".x.shapadapter-{atomic._machine()}-{a_dead_process}-{'0' * 8}-0.tmp"
    link.symlink_to(tmp_path / "mine", target_is_directory=True)
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == ["mine"]
    assert names_in(tmp_path / "mine") == ["file"]


def test_long_names_have_room_for_what_passes(tmp_path):
    path = tmp_path / ("\N{GRINNING FACE}" * 60 + ".json")  # of 245 bytes
    write_together({path: b"1"})
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"1"]


def test_two_that_write_one_folder_both_end_whole(tmp_path):
    def write(name):
        for _ in range(30):
            with atomic_folder(tmp_path / "space", ours=("a", "b")) as folder:
                for part in "ab":
                    (folder / part).write_text(name)

    children = []
    for name in "12":
        children.append(os.fork())
        if children[-1] == 0:
            try:
                write(name)
                os._exit(0)
            except BaseException:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert contents(tmp_path / "space") in ({"a": b"1", "b": b"1"}, {"a": b"2", "b": b"2"})
    assert names_in(tmp_path) == ["space"]


def test_links_and_permissions_of_the_user_stay(tmp_path):
    folder = tmp_path / "space"
    folder.mkdir(mode=0o700)
    (folder / "data").symlink_to("../elsewhere")
    (folder / "locked").write_text("mine")
    (folder / "locked").chmod(0o400)
    with atomic_folder(folder, ours=("a",)) as place:
        (place / "a").write_text("")
    assert (folder / "data").readlink() == Path("../elsewhere")
    assert (folder / "locked").stat().st_mode & 0o777 == 0o400
    assert folder.stat().st_mode & 0o777 == 0o700
    assert names_in(folder) == ["a", "data", "locked"]


# -- a full disk -----------------------------------------------------------------------------------------------------


def full(most: int, action) -> str:
    """What an action says that finds no room for a file, in a process of its own, which torch might end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with small_disk(most):
                action()
        except DiskFullError as error:
            os.write(writing, str(error).encode())
        except BaseException as error:
            os.write(writing, f"{type(error)}: {error}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


def saved(tmp_path):
    def save():
        trainer_of(tmp_path / "run").save_model()

    return save, tmp_path / "run" / "adapter_model.safetensors"


def settings(tmp_path):
    return lambda: Records(tmp_path / "run", {"a" * 4000: 1}, torch.nn.Linear(1, 1)), "settings.json"


def exported(function, name):
    def make(tmp_path):
        model = families.wrap("vit")
        return lambda: function(model, tmp_path / name, images={"pixel_values": families.images(2)}), tmp_path / name

    return make


@pytest.mark.parametrize(
    ("most", "make"),
    [
        (2000, lambda tmp_path: (lambda: write_together({tmp_path / "a": b"1" * 4000}), tmp_path / "a")),
        (2000, lambda tmp_path: (lambda: made().save(tmp_path), "explanation.safetensors")),
        (2000, lambda tmp_path: (lambda: made().save_html(tmp_path / "page.html"), tmp_path / "page.html")),
        (2000, lambda tmp_path: (lambda: made().figure().savefig(tmp_path / "a.png"), tmp_path / "a.png")),
        (
            20000,
            lambda tmp_path: (lambda: families.wrap("vit").save_pretrained(tmp_path), "adapter_model.safetensors"),
        ),
        (2000, settings),
        (20000, saved),
        (2000, exported(export_program, "program")),
    ],
)
def test_a_full_disk_is_said_in_one_sentence_with_the_place(most, make, tmp_path):
    action, place = make(tmp_path)
    said = full(most, action)
    wanted = rf".*{re.escape(str(place))} could not be written: File too large \([\d,.]+ MB are free there\)\. "
    assert re.fullmatch(wanted + r"Raise the limit of a file's size \(ulimit -f\), or choose another place\.", said)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".pt2", ".safetensors", ".onnx"))]


def made():
    return explain(families.wrap("vit"), families.images(2))


def test_a_space_that_has_no_room_leaves_the_old_one(checkpoint, tmp_path):
    space = write_space("ada/birds", tmp_path / "space")
    before = contents(space)
    assert f"{space} could not be written" in full(5000, lambda: write_space(checkpoint, space, copy_base=True))
    assert contents(space) == before
    assert names_in(tmp_path) == ["space"]


def test_a_card_that_has_no_room_leaves_the_old_one(checkpoint):
    before = contents(checkpoint)
    assert "adapter_config.json could not be written" in full(500, lambda: update_card(checkpoint))
    assert contents(checkpoint) == before


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (SafetensorError(f"Error while serializing: I/O error: File too large (os error {errno.EFBIG})"), errno.EFBIG),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), errno.ENOSPC),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), errno.ENOSPC),
        (OSError("1000 requested and 512 written"), errno.ENOSPC),
    ],
)
def test_words_of_other_libraries_become_one_sentence(error, number, tmp_path):
    with pytest.raises(DiskFullError) as said, report_full_disk(tmp_path / "deep" / "adapter"):
        raise error
    assert said.value.errno == number
    assert isinstance(said.value, ShapleyError)
    assert str(said.value).startswith(f"{tmp_path}/deep/adapter could not be written: {os.strerror(number)} (")


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (PermissionError(errno.EACCES, "no"), ValueError("no"), ShapleyError("No space left"), OSError("no")):
        with pytest.raises(type(error)) as said, report_full_disk(tmp_path):
            raise error
        assert said.value is error


# -- figures ---------------------------------------------------------------------------------------------------------


def test_figures_have_the_names_that_matplotlib_gives(explanation, tmp_path):  # noqa: F811
    figure = draw_explanation(explanation, 0)
    for name, options, expected in (
        ("a.png", {}, b"\x89PNG"),
        ("b.svg", {}, b"<?xml"),
        ("c", {}, b"\x89PNG"),
        ("d.bin", {"format": "pdf"}, b"%PDF"),
    ):
        figure.savefig(str(tmp_path / name), **options)
        assert (tmp_path / ("c.png" if name == "c" else name)).read_bytes().startswith(expected)
    assert names_in(tmp_path) == ["a.png", "b.svg", "c.png", "d.bin"]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
