"""The page on deploying: every code block runs, the one without PyTorch in a process that has none."""

import json
import re
import subprocess
import sys
from pathlib import Path

import families
import matching
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification
from transformers import ViTImageProcessorPil as Processor

from shapadapter import explain

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
NOT_TORCH = "import sys; assert not {'torch', 'transformers', 'shapadapter'} & set(sys.modules)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    processor = Processor(size={"height": 32, "width": 32}, image_std=[0.3, 0.4, 0.5])
    families.build("vit", num_hidden_layers=1).save_pretrained("base")
    families.wrap(AutoModelForImageClassification.from_pretrained("base")).save_pretrained("out")
    processor.save_pretrained("base")
    processor.save_pretrained("out")
    matching.pictures(1, side=50)[0].save("photo.jpg")
    return tmp_path


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_block_runs(folder, capsys):
    names: dict = {}
    for block in blocks():
        if "onnxruntime" in block:
            end = f"{NOT_TORCH}\nnp.savez('found.npz', pixels=pixels, attributions=attributions, null=null_values, logits=logits)"
            done = subprocess.run([sys.executable, "-c", block + end], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            names["pixels"] = np.load("found.npz")["pixels"]
        else:
            exec(compile(block, str(PAGE), "exec"), names)
    said = explain(names["model"], "photo.jpg", names["processor"])
    found = np.load("found.npz")
    expected = said.attributions.flatten(1, 2)
    torch.testing.assert_close(torch.from_numpy(found["attributions"]), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["null"] + found["attributions"].sum(1), found["logits"], atol=1e-5)
    torch.testing.assert_close(names["output"]["attributions"], expected, atol=1e-4, rtol=0)
    best = said.top(1)[0][0].label
    assert done.stdout.startswith(best)
    assert f"\n{best} " in f"\n{capsys.readouterr().out}"
    assert names["answer"][0]["label"] == best
    assert json.loads(Path("onnx/config.json").read_text())["id2label"]["0"] == "ant"
    assert Path("why.png").is_file()
