"""A base model that was saved under a path of another system, another folder or another machine is found."""

import json
import os

import families
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from shapadapter import ShapleyError, load

PICTURE = Image.new("RGB", (families.SIDE, families.SIDE), "teal")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """`models/base` and `out`, where they were made, and a base beside the adapter; with what the model says."""
    root = tmp_path_factory.mktemp("somewhere") / "project"
    for place in (root / "models" / "base", root / "beside"):
        families.base("vit").save_pretrained(place)
    model = families.wrap(AutoModelForImageClassification.from_pretrained(root / "beside"))
    model.save_pretrained(root / "out")
    ViTImageProcessorPil(size={"height": families.SIDE, "width": families.SIDE}).save_pretrained(root / "out")
    (root.parent / "elsewhere").mkdir()
    return root, model.state_dict()


@pytest.fixture(params=["project", "elsewhere"])
def saved_as(request, project, monkeypatch):
    """A function that gives the base another name, and the adapter's folder as it is called from the working folder."""
    root, _ = project
    monkeypatch.chdir(root.parent / request.param)

    def rename(name):
        file = root / "out" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
        return os.path.relpath(root / "out")

    return rename


@pytest.mark.parametrize(
    "name",
    [
        "models/base",
        "./models/base",
        "../project/models/base",
        "models\\base",
        ".\\models\\base",
        "C:\\Users\\me\\models\\beside",
        "C:/Users/me/beside",
        "\\\\server\\share\\beside",
        "/home/me/beside/",
        "some\\where\\beside\\",
    ],
)
def test_the_base_is_found_by_load_and_by_pipeline(project, saved_as, name):
    folder = saved_as(name)
    model, _ = load(folder, device="cpu")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in project[1].items())
    if name in ("models/base", "C:/Users/me/beside"):
        found = pipeline("image-attribution", model=folder)(PICTURE)
        assert found[0]["label"] in model.config.id2label.values()


def test_where_it_is_nowhere_the_place_for_it_is_named(project, saved_as):
    folder = saved_as("C:\\Users\\me\\gone")
    for road in (load, lambda name: pipeline("image-attribution", model=name)):
        with pytest.raises(
            ShapleyError, match=r"is not there\. Put its folder beside the adapter, as /.*/project/gone\."
        ):
            road(folder)
