"""The benchmarks of cost as their user runs them, on a tiny model: every setting is measured once and kept."""

import json
import sys
from pathlib import Path

import pytest

# At the end: two scripts there have the names of modules here.
sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import cost_curve
import speed
import stepping

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(stepping.SIZES, "vit-s", TINY)


def run(module, monkeypatch, *line):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, line)])
    module.main()


def test_a_row_for_each_setting_and_none_twice(tmp_path, monkeypatch, capsys):
    line = ["--models", "vit-s", "--players", 9, "--classes", 3, "--batch", 2, "--repeats", 1, "--output", tmp_path]
    run(speed, monkeypatch, *line)
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| vit-s")]
    assert [row.split("|")[4:6] for row in rows] == [
        [f" {precision} ", f" {tune} "] for precision in ("fp32", "bf16") for tune in ("lora", "full")
    ]
    known = json.loads((tmp_path / "speed.json").read_text())
    assert len(known) == 4
    assert all(entry["found"]["step"]["plain_s"] > 0 for entry in known)
    assert all(entry["found"]["memory"] > 1 for entry in known)
    monkeypatch.setattr(speed, "measured", None)  # would fail if it were called
    run(speed, monkeypatch, *line)
    assert [row for row in capsys.readouterr().out.splitlines() if row.startswith("| vit-s")] == rows


def test_what_misses_its_limit_is_bold():
    found = {
        "step": {"ratio": 1.36, "least": 1.3, "most": 1.4, "plain_s": 2.0},
        "memory": 1.2,
        "explaining": {"ratio": 1.05, "least": 1.0, "most": 1.1, "plain_s": 0.5},
    }
    cells = [cell.strip() for cell in speed.row(stepping.Setting(), found).split("|")[1:-1]]
    assert cells[6:] == ["**1.36** (1.30 to 1.40)", "1.25", "1.20", "1.05 (1.00 to 1.10)"]


def test_curves_are_measured_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost_curve, "CURVES", {"players": [9, 16], "classes": [2], "pairs": [1, 2], "batch": [1]})
    monkeypatch.setattr(cost_curve, "CENTRE", stepping.Setting(players=9, batch=2))
    monkeypatch.setattr(cost_curve, "ALONE", stepping.Setting(players=16, batch=1))
    run(cost_curve, monkeypatch, "--repeats", 1, "--output", tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("| players |") == 2
    assert "KernelSHAP, 512" in printed
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "cost.json").read_text())
    # Measured once, on a machine that may be busy: only what differs by a factor of hundreds is compared.
    assert found["afterwards"]["KernelSHAP, 512"] > found["afterwards"]["one pass"]
    assert found["afterwards"]["refined, 64"] > 0


def test_a_step_trains_both_models():
    steps = stepping.Steps(stepping.Setting(players=9, batch=2))
    for model, step in ((steps.plain, steps.plain_step), (steps.adapted, steps.our_step)):
        before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
        step()
        step()
        moved = [name for name, value in model.named_parameters() if name in before and not value.equal(before[name])]
        assert any("lora_A" in name for name in moved)
        assert any("classifier" in name or "shapley" in name for name in moved)
