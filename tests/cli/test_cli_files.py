"""What the commands write: alone in a folder, cleaned after a kill, and one sentence where there is no room."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import error_of, run
from disks import small_disk
from test_locks import another_run

from shapadapter.core.files import LOCK, temporary_path
from shapadapter.training import script as finetune

pytest.importorskip("fcntl")
DISK_FULL = "could not be written: File too large"


def left_by_a_killed_run(file: Path) -> Path:
    """A passing file whose process has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = Path(str(temporary_path(file)).replace(f"-{os.getpid()}-", f"-{process.pid}-"))
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("half")
    return left


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_two_evaluations_into_one_folder(command, tmp_path):
    words = (command, "out", "--data", "photos", "--images", 2, "--methods", "shapadapter", "--output", tmp_path / "a")
    with another_run(tmp_path / "a") as number:
        said = error_of(*words)
        assert f"{tmp_path}/a is in use by another run (process {number} on " in said
        assert [path.name for path in (tmp_path / "a").iterdir()] == [LOCK]
    left = left_by_a_killed_run(tmp_path / "a" / "table.md")
    run(*words)
    found = {path.name for path in (tmp_path / "a").iterdir()}
    assert found - {"report.html"} == {"evaluation.json", "table.md", "curves.png", "records"}
    assert not left.exists()


def test_a_training_into_a_folder_in_use_is_refused_before_it_reads_anything(tmp_path, monkeypatch):
    words = ["--model_name_or_path", "base", "--image_folder", "photos", "--output_dir", tmp_path, "--use_cpu"]
    given = finetune.parser().parse_args_into_dataclasses(list(map(str, words)), look_for_args_file=False)
    monkeypatch.setattr(finetune, "load_images", lambda *_: pytest.fail("it has read the images"))
    with another_run(tmp_path) as number, pytest.raises(finetune.ShapleyError, match=rf"\(process {number} on "):
        finetune.main(*given)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_folder_in_use_is_free_for_what_ends_whole(tmp_path):
    with another_run(tmp_path / "space"):
        pass  # it was killed: its lock is in the folder
    (tmp_path / "space" / LOCK).unlink()
    run("space", "out", tmp_path / "space", "--copy-base")
    run("explain", "out", "photos/ant", "--output", tmp_path / "maps", "--format", "json,html")
    left = [left_by_a_killed_run(tmp_path / name) for name in ("space", "program", "maps/explanations.json")]
    run("space", "out", tmp_path / "space", "--copy-base")
    run("export", "out", tmp_path / "program", "--to", "torch", "--images", "photos/ant")
    run("explain", "out", "photos/ant", "--output", tmp_path / "maps", "--format", "json,html")
    assert not any(path.exists() for path in left)
    assert {path.name for path in tmp_path.iterdir()} == {"space", "program", "maps"}
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"explanations.json", "explanations.html"}


@pytest.mark.parametrize(
    ("formats", "most", "name"),
    [("png", 5_000, ".png"), ("html", 20_000, ".html"), ("json", 300, "explanations.json")],
)
def test_explanations_without_room_are_one_sentence(tmp_path, formats, most, name):
    with small_disk(most):
        found = run("explain", "out", "photos/ant", "--output", tmp_path / "maps", "--format", formats, code=1)
    (said,) = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert f"{name} {DISK_FULL}" in said
    assert str(tmp_path / "maps") in said
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "words",
    [("export", "out", "PLACE", "--to", "torch", "--images", "photos/ant"), ("space", "out", "PLACE", "--copy-base")],
)
def test_a_folder_without_room_is_one_sentence_and_not_there(words, tmp_path):
    with small_disk(3_000):
        said = error_of(*[tmp_path / "new" if word == "PLACE" else word for word in words])
    assert said.startswith(f"Error: {tmp_path}/new {DISK_FULL}")
    assert not list(tmp_path.iterdir())
