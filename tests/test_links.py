"""Links in a folder of an adapter or of its base: what they lead to is neither read, nor published, nor overwritten."""

import json
import shutil
import warnings
from pathlib import Path

import families
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from shapadapter import CheckpointError, ShapleyConfig, ShapleyTrainer, ShapleyTrainingArguments, explain, load
from shapadapter.core.files import refuse_links
from shapadapter.hub import push, update_card
from shapadapter.hub.load import AdapterFiles
from shapadapter.hub.space import push_space, write_space

SECRET = "PRIVATE KEY of mine"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter, with its card and a picture, beside its base model."""
    root = tmp_path_factory.mktemp("saved")
    processor = ViTImageProcessorPil(size={"height": families.SIDE, "width": families.SIDE})
    families.base("vit").save_pretrained(root / "base")
    model = families.wrap(AutoModelForImageClassification.from_pretrained(root / "base"))
    model.save_pretrained(root / "adapter")
    for folder in ("adapter", "base"):
        processor.save_pretrained(root / folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    update_card(root / "adapter", images=[Image.fromarray(pixels)])
    return root


@pytest.fixture
def root(saved, tmp_path):
    """A copy of it that may be changed, beside a file and a folder that are nobody's business."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secrets").mkdir()
    shutil.copy(tmp_path / "adapter" / "explanations" / "explanation-1.png", tmp_path / "secrets")
    return tmp_path


def link(path, target):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


def holding(folder, text=SECRET):
    """Files below a folder that hold a text, those that are links left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path.name for path in files if text.encode() in path.read_bytes()]


ROADS = {
    "load": load,
    "push": lambda adapter: push(adapter, "ada/never"),
    "space": lambda adapter: write_space(adapter, adapter.parent / "space", copy_base=True),
    "card": update_card,
    "config": lambda adapter: ShapleyConfig.from_pretrained(str(adapter)),
}
NAMES = (
    "README.md",
    "tokenizer.json",
    "vocab.txt",
    "adapter_model.safetensors",
    "adapter_config.json",
    "evaluation.json",
    "explanations",
    "explanations/explanation-1.png",
    "chat_templates",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("road", ROADS)
def test_a_link_out_of_the_folder_is_named(road, name, root):
    adapter = root / "adapter"
    target = root / ("secrets" if name in ("explanations", "chat_templates") else "secret")
    if Path(name).suffix in (".safetensors", ".json", ".png") and (adapter / name).exists():
        target = Path(shutil.copy(adapter / name, root / f"whole-{Path(name).name}"))  # which could be read
    link(adapter / name, target)
    with pytest.raises(
        CheckpointError, match=rf"adapter/{name} is a link that leads out of .*adapter, .*delete the link"
    ):
        ROADS[road](adapter)
    assert not (root / "space").exists()


def test_links_by_other_ways_are_links(root):
    adapter = root / "adapter"
    for target in ("../secret", "../adapter/../secret", "nowhere/../../secret", str(root / "secret"), "/no/such/file"):
        link(adapter / "README.md", target)
        with pytest.raises(CheckpointError, match=r"README\.md is a link"):
            load(adapter)
    link(adapter / "README.md", "README.md")  # to itself
    with pytest.raises(CheckpointError, match=r"README\.md is a link"):
        load(adapter)
    link(adapter / "README.md", link(adapter / "second", root / "secret").name)  # over a link that is inside
    with pytest.raises(CheckpointError, match="is a link"):
        load(adapter)


def test_subfolders_and_processors_beside(root):
    shutil.copytree(root / "adapter", root / "many" / "best")
    (root / "many" / "best" / "preprocessor_config.json").unlink()
    shutil.copy(root / "base" / "preprocessor_config.json", root / "many")
    load(root / "many", subfolder="best")
    load(root / "many" / "best")
    link(root / "many" / "vocab.txt", root / "secret")
    for folder, more in ((root / "many", {"subfolder": "best"}), (root / "many" / "best", {})):
        with pytest.raises(CheckpointError, match=r"many/vocab\.txt is a link"):
            load(folder, **more)
    (root / "many" / "vocab.txt").unlink()
    link(root / "many" / "other", root / "adapter")
    with pytest.raises(CheckpointError, match="many/other is a link"):
        load(root / "many", subfolder="other")


def test_the_base_has_no_links_either(root):
    link(root / "base" / "vocab.txt", root / "secret")
    (root / "adapter" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"base/vocab\.txt is a link"):
        load(root / "adapter")
    with pytest.raises(CheckpointError, match=r"base/vocab\.txt is a link"):
        write_space(root / "adapter", root / "space", copy_base=True)


def test_what_is_linked_rightly_is_read(root):
    """The Hub's cache, a folder that is a link as a whole, links inside the folder, and links to folders of no concern."""
    expected = load(root / "adapter")[0].state_dict()
    cache = root / "models--ada--birds"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "0123" / "explanations").mkdir(parents=True)
    for number, path in enumerate(path for path in (root / "adapter").rglob("*") if path.is_file()):
        shutil.copy(path, cache / "blobs" / str(number))
        inner = path.relative_to(root / "adapter")
        up = "../" * (len(inner.parts) + 1)
        (cache / "snapshots" / "0123" / inner).symlink_to(f"{up}blobs/{number}")
    link(root / "mine", root / "adapter")
    own = Path(shutil.copytree(root / "adapter", root / "own"))
    (own / "README.md").rename(own / "card.md")
    link(own / "README.md", "card.md")
    link(own / "runs", root / "secrets")
    link(root / "adapter-base", root / "base")
    for folder in (cache / "snapshots" / "0123", root / "mine", own):
        model, _ = load(folder, base=root / "adapter-base")
        assert all((model.state_dict()[name] == value).all() for name, value in expected.items())
        space = write_space(folder, root / f"space-{folder.name}", copy_base=True)
        assert (space / "adapter" / "adapter_model.safetensors").is_file()
        assert not any(path.is_symlink() for path in space.rglob("*"))
    refuse_links(cache / "snapshots" / "0123")
    link(cache / "snapshots" / "0123" / "vocab.txt", "../../../secret")  # beside blobs is not in blobs
    with pytest.raises(CheckpointError, match="is a link"):
        AdapterFiles("x", cache / "snapshots" / "0123").config()


def test_a_space_with_links_is_not_pushed(root):
    space = write_space(root / "adapter", root / "space", copy_base=True)
    for name in ("README.md", "adapter/tokenizer.json", "examples", "base/deep/x.txt"):
        copy = Path(shutil.copytree(space, root / "copy"))
        (copy / name).parent.mkdir(exist_ok=True)
        link(copy / name, root / ("secrets" if name == "examples" else "secret"))
        with pytest.raises(CheckpointError, match=f"{name} is a link"):
            push_space(copy, "ada/space")
        shutil.rmtree(copy)


def test_saving_does_not_write_through_links(root):
    """Into a folder with links that somebody left there, with PEFT and with transformers."""
    model, processor = load(root / "adapter")
    bare = AutoModelForImageClassification.from_pretrained(root / "base")
    bare.add_adapter(ShapleyConfig(r=2))
    for number, one in enumerate((model, bare)):
        folder = root / f"new-{number}"
        folder.mkdir()
        for name in ("README.md", "adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json"):
            link(folder / name, root / "secret")
        with pytest.warns(UserWarning, match="was a link that led out"):
            one.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert (root / "secret").read_text() == SECRET
        assert not holding(folder)
        assert not any(path.is_symlink() for path in folder.iterdir())
        load(folder)


def test_a_trainer_pushes_no_link(root, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(one), "label": number % 2} for number, one in enumerate(pixels)]
    model = families.wrap(AutoModelForImageClassification.from_pretrained(root / "base")).train()
    processor = ViTImageProcessorPil(size={"height": families.SIDE, "width": families.SIDE})
    out = root / "out"
    arguments = ShapleyTrainingArguments(out, use_cpu=True, report_to="none", hub_model_id="ada/run", card_images=0)
    trainer = ShapleyTrainer(model, arguments, train_dataset=rows, processing_class=processor)
    trainer.hub_model_id = "ada/run"
    out.mkdir(exist_ok=True)
    for name in ("evaluation.json", "explanations/deep.png"):
        (out / name).parent.mkdir(exist_ok=True)
        link(out / name, root / "secret")
        link(out / "README.md", root / "secret")
        with (
            pytest.raises(CheckpointError, match=f"out/{name} is a link"),
            pytest.warns(UserWarning, match="was a link"),
        ):
            trainer.push_to_hub()
        (out / name).unlink()
    assert not holding(out)
    assert not list(out.glob("_push-*"))


@pytest.mark.usefixtures("quick_evaluation")
def test_evaluations_write_through_no_link(root):
    from shapadapter.cli.evaluate import evaluate_checkpoint

    model, processor = load(root / "adapter")
    noise = np.random.default_rng(0)
    for name in model.config.id2label.values():
        (root / "data" / name).mkdir(parents=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / "data" / name / "1.png")
    output = root / "evaluation"
    output.mkdir()
    link(output / "records", root / "secrets")
    with pytest.raises(CheckpointError, match="evaluation/records is a link"):
        evaluate_checkpoint(root / "adapter", root / "data", None, ("random",), output, images=2)
    (output / "records").unlink()
    for name in (".curves.png", "curves.png", "table.md"):
        link(output / name, root / "secret")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate_checkpoint(root / "adapter", root / "data", None, ("random",), output, images=2)
    assert (root / "secret").read_text() == SECRET
    explain(model, [Image.new("RGB", (32, 32))], processor).save(output)
    assert (root / "secret").read_text() == SECRET
