"""Cards through the real client: what is pushed has one, and what was edited on the Hub stays."""

import json
import warnings
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from server import TOKEN
from test_trainer import tiny_vit, trainer_of, wrapped
from tiny import BASE
from transformers import AutoModelForImageClassification

from shapadapter import ShapleyConfig
from shapadapter.hub import push, update_card
from shapadapter.training.checkpoints import damage_in


def text_of(name, revision="main") -> str:
    text = Path(HfApi().hf_hub_download(name, "README.md", revision=revision)).read_text()
    ModelCard(text)
    return text


def edit(name, change):
    card = ModelCard.load(name)
    HfApi().upload_file(path_or_fileobj=change(str(card)).encode(), path_in_repo="README.md", repo_id=name)


def my_words(card):
    return card.replace("library_name", "license: mit\nlibrary_name", 1) + "\nEdited on the Hub.\n"


@pytest.mark.parametrize("road", ["peft", "mixin", "save"])
def test_a_pushed_model_has_our_card_and_edits_on_the_hub_stay(online, tmp_path, monkeypatch, road):
    monkeypatch.chdir(tmp_path)
    name = f"ada/card-{road}"
    model = wrapped(base=tiny_vit())
    model.save_pretrained(tmp_path / "here")
    if road != "peft":
        model = tiny_vit()
        model.load_adapter(str(tmp_path / "here"))

    def pushed(**options):
        if road == "save":
            model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id=name)
        else:
            model.push_to_hub(name, **options)

    pushed(tags=["asked"])
    card = text_of(name)
    assert f'shapadapter.load("{name}")' in card
    assert "This is the model card of a" not in card
    assert "More Information Needed" not in card
    assert ("asked" in ModelCard(card).data.tags) == (road != "save")
    assert sorted(online.files(name)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    edit(name, my_words)
    config = model.peft_config["default"]
    config.record = {**config.record, "about": {"model_name": "Another name"}}
    pushed()
    card = text_of(name)
    assert "Edited on the Hub." in card
    assert "# Another name" in card
    assert ModelCard(card).data.license == "mit"
    assert ("asked" in ModelCard(card).data.tags) == (road != "save")
    assert TOKEN not in card


def test_a_branch_and_a_pull_request_have_cards(online):
    model = wrapped()
    model.push_to_hub("ada/branches")
    edit("ada/branches", my_words)
    model.push_to_hub("ada/branches", revision="v2", private=True, commit_message="second")
    card = text_of("ada/branches", "v2")
    assert 'shapadapter.load("ada/branches", revision="v2")' in card
    assert "Edited on the Hub." in card
    config = model.peft_config["default"]
    config.record = {**config.record, "about": {"model_name": "Another name"}}
    model.push_to_hub("ada/branches", create_pr=True)
    assert 'shapadapter.load("ada/branches")' in text_of("ada/branches", "refs/pr/1")


def test_models_of_other_kinds_are_pushed_as_ever(online):
    tiny_vit().push_to_hub("ada/plain")
    assert "This is the model card of a" in text_of("ada/plain")


def test_the_trainer_s_pushes_have_cards_and_pictures(online, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "ada/run", "hub_strategy": "every_save", "hub_always_push": True}
    trainer = trainer_of(
        tmp_path / "out", card_images=4, save_strategy="steps", save_steps=1, max_steps=2, hub_token=TOKEN, **options
    )
    trainer.train()
    card = text_of("ada/run")
    assert 'shapadapter.load("ada/run")' in card
    assert "2 steps" in card
    edit("ada/run", my_words)
    trainer.push_to_hub(license="apache-2.0", tags=["colours"], dataset="ada/colours")
    card = text_of("ada/run")
    assert "Edited on the Hub." in card
    data = ModelCard(card).data
    assert (data.license, data.datasets) == ("mit", ["ada/colours"])
    assert "colours" in data.tags
    pictures = [path for path in online.files("ada/run") if path.startswith("explanations/")]
    assert len(pictures) == 4
    assert card.count("](explanations/") == 4
    # Loaded from the Hub and pushed there again, the pictures are still shown, though they are not here.
    config = trainer.model.peft_config["default"]
    config.source = None
    trainer.model.push_to_hub("ada/run")
    assert text_of("ada/run").count("](explanations/") == 4
    trainer.model.push_to_hub("ada/elsewhere")
    assert "](explanations/" not in text_of("ada/elsewhere")


def test_the_trainer_pushes_the_adapter_that_it_trains(online, tmp_path):
    base = AutoModelForImageClassification.from_pretrained(BASE)
    model = wrapped(base=base)
    model.add_adapter("second", ShapleyConfig(r=2))
    model.set_adapter("second")
    out = tmp_path / "out"
    options = {"push_to_hub": True, "hub_model_id": "ada/second", "hub_strategy": "every_save", "hub_token": TOKEN}
    trainer = trainer_of(out, model, card_images=4, save_strategy="steps", save_steps=2, max_steps=2, **options)
    trainer.train()
    assert online.files("ada/second")["adapter_model.safetensors"] == weights(out / "checkpoint-2" / "second")
    about = {"checkpoint": str(out), "folder": str(tmp_path / "images")}
    (out / "second").mkdir()
    (out / "second" / "evaluation.json").write_text(json.dumps({"about": about}))
    trainer.push_to_hub()
    pushed = online.files("ada/second")
    assert pushed["adapter_model.safetensors"] == weights(out / "second") != weights(out)
    assert json.loads(pushed["adapter_config.json"])["r"] == 2
    assert text_of("ada/second").count("](explanations/") == 4
    assert "LoRA of rank 2" in text_of("ada/second")
    assert 'shapadapter.load("ada/second")' in text_of("ada/second")
    assert not any("second/" in path for path in pushed)
    assert json.loads(pushed["evaluation.json"])["about"] == {"checkpoint": "out", "folder": "images"}
    assert json.loads((out / "second" / "evaluation.json").read_text())["about"] == about
    update_card(out / "checkpoint-2" / "second", images=[trainer.eval_dataset[0]["image"]])
    assert damage_in(out / "checkpoint-2") is None
    assert "](explanations/" in (out / "checkpoint-2" / "second" / "README.md").read_text()
    assert "LoRA of rank 4" in (out / "README.md").read_text()  # the other adapter's card


def weights(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_pushed_folder_keeps_what_was_edited_on_either_side(online, tmp_path):
    base = tiny_vit()
    base.name_or_path = "ada/tiny-vit"
    model = wrapped(base=base)
    model.save_pretrained(tmp_path)
    push(tmp_path, "ada/folder")
    edit("ada/folder", my_words)
    push(tmp_path, "ada/folder")
    assert "Edited on the Hub." in text_of("ada/folder")
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nEdited here.\n")
    with pytest.warns(UserWarning, match="were both edited"):
        push(tmp_path, "ada/folder")
    assert "Edited here." in text_of("ada/folder")
    (tmp_path / "generation.json").write_text("{}")
    with warnings.catch_warnings():  # what was pushed before is no edit of somebody else's
        warnings.simplefilter("error", UserWarning)
        push(tmp_path, "ada/folder", revision="again")
