"""The page on sharing: every code block runs, in order, against the local Hub and with a tiny model."""

import re
import shlex
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from server import OWNER, STRANGER
from tiny import BASE, save_base
from transformers import AutoImageProcessor, AutoModelForImageClassification
from typer.testing import CliRunner

from shapadapter import ShapleyConfig
from shapadapter.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "share.md"
HERE = {
    "you/": f"{OWNER}/",
    "somebody/": f"{STRANGER}/",
    '"google/vit-base-patch16-224"': f'"{BASE}"',
    '"run", push_to_hub=True': '"run", max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, '
    "push_to_hub=True",
}


def blocks():
    found = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for old, new in HERE.items():
        assert any(old in code for _, code in found), f"the page no longer says {old}"
        found = [(kind, code.replace(old, new)) for kind, code in found]
    return found


def test_every_block_runs(online, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in pixels]
    processor = AutoImageProcessor.from_pretrained(BASE)
    save_base("my-base", seed=5)
    for base, folder in ((BASE, "out"), ("my-base", "my-adapter")):
        wrapped = get_peft_model(AutoModelForImageClassification.from_pretrained(base), ShapleyConfig(r=2))
        wrapped.save_pretrained(folder)
        processor.save_pretrained(folder)
    online.add(f"{STRANGER}/vit-beans", {"README.md": b"An adapter that could be better."})
    rows = [{"image": image, "label": index % 3} for index, image in enumerate(images)]
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(BASE), ShapleyConfig(r=2))
    names = {"model": model, "processor": processor, "images": images, "train": rows}
    found = blocks()
    assert {kind for kind, _ in found} == {"python", "bash"}
    for kind, code in found:
        if kind == "python":
            exec(compile(code, str(PAGE), "exec"), names)
        else:
            command, *arguments = shlex.split(code)
            assert command == "shapadapter"
            ran = CliRunner().invoke(app, arguments)
            assert ran.exit_code == 0, ran.output
    assert isinstance(names["model"], PeftModel)
    assert names["explanation"].attributions.shape == (4, 4, 4, 3)
    assert names["address"] == f"{online.url}/{STRANGER}/vit-beans/discussions/1"
    assert "adapter_config.json" in online.files(f"{STRANGER}/vit-beans", "refs/pr/1")
    assert "adapter_config.json" not in online.files(f"{STRANGER}/vit-beans")
    assert f"{BASE} {online.commit(BASE)}" in capsys.readouterr().out
    assert online.titles("ada/vit-beans", "v2")[0] == "Trained for longer"
    assert online.repos["model", "ada/vit-beans-draft"].private
    assert "Training in progress, step 1" in online.titles("ada/vit-run")
    assert (
        online.files("ada/vit-run")["adapter_model.safetensors"] == Path("run/adapter_model.safetensors").read_bytes()
    )
    assert {"adapter_model.safetensors", "README.md"} <= set(online.files("ada/vit-from-memory"))
    assert torch.equal(*(weights(online, name) for name in ("ada/vit-beans", "ada/vit-beans-draft")))
    assert "model.safetensors" in online.files("ada/vit-mine-base")


def weights(hub, name):
    from safetensors.torch import load

    return torch.cat(
        [tensor.flatten() for _, tensor in sorted(load(hub.files(name)["adapter_model.safetensors"]).items())]
    )
