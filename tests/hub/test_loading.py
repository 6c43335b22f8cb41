"""`load` by a name on the Hub: which base it takes, and what it says where something is missing."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from server import STRANGERS_TOKEN, TOKEN
from tiny import BASE, NAMES, save_base, with_code
from transformers import AutoModelForImageClassification

import shapadapter
from shapadapter import CheckpointError, ShapleyConfig, ShapleyError
from shapadapter.cli.evaluate import evaluate_checkpoint
from shapadapter.evaluation import evaluator

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def wrapped(name=BASE, config=None, **options):
    base = AutoModelForImageClassification.from_pretrained(name, **options)
    return get_peft_model(base, config or ShapleyConfig(r=2)).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=PIXELS).logits


@pytest.fixture
def adapter(online, tmp_path):
    """An adapter of `ada/tiny-vit` in a folder, and a function that puts a changed copy of it on the server."""
    folder = tmp_path / "adapter"
    wrapped().save_pretrained(folder)

    def put(name, without=(), more=None, **fields):
        files = {
            path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in without
        }
        if "adapter_config.json" in files:
            files["adapter_config.json"] = json.dumps(json.loads(files["adapter_config.json"]) | fields).encode()
        online.add(name, {**files, **(more or {})})
        return name

    put.folder = folder
    return put


def test_the_base_of_the_recorded_commit_is_taken_after_it_moved(online, tmp_path):
    first = online.add("ada/moving", save_base(tmp_path / "one"))
    model = wrapped("ada/moving")
    assert model.peft_config["default"].revision == first
    model.save_pretrained(tmp_path / "adapter")
    second = online.add("ada/moving", save_base(tmp_path / "two", seed=1))
    assert torch.equal(logits(shapadapter.load(tmp_path / "adapter")[0]), logits(model))
    assert torch.equal(logits(AutoPeftModel.from_pretrained(tmp_path / "adapter")), logits(model))
    for load in (
        lambda: AutoModelForImageClassification.from_pretrained(tmp_path / "adapter"),  # takes the main branch
        lambda: PeftModel.from_pretrained(
            AutoModelForImageClassification.from_pretrained("ada/moving"), tmp_path / "adapter"
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        said = str(caught.value)
        assert f"Expected those of 'ada/moving' at revision {first}, got ada/moving at revision {second}." in said
        assert f"from_pretrained('ada/moving', revision='{first}')" in said
    # Now both commits are in the cache; the model's weights tell of which it is.
    assert wrapped("ada/moving", revision=first).peft_config["default"].revision == first
    assert wrapped("ada/moving").peft_config["default"].revision == second


def test_the_same_weights_at_another_commit_are_the_same_base(online, tmp_path):
    first = online.add("ada/described", save_base(tmp_path / "base"))
    model = wrapped("ada/described")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "README.md").write_text("Now with a card.")
    second = online.add("ada/described", tmp_path / "base")
    assert first != second
    base = AutoModelForImageClassification.from_pretrained("ada/described")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["revision"] == first


def test_what_the_user_says_about_the_revision_comes_first(online, tmp_path):
    online.add("ada/tagged", save_base(tmp_path / "base"))
    online.repos["model", "ada/tagged"].refs["v1"] = online.commit("ada/tagged")
    model = wrapped("ada/tagged", ShapleyConfig(r=2, revision="v1"), revision="v1")
    assert model.peft_config["default"].revision == "v1"
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(shapadapter.load(tmp_path / "adapter")[0]), logits(model))


def test_a_folder_has_no_commit(online, tmp_path):
    assert wrapped(save_base(tmp_path / "base")).peft_config["default"].revision is None


def test_a_new_classifier_finds_room(online, tmp_path):
    config = ShapleyConfig(r=2, prediction="classifier", modules_to_save=["classifier"])
    model = wrapped(BASE, config, num_labels=5, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "five")
    online.add("ada/five", tmp_path / "five")
    loaded, _ = shapadapter.load("ada/five", device="cpu", dtype="bfloat16")
    assert loaded.get_base_model().vit.embeddings.cls_token.dtype == torch.bfloat16
    assert torch.equal(logits(shapadapter.load("ada/five")[0]), logits(model))
    assert logits(model).shape == (2, 5)


def test_evaluate_takes_a_name_on_the_hub(adapter, tmp_path, monkeypatch):
    (tmp_path / "data" / NAMES[1]).mkdir(parents=True)
    Image.new("RGB", (32, 32), (80, 10, 200)).save(tmp_path / "data" / NAMES[1] / "0.png")
    seen = []

    def measured(*arguments, **_):
        seen.extend(arguments)
        raise StopIteration

    monkeypatch.setattr(evaluator, "evaluate", measured)
    with pytest.raises(StopIteration):
        evaluate_checkpoint(adapter("ada/evaluated"), tmp_path / "data", None, ("equal",), None)
    model, rows, processor = seen
    assert torch.equal(logits(model), logits(shapadapter.load(adapter.folder)[0]))
    assert [row["label"] for row in rows] == [1]
    assert processor.size["height"] == 32


def test_what_is_missing_is_said_with_what_to_type(adapter, online, tmp_path):
    lora = get_peft_model(AutoModelForImageClassification.from_pretrained(BASE), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    online.add("ada/lora", tmp_path / "lora")
    online.add("ada/hidden", {"x": b""}, private=True)
    online.add("ada/gated", {"x": b""})
    online.repos["model", "ada/gated"].gated = True
    weights = adapter.folder / "adapter_model.safetensors"
    online.add("ada/pickled-base", {"config.json": online.files(BASE)["config.json"], "pytorch_model.bin": b""})
    cases = {
        "ada/nothing": ("There is no repository ada/nothing at http", "hf auth login"),
        "nothing": ("There is no folder nothing here", "no repository nothing"),
        "./nothing": ("There is no folder ./nothing",),
        "no/such/folder": ("There is no folder no/such/folder",),
        "not a name": ("cannot be the name of a repository",),
        "ada/gated": ("is gated: accept its conditions",),
        BASE: (f"{BASE} holds no adapter",),
        "ada/lora": ("adapter of type LORA", "AutoPeftModel"),
        adapter("ada/pickle", {weights.name}, {"adapter_model.bin": b""}): ("is a pickle", "save_pretrained(folder)"),
        adapter("ada/empty", {weights.name}): ("The adapter is incomplete",),
        adapter("ada/cut", (), {weights.name: weights.read_bytes()[:-9]}): ("is damaged",),
        adapter("ada/homeless", base_model_name_or_path=None): ("does not name its base model", "base=..."),
        adapter("ada/lost", base_model_name_or_path="ada/gone"): (
            "base model ada/gone of",
            "no repository",
            "base=...",
        ),
        adapter("ada/path", base_model_name_or_path="/home/ada/base"): (
            "a local folder on its author's machine",
            "base_repo_id",
        ),
        adapter("ada/squashed", revision="0" * 40): (f"no revision {'0' * 40}", f"load(..., base='{BASE}')"),
        adapter("ada/on-bin", base_model_name_or_path="ada/pickled-base", revision=None): (
            "ada/pickled-base has no safetensors file",
            "from_pretrained('ada/pickled-base').save_pretrained('base')",
        ),
    }
    for name, words in cases.items():
        with pytest.raises(ShapleyError) as caught:
            shapadapter.load(name, token=STRANGERS_TOKEN)
        said = str(caught.value)
        assert all(word in said for word in words), said
        assert STRANGERS_TOKEN not in said
        assert TOKEN not in said
    for options, words in {
        ("ada/cut", ("revision", "nope")): "has no revision nope",
        (str(adapter.folder), ("revision", "main")): "is a folder here",
        (str(adapter.folder), ("base", "./nowhere")): "holds no model",
        (str(adapter.folder), ("device", "cuda:99")): "no device 'cuda:99'",
        (str(adapter.folder), ("dtype", "int8")): "must be a torch.dtype",
        ("ada/hidden", ("token", STRANGERS_TOKEN)): "it is private and you may not see it",
    }.items():
        name, (option, value) = options
        with pytest.raises(ShapleyError, match=words):
            shapadapter.load(name, **{option: value})


def test_offline_says_so(adapter, monkeypatch):
    loaded = logits(shapadapter.load(adapter("ada/before"))[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(logits(shapadapter.load("ada/before")[0]), loaded)
    with pytest.raises(ShapleyError, match=r"ada/later was not loaded before, .* HF_HUB_OFFLINE=1 forbids it"):
        shapadapter.load("ada/later")


def test_an_unreachable_hub_says_so(online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ShapleyError, match="there is no connection to it"):
        shapadapter.load("ada/later")


def test_code_of_the_base_runs_only_if_that_is_asked_for(adapter, online, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    trace = tmp_path / "it-ran"
    online.add("ada/own-code", with_code(online.files(BASE), trace))
    mapping = {"base_model_class": "OwnModel", "parent_library": "transformers_modules.ada.own"}
    adapter("ada/on-code", base_model_name_or_path="ada/own-code", revision=None, auto_mapping=mapping)
    with pytest.raises(ShapleyError, match="code of its own") as caught:
        shapadapter.load("ada/on-code")
    assert "trust_remote_code=True" in str(caught.value)
    assert not trace.exists()
    loaded, _ = shapadapter.load("ada/on-code", trust_remote_code=True)
    assert trace.exists()
    assert torch.equal(logits(loaded), logits(shapadapter.load(adapter.folder)[0]))


def test_code_of_the_base_s_processor_is_code_of_the_base(adapter, online, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    trace, files = tmp_path / "it-ran", online.files(BASE)
    about = json.loads(files["preprocessor_config.json"]) | {"auto_map": {"AutoImageProcessor": "seeing.Own"}}
    about["image_processor_type"] = "Own"
    code = f"open({str(trace)!r}, 'w').close()\nfrom transformers import ViTImageProcessor\nclass Own(ViTImageProcessor): pass\n"
    more = {"preprocessor_config.json": json.dumps(about).encode(), "seeing.py": code.encode()}
    online.add("ada/own-sight", {**files, **more})
    adapter("ada/on-sight", base_model_name_or_path="ada/own-sight", revision=None)
    with pytest.raises(
        ShapleyError, match=r"base model ada/own-sight comes with code of its own.*trust_remote_code=True"
    ):
        shapadapter.load("ada/on-sight")
    assert not trace.exists()
    _, processor = shapadapter.load("ada/on-sight", trust_remote_code=True)
    assert trace.exists()
    assert type(processor).__name__ == "Own"


def test_code_that_comes_with_an_adapter_never_runs(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("nobody is asked either"))
    trace, file = tmp_path / "it-ran", adapter.folder / "preprocessor_config.json"
    (adapter.folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Own: pass\n")
    file.write_text(json.dumps({"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}))
    for trust in (False, True):
        with pytest.raises(ShapleyError, match="comes with code of its own, which is not run"):
            shapadapter.load(adapter.folder, trust_remote_code=trust)
    assert not trace.exists()


@pytest.mark.parametrize("content", ['{"peft_type": "SHAP', "[]"])
def test_a_damaged_configuration_is_named(adapter, content):
    (adapter.folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json of .* is damaged"):
        shapadapter.load(adapter.folder)


def test_an_adapter_in_a_subfolder_is_pointed_at(adapter, tmp_path):
    shutil.copytree(adapter.folder, tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ShapleyError, match=r"holds no adapter.* There is one in .*checkpoint-3"):
        shapadapter.load(tmp_path / "run")
