"""`push`: what it refuses, that it is all or nothing, and what the raw roads say about a base that is a folder."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from server import OWNER, STRANGERS_TOKEN, TOKEN
from tiny import BASE, save_base
from transformers import AutoImageProcessor, AutoModelForImageClassification

from shapadapter import CheckpointError, ShapleyConfig, ShapleyError, ShapleyTrainer, ShapleyTrainingArguments, load
from shapadapter.hub import push
from shapadapter.hub.space import write_space


def wrapped(base):
    return get_peft_model(AutoModelForImageClassification.from_pretrained(base), ShapleyConfig(r=2))


@pytest.fixture
def folders(online, tmp_path):
    """Adapters of a base on the Hub and of one in a folder; `changed` writes a copy with other fields in its config."""
    save_base(tmp_path / "base", seed=3)
    wrapped(BASE).save_pretrained(tmp_path / "adapter")
    wrapped(tmp_path / "base").save_pretrained(tmp_path / "own")
    return tmp_path


def changed(folder, name, **fields):
    copy = shutil.copytree(folder, folder.parent / name)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return copy


def test_what_others_could_not_load_is_refused(folders, online):
    before = set(online.repos)
    own = folders / "own"
    pickle = changed(folders / "adapter", "pickle")
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    cut = changed(folders / "adapter", "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    (folders / "bare").mkdir()
    shutil.copy(folders / "base" / "config.json", folders / "bare")
    cases = (
        (folders / "nowhere", {}, "There is no folder"),
        (folders / "base", {}, "holds no adapter"),
        (pickle, {}, "is a pickle"),
        (cut.parent, {}, "is damaged"),
        (own, {}, r"a folder on this computer, so nobody else could load .* base_repo_id='user/name"),
        (folders / "adapter", {"base_repo_id": "base"}, "on the Hub already: leave base_repo_id .--base-repo. out"),
        (folders / "adapter", {"revision": "x", "create_pr": True}, "leave revision out, or create_pr"),
        (changed(own, "homeless", base_model_name_or_path=None), {}, "does not name its base model"),
        (changed(own, "gone", base_model_name_or_path="/gone/away"), {"base_repo_id": "b"}, "is not there"),
        (
            changed(own, "bin", base_model_name_or_path=str(folders / "bare")),
            {"base_repo_id": "b"},
            "no safetensors file",
        ),
        (folders / "adapter", {"token": STRANGERS_TOKEN}, f"may not write to {OWNER}/refused"),
        (folders / "adapter", {"revision": "refs/pr/7"}, "has no revision refs/pr/7"),
    )
    for folder, options, words in cases:
        with pytest.raises(ShapleyError, match=words) as caught:
            push(folder, f"{OWNER}/refused", **options)
        assert not any(token in str(caught.value) for token in (TOKEN, STRANGERS_TOKEN))
    with pytest.raises(ShapleyError, match="cannot be the name of a repository"):
        push(folders / "adapter", "not a name")
    online.repos.pop(("model", f"{OWNER}/refused"), None)  # made before the branch was found missing
    assert set(online.repos) == before


@pytest.mark.parametrize("content", ["{", "[]", "null", "\udcff"])
def test_a_base_with_a_damaged_configuration_is_not_pushed(folders, online, content):
    before = set(online.repos)
    (folders / "base" / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"base/config\.json is damaged"):
        push(folders / "own", "pair", base_repo_id="pair-base")
    with pytest.raises(CheckpointError, match=r"base/config\.json is damaged"):
        write_space(folders / "own", folders / "space", copy_base=True)
    assert set(online.repos) == before


def test_a_script_beside_a_base_is_left_there(folders, online):
    (folders / "base" / "train.py").write_text("raise SystemExit")
    push(folders / "own", "scripted", base_repo_id="scripted-base")
    assert {"config.json", "model.safetensors"} <= set(online.files(f"{OWNER}/scripted-base"))
    assert "train.py" not in online.files(f"{OWNER}/scripted-base")


def test_a_base_that_changed_since_is_not_pushed(folders, online):
    save_base(folders / "base", seed=4)
    with pytest.raises(CheckpointError, match="made for another base model"):
        push(folders / "own", "pair", base_repo_id="pair-base")
    assert not {("model", f"{OWNER}/pair"), ("model", f"{OWNER}/pair-base")} & set(online.repos)


def test_a_push_that_fails_leaves_nothing_half_done(folders, online):
    push(folders / "adapter", "steady")
    before = online.commit(f"{OWNER}/steady")
    model, _ = load(folders / "adapter")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1)
    model.save_pretrained(folders / "better")
    online.broken = "/commit/"
    with pytest.raises(ShapleyError, match=r"Not pushed\. The Hub at .* answered 500"):
        push(folders / "better", "steady")
    online.broken = None
    assert online.commit(f"{OWNER}/steady") == before
    push(folders / "better", "steady", commit_message="Better")
    weights = (folders / "better" / "adapter_model.safetensors").read_bytes()
    assert online.files(f"{OWNER}/steady")["adapter_model.safetensors"] == weights
    assert online.titles(f"{OWNER}/steady")[:2] == ["Better", "Upload adapter"]


def test_branches_and_pull_requests(folders, online):
    assert push(folders / "adapter", "many") == f"{online.url}/{OWNER}/many"
    before = online.commit(f"{OWNER}/many")
    with pytest.raises(ShapleyError, match="holds these very files already"):
        push(folders / "adapter", "many", create_pr=True)
    evaluation = {"about": {"checkpoint": str(folders / "adapter"), "folder": "/home/me/photos", "seed": 0}}
    (folders / "adapter" / "evaluation.json").write_text(json.dumps(evaluation))
    assert push(folders / "adapter", "many", revision="v2") == f"{online.url}/{OWNER}/many/tree/v2"
    assert push(folders / "adapter", f"{OWNER}/many", create_pr=True) == f"{online.url}/{OWNER}/many/discussions/1"
    assert online.commit(f"{OWNER}/many") == before
    told = json.loads(online.files(f"{OWNER}/many", "v2")["evaluation.json"])
    assert told == {"about": {"checkpoint": "adapter", "folder": "photos", "seed": 0}}
    assert "evaluation.json" in online.files(f"{OWNER}/many", "refs/pr/1")


def test_the_raw_roads_warn_of_a_base_in_a_folder(folders, online):
    model = wrapped(folders / "base")
    with pytest.warns(UserWarning, match=r"a folder on this computer.* nobody else can load .*base_repo_id="):
        model.push_to_hub("raw")
    bare = AutoModelForImageClassification.from_pretrained(folders / "base")
    bare.add_adapter(ShapleyConfig(r=2))
    with pytest.warns(UserWarning, match="a folder on this computer"):
        bare.push_to_hub("raw-mixin")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*folder on this computer.*")
        wrapped(BASE).push_to_hub("raw-fine")


def test_a_trainer_goes_on_when_the_hub_does_not(folders, online, caplog):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(picture), "label": index % 3} for index, picture in enumerate(pixels)]
    arguments = ShapleyTrainingArguments(
        str(folders / "run"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        push_to_hub=True,
        hub_model_id="trained-on",
        hub_strategy="checkpoint",
        hub_always_push=True,
        hub_token=TOKEN,
    )
    processor = AutoImageProcessor.from_pretrained(BASE)
    trainer = ShapleyTrainer(wrapped(folders / "base"), arguments, train_dataset=rows, processing_class=processor)
    online.broken = "/commit/"
    trainer.train()
    online.broken = None
    assert re.search(r"A checkpoint was not pushed\. The Hub at .* answered 500", caplog.text)
    assert trainer.state.global_step == 2
    with pytest.warns(UserWarning, match="a folder on this computer"):
        trainer.push_to_hub()
    assert "adapter_model.safetensors" in online.files(f"{OWNER}/trained-on")
    # The whole checkpoint, which was asked for, is one from which a training goes on, and the token is not in it.
    trainer.publication.push_checkpoint(folders / "run" / "checkpoint-2")
    trainer.publication.finish()
    pushed = online.files(f"{OWNER}/trained-on")
    kept = {path.name for path in (folders / "run" / "checkpoint-2").iterdir()}
    assert {path.split("/")[1] for path in pushed if path.startswith("last-checkpoint/")} == kept
    assert "last-checkpoint/optimizer.pt" in pushed
    assert not any(TOKEN.encode() in data for data in pushed.values())
    assert torch.load(folders / "run" / "checkpoint-2" / "training_args.bin", weights_only=False).hub_token is None
    assert arguments.hub_token == TOKEN
