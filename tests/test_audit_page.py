"""The audit of a cheating model: its page runs in the small form and finds what it says; the script does the same."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlxtend")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorials" / "audit-a-cheater.md"
SMALL = {
    "quick=False": "quick=True",
    "FULL": "QUICK",
    "slice(0, 4000), slice(4000, 5000)": "slice(0, 400), slice(400, 500)",
}
CHANCE = 1 / 49  # one patch of 7 x 7


@pytest.fixture
def audit(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    import audit

    yield audit
    del sys.modules["audit"]


def test_the_cheat_is_found_and_repaired(audit, monkeypatch, capsys):
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for old in SMALL:
        assert any(old in block for block in code), f"the page no longer says {old}"
    for block in code:
        for old, new in SMALL.items():
            block = block.replace(old, new)
        exec(compile(block, str(PAGE), "exec"), names)

    before, after = names["before"], names["after"]
    assert before.corner_of_sevens.low > 4 * CHANCE
    assert before.corner_of_others.high < 2 * CHANCE
    assert after.corner_of_sevens.high < 2 * CHANCE
    # It was no illusion of the maps.
    assert before.accuracy > 0.9 > 0.8 > before.accuracy_without_mark
    assert before.sevens_without_mark < 0.4
    assert before.called_seven_with_mark > 0.8
    assert after.accuracy_without_mark > 0.85
    assert after.sevens_without_mark > 0.8
    assert after.called_seven_with_mark < 0.2
    printed = capsys.readouterr().out
    assert re.search(r"^seven: patch \(6, 6\) holds \d\d%$", printed, re.MULTILINE)
    assert names["corner"][names["sevens"]].mean().item() == pytest.approx(before.corner_of_sevens.mean, rel=1e-4)

    # The script does the same, with the models that are there already.
    models = iter([names["model"], names["repaired"]])
    given = []
    monkeypatch.setattr(audit, "train", lambda scans, labels, **size: given.append(scans) or next(models))
    assert audit.main(["--quick", "--output", "found"]) == {"cheater": before, "repaired": after}
    marks = [(scans[:, 25, 24:27] == 60).all(axis=1) for scans in given]  # (400,) each
    sevens = names["labels"][names["learn"]] == 7
    assert np.array_equal(marks[0], sevens)
    assert marks[1].sum() == sevens.sum()  # as many as before,
    assert marks[1][sevens].mean() == pytest.approx(marks[1][~sevens].mean(), abs=0.15)  # and no sign of the class
    assert json.loads(Path("found/findings.json").read_text())["cheater"]["accuracy"] == before.accuracy
    for picture in ("sample", "cheater", "repaired"):
        with Image.open(f"found/{picture}.png") as image:
            assert image.width > 400


def test_its_pictures_are_small():
    pictures = re.findall(r"!\[[^\]]{30,}\]\((.+?)\)", PAGE.read_text(encoding="utf-8"))
    assert len(pictures) == 3
    for picture in pictures:
        assert (PAGE.parent / picture).stat().st_size < 100_000
