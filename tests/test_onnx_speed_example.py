"""The benchmark of exported models as its user runs it, on a tiny model."""

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
# At the end: scripts there have the names of modules here.
sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import onnx_speed

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}


def test_a_row_for_each_number_of_threads_and_images(monkeypatch, capsys):
    monkeypatch.setattr(onnx_speed, "SMALL", TINY)
    line = "onnx_speed --side 32 --batches 1 2 --threads 1 --repeats 3"
    monkeypatch.setattr(sys, "argv", line.split())
    before = torch.get_num_threads()
    try:
        onnx_speed.main()
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:3] for line in printed.splitlines() if re.match(r"\| \d", line)]
    assert rows == [[" 1 ", " 1 "], [" 1 ", " 2 "]]
    assert "largest difference on 6 images" in printed


def test_ratios_are_of_calls_made_one_after_the_other():
    times = {name: [10.0, 20.0, 30.0] for name in ("PyTorch, predict", "onnxruntime, predict", "PyTorch, explain")}
    row = onnx_speed.row(2, 8, {**times, "onnxruntime, explain": [5.0, 20.0, 45.0]})
    assert row.startswith("| 2 | 8 | 20 (10 to 30) |")
    assert row.endswith("| 20 (5 to 45) | 1.00 (0.50 to 1.50) |")
