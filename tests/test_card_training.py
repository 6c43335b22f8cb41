"""The model card on every road by which an adapter is saved, and what the trainer knows for it."""

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from test_trainer import images, tiny_vit, wrapped
from test_trainer import trainer_of as without_pictures
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from shapadapter import ShapleyError, evaluate
from shapadapter.adapter.saving import read_config, replace_function, weights_digest
from shapadapter.hub import update_card
from shapadapter.hub.card.document import untouched
from shapadapter.training.checkpoints import damage_in

NAMES = {0: "red <b>", 1: "green | x", 2: "blue"}


def trainer_of(*given, **options):
    return without_pictures(*given, **{"card_images": 4, **options})


def card_of(folder) -> str:
    text = (Path(folder) / "README.md").read_text()
    ModelCard(text)
    return text


def record_of(folder) -> dict:
    return read_config(Path(folder))["record"]


class Measuring:
    """An evaluator with another number each time."""

    images, calls = 2, 0

    def __call__(self, model, dataset, processor):
        self.calls += 1
        return {"error": self.calls / 8, "equivalent_evaluations": 64.0}


@pytest.fixture(scope="module")
def evaluation():
    """Of a model with four players, which takes a second."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = wrapped(base=ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    options = {"images": 2, "budgets": (4, 8), "progress": False}
    return evaluate(model, images(6), processor, methods=(), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training with checkpoints, evaluations and pictures; its base model is beside it."""
    place = tmp_path_factory.mktemp("run")
    base = tiny_vit(id2label=NAMES)
    base.save_pretrained(place / "base")
    model = wrapped(base=ViTForImageClassification.from_pretrained(place / "base"))
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(place / "out", model, max_steps=2, hub_token="hf_secret", run_name="host-of-ada", **options)
    trainer.evaluator = Measuring()
    trainer.train()
    trainer.save_model()
    trainer.eval_dataset[0]["image"].save(place / "photo.jpg")
    return trainer, place


def test_a_training_writes_what_it_knows(run):
    trainer, place = run
    for folder in (place / "out", place / "out" / "checkpoint-1"):
        card, record = card_of(folder), record_of(folder)
        assert "12 training images, 6 held-out images" in card
        assert "4 x 4 patches" in card
        assert "| `shapley_weight` | `10.0` |" in card
        assert "Relative L2 error to the true Shapley values" in card
        assert record["versions"]["torch"] == torch.__version__
        text = json.dumps(record) + card
        assert not any(word in text for word in ("hf_secret", "host-of-ada", str(place), os.uname().nodename))
    assert record["training"]["steps"] == 1
    assert record_of(place / "out")["training"]["steps"] == 2
    logged = [entry for entry in trainer.state.log_history if "eval_error" in entry]
    assert record_of(place / "out")["metrics"]["values"]["eval_error"] == logged[-1]["eval_error"]
    assert record["metrics"]["values"]["eval_error"] == logged[0]["eval_error"]


def test_pictures_are_drawn_at_the_end_and_not_in_checkpoints(run):
    _, place = run
    files = sorted((place / "out" / "explanations").iterdir())
    assert [path.name for path in files] == [f"explanation-{number}.png" for number in range(1, 5)]
    for path in files:
        with Image.open(path) as picture:
            assert picture.size[0] > 700
            assert np.asarray(picture).std(axis=(0, 1)).min() > 20  # something is drawn
    assert card_of(place / "out").count("](explanations/explanation-") == 4
    assert not (place / "out" / "checkpoint-2" / "explanations").exists()
    assert "](explanations/" not in card_of(place / "out" / "checkpoint-2")


def test_the_snippets_run(run, monkeypatch, capsys):
    _, place = run
    monkeypatch.chdir(place)
    blocks = re.findall(r"```python\n(.*?)```", card_of("out").split("## Results")[0], re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    assert "torch.Size([1, 4, 4, 3])" in capsys.readouterr().out
    assert Path("why.html").is_file()


def test_an_edited_card_does_not_break_a_checkpoint(run):
    _, place = run
    folder = place / "out" / "checkpoint-2"
    card = card_of(folder)
    (folder / "README.md").write_text(card.replace("## Data", "## My data"))
    assert damage_in(folder) is None
    (folder / "README.md").unlink()
    assert damage_in(folder) is None


def test_results_and_pictures_come_later(run, evaluation, tmp_path):
    _, place = run
    folder = place / "out" / "checkpoint-1"
    evaluation.save(tmp_path / "evaluation.json")
    card = update_card(folder, evaluation=tmp_path / "evaluation.json", images=[place / "photo.jpg"]).read_text()
    assert f"| Accuracy ↑ | {evaluation.task['accuracy'].mean:.3f}" in card
    assert "Time, over the plain forward pass" in card
    assert card.count("](explanations/explanation-") == 1
    assert damage_in(folder) is None
    assert str(tmp_path) not in json.dumps(record_of(folder))
    # It travels: with the weights to another folder, by another road.
    other = ViTForImageClassification.from_pretrained(place / "base")
    PeftModel.from_pretrained(other, folder).save_pretrained(tmp_path / "again")
    assert record_of(tmp_path / "again") == record_of(folder)
    assert (tmp_path / "again" / "explanations" / "explanation-1.png").is_file()
    assert "Time, over the plain forward pass" in card_of(tmp_path / "again")
    assert "](explanations/" not in update_card(folder, images=[]).read_text()
    assert not list((folder / "explanations").iterdir())
    with pytest.raises(ShapleyError, match="holds no adapter"):
        update_card(tmp_path)


def test_a_broken_checkpoint_is_not_declared_whole(run):
    _, place = run
    folder = place / "out" / "checkpoint-2"
    content = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(content[:-1])
    update_card(folder)
    assert "optimizer.pt" in damage_in(folder)
    (folder / "optimizer.pt").write_bytes(content)


def test_saving_the_same_weights_again_keeps_what_was_added(run, evaluation):
    trainer, place = run
    update_card(place / "out", evaluation=evaluation)
    trainer.save_model()
    assert "Time, over the plain forward pass" in card_of(place / "out")
    trainer.create_model_card(license="mit", tags="mine", model_name="Colours", dataset=["ada/colours"], language="en")
    card = card_of(place / "out")
    assert card.count("# Colours\n") == 1
    assert "Time, over the plain forward pass" in card
    data = ModelCard(card).data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["ada/colours"])
    assert {"mine", "shapadapter"} <= set(data.tags)
    trainer.save_model()
    assert ModelCard(card_of(place / "out")).data.license == "mit"


def test_other_weights_have_other_results(run, tmp_path):
    _, place = run
    loaded = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(place / "base"), place / "out")
    assert loaded.peft_config["default"].source == place / "out"
    with torch.no_grad():
        next(p for name, p in loaded.named_parameters() if "lora_shapley" in name).add_(0.1)
    loaded.save_pretrained(tmp_path)
    assert "Nothing is measured yet" in card_of(tmp_path)
    assert "The weights have changed" in card_of(tmp_path)
    assert "](explanations/" not in card_of(tmp_path)
    assert "12 training images" in card_of(tmp_path)


def test_nobody_s_images_are_shown_if_that_is_not_wished(tmp_path):
    options = {"max_steps": 1, "eval_strategy": "no"}
    trainer = trainer_of(tmp_path / "out", **options)
    trainer.train()
    trainer.save_model()
    assert len(list((tmp_path / "out" / "explanations").iterdir())) == 4
    trainer = trainer_of(tmp_path / "out", card_images=0, **options)
    trainer.train()
    trainer.save_model()
    assert not list((tmp_path / "out" / "explanations").iterdir())
    assert "](explanations/" not in card_of(tmp_path / "out")
    with pytest.raises(ValueError, match="card_images"):
        trainer_of(tmp_path, card_images=-1)


def test_images_that_cannot_be_explained_do_not_stop_a_save(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    trainer.eval_dataset = [{"image": "nowhere.png", "label": 0}]
    with pytest.warns(UserWarning, match="The card has no pictures"):
        trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_best_weights_have_their_own_results(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(tmp_path, max_steps=3, **options, **best)  # the worst, which is an early one
    trainer.train()
    trainer.save_model()
    step = trainer.state.best_global_step
    assert step < 3
    wanted = next(entry for entry in trainer.state.log_history if entry.get("step") == step and "eval_loss" in entry)
    record = record_of(tmp_path)
    assert record["metrics"]["values"]["eval_loss"] == wanted["eval_loss"]
    assert record["metrics"]["step"] == record["training"]["steps"] == step


def test_every_road_has_the_card_and_what_the_user_changed_stays(tmp_path):
    model = wrapped()
    model.get_base_model().add_model_tags(["mine"])
    for road in ("peft", "mixin"):
        folder = tmp_path / road
        if road == "mixin":
            model = tiny_vit()
            model.load_adapter(str(tmp_path / "peft"))
        model.save_pretrained(folder)
        card = card_of(folder)
        assert "4 x 4 patches" in card
        assert f'shapadapter.load("{road}")' in card
        (folder / "README.md").write_text(card.replace("library_name", "license: mit\nlibrary_name") + "\nWords.\n")
        model.save_pretrained(folder)
        assert card_of(folder).rstrip().endswith("-->\n\nWords.")
        assert ModelCard(card_of(folder)).data.license == "mit"
    assert "mine" in ModelCard(card_of(tmp_path / "peft")).data.tags
    assert not untouched(card_of(tmp_path / "peft"))


def test_adapters_of_other_kinds_have_peft_s_card(tmp_path):
    model = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "shapadapter" not in card_of(tmp_path)
    assert "More Information Needed" in card_of(tmp_path)
    # What was such a form becomes a card.
    wrapped().save_pretrained(tmp_path)
    assert "More Information Needed" not in card_of(tmp_path)


def test_a_release_without_a_private_name_costs_no_more_than_a_card():
    class Own:
        pass

    replace_function(Own, "_upload_modified_files", print)
    assert not hasattr(Own, "_upload_modified_files")


def test_weights_are_known_by_their_numbers():
    tensors = {
        "a.lora_A.weight": torch.randn(2, 3),
        "b.lora_shapley_token": torch.randn(1, 1, 4),
        "c.bias": torch.ones(1),
    }
    half = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    assert weights_digest(tensors) == weights_digest(
        {f"x.{name}": value.double() for name, value in reversed(tensors.items())}
    )
    assert weights_digest(half) == weights_digest({name: value.float() for name, value in half.items()})
    assert weights_digest(tensors) != weights_digest({**tensors, "a.lora_A.weight": torch.zeros(2, 3)})
    assert weights_digest({"c.bias": torch.ones(1)}) is None


def test_a_resumed_training_counts_all_its_minutes(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, max_steps=1, **options).train()
    config = read_config(tmp_path / "checkpoint-1")
    config["record"]["training"]["minutes"] = 90
    (tmp_path / "checkpoint-1" / "adapter_config.json").write_text(json.dumps(config))
    trainer = trainer_of(tmp_path, max_steps=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert record_of(tmp_path / "checkpoint-2")["training"]["minutes"] >= 90


def test_a_quantity_has_a_card(tmp_path):
    options = {"max_steps": 1, "eval_strategy": "no"}
    data = images(6, labels=[float(index) for index in range(6)])
    model = wrapped(base=tiny_vit(1, problem_type="regression"))
    trainer = trainer_of(tmp_path, model, train=data, held_out=data, **options)
    trainer.train()
    trainer.save_model()
    card = card_of(tmp_path)
    assert "null value + contributions = prediction" in card
    assert "classes**" not in card
    assert card.count("](explanations/") == 4
