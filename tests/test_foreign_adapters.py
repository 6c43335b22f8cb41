"""Adapters from elsewhere: their configuration runs no code and names nothing unknown, on any road."""

import json
import shutil
import sys

import families
import pytest
from peft import AutoPeftModel, PeftConfig, PeftModel
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from shapadapter import ShapleyConfig, ShapleyError, load
from shapadapter.hub import push
from shapadapter.hub.space import write_space


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter beside its base model."""
    root = tmp_path_factory.mktemp("saved")
    families.base("vit").save_pretrained(root / "base")
    ViTImageProcessorPil(size={"height": families.SIDE, "width": families.SIDE}).save_pretrained(root / "base")
    model = families.wrap(AutoModelForImageClassification.from_pretrained(root / "base"))
    model.save_pretrained(root / "adapter")
    ViTImageProcessorPil(size={"height": families.SIDE, "width": families.SIDE}).save_pretrained(root / "adapter")
    return root


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(saved / "adapter", tmp_path / "adapter")


def change(adapter, **fields):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def base(adapter):
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return AutoModelForImageClassification.from_pretrained(name)


ROADS = {
    "load": load,
    "pipeline": lambda adapter: pipeline("image-attribution", model=str(adapter)),
    "PeftConfig": lambda adapter: PeftConfig.from_pretrained(str(adapter)),
    "ShapleyConfig": lambda adapter: ShapleyConfig.from_pretrained(str(adapter)),
    "PeftModel": lambda adapter: PeftModel.from_pretrained(base(adapter), str(adapter)),
    "AutoPeftModel": lambda adapter: AutoPeftModel.from_pretrained(str(adapter)),
    "second adapter": lambda adapter: families.wrap(base(adapter)).load_adapter(str(adapter), "second"),
    "transformers": lambda adapter: AutoModelForImageClassification.from_pretrained(str(adapter)),
    "load_adapter": lambda adapter: base(adapter).load_adapter(str(adapter)),
    "push": lambda adapter: push(adapter, "ada/never"),
    "space": lambda adapter: write_space(adapter, adapter.parent / "space"),
}


@pytest.mark.parametrize("road", ROADS)
def test_no_road_imports_a_module_that_a_file_names(road, adapter, tmp_path, monkeypatch):
    """Megatron's options make PEFT import a module, which may lie in the working folder."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "core.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for fields in (
        {"megatron_config": {"x": 1}, "megatron_core": "megatron.core"},
        {"megatron_config": None, "megatron_core": "megatron.evil"},
    ):
        change(adapter, **fields)
        with pytest.raises(ShapleyError, match="megatron_config and megatron_core must be left as they are"):
            ROADS[road](adapter)
    assert not (tmp_path / "ran").exists()
    assert "megatron" not in sys.modules


@pytest.mark.parametrize("road", ROADS)
def test_what_is_not_known_is_refused_by_name(road, adapter):
    change(adapter, lora_novelty=True, peft_version="9.9.9")
    with pytest.raises(ShapleyError, match=r"holds 'lora_novelty'.*PEFT 9\.9\.9: if they are newer, pip install --up"):
        ROADS[road](adapter)


def test_in_code_an_unknown_option_is_what_it_is_in_python():
    with pytest.raises(TypeError, match="lora_novelty"):
        ShapleyConfig(lora_novelty=True)
    with pytest.raises(ValueError, match="megatron_config"):
        ShapleyConfig(megatron_config={"x": 1})
