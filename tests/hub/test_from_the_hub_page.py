"""The tutorial on the Hub: what the author does and what others do, against the local server and with a tiny model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from PIL import Image
from server import OWNER
from tiny import save_base
from transformers import AutoImageProcessor, AutoModelForImageClassification

from shapadapter import ShapleyConfig, explain

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "from-the-hub.md"


@pytest.fixture
def code():
    return [
        block.replace("you/", f"{OWNER}/") for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    ]


def test_every_block_runs(online, tmp_path, monkeypatch, code):
    for name in ("onnx", "onnxscript", "onnxruntime", "gradio"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    save_base("base", seed=5)
    torch.manual_seed(3)
    wrapped = get_peft_model(AutoModelForImageClassification.from_pretrained("base"), ShapleyConfig(r=2))
    wrapped.save_pretrained("out")
    processor = AutoImageProcessor.from_pretrained("base")
    processor.save_pretrained("out")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    for label, picture in zip(("one", "two"), pixels, strict=False):
        Path("photos/test", label).mkdir(parents=True)
        Image.fromarray(picture).save(f"photos/test/{label}/1.png")
    Image.fromarray(pixels[2]).save("photo.png")
    expected = explain(wrapped, "photo.png", processor)

    begin = next(place for place, block in enumerate(code) if block.startswith("import shapadapter\n"))
    author: dict = {}
    for block in code[:begin]:
        exec(compile(block, str(PAGE), "exec"), author)
    assert author["commit"] == online.commit(f"{OWNER}/digits")
    pushed = online.files(f"{OWNER}/digits")
    assert {"adapter_model.safetensors", "README.md"} < set(pushed)
    assert sum(name.startswith("explanations/") for name in pushed) == 2
    assert f'"{OWNER}/digits"' in pushed["README.md"].decode()
    assert "model.safetensors" in online.files(f"{OWNER}/digits-base")

    # Others: nothing of the author's is left, neither names nor folders nor what was downloaded.
    for folder in ("out", "base", "photos"):
        Path(folder).rename(tmp_path.parent / f"{tmp_path.name}-{folder}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    others: dict = {}
    for block in code[begin:-1]:
        exec(compile(block, str(PAGE), "exec"), others)
    assert list((tmp_path / "elsewhere").glob(f"models--{OWNER}--digits*"))
    assert torch.equal(others["explanation"].logits, expected.logits)
    assert torch.equal(others["explanation"].attributions, expected.attributions)
    assert others["best"]["label"] == expected.top(1)[0][0].label
    for made in ("why.png", "overlay.png", "onnx/model.onnx", "space/app.py"):
        assert Path(made).is_file()
    app = online.files(f"{OWNER}/digits-demo", kind="space")
    assert any(author["commit"].encode() in file for file in app.values())
    assert online.repos["space", f"{OWNER}/digits-demo"].private

    # The author again, some day later.
    for folder in ("out", "base"):
        (tmp_path.parent / f"{tmp_path.name}-{folder}").rename(folder)
    exec(compile(code[-1], str(PAGE), "exec"), {})
    assert online.titles(f"{OWNER}/digits", "longer")[0] == "Trained for longer"
    assert online.commit(f"{OWNER}/digits") == author["commit"]
