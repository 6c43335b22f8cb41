"""A classifier that is new is trained with the adapter, a pretrained one stays as it is."""

import copy
import logging

import pytest
import torch
import zoo
from families import MAKERS, base, images, stir
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessor

from shapadapter import ShapleyConfig, load
from shapadapter.core.errors import CheckpointError

PREDICTS = {"prediction": "classifier", "r": 4}


@pytest.fixture
def folder(tmp_path):
    base("vit").save_pretrained(tmp_path / "base")
    base("vit").vit.save_pretrained(tmp_path / "backbone")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    return tmp_path


def fresh(path, classes=7):
    return AutoModelForImageClassification.from_pretrained(path, num_labels=classes, ignore_mismatched_sizes=True)


def config_made():
    torch.manual_seed(0)
    return MAKERS["vit"]()


def replaced():
    model = ViTForImageClassification.from_pretrained(replaced.path)
    model.classifier = torch.nn.Linear(32, 5)
    return model


def run(model):
    with torch.no_grad():
        return model.eval()(pixel_values=images())


def trained_parts(model):
    """Names of the trainable parameters that are neither LoRA nor token and head."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return sorted(name.removeprefix("base_model.model.") for name in names if "lora_" not in name)


COPIES = ["classifier.modules_to_save.default.bias", "classifier.modules_to_save.default.weight"]


@pytest.mark.parametrize("kind", ["other classes", "backbone", "configuration", "copy", "replaced"])
@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_a_new_one_is_trained_and_that_is_said(folder, kind, tune, caplog):
    replaced.path = folder / "base"
    plain = {
        "other classes": lambda: fresh(folder / "base"),
        "backbone": lambda: fresh(folder / "backbone"),
        "configuration": config_made,
        "copy": lambda: copy.deepcopy(fresh(folder / "base")),
        "replaced": replaced,
    }[kind]()
    expected = run(plain).logits
    with caplog.at_level(logging.WARNING, "shapadapter"):
        model = get_peft_model(plain, ShapleyConfig(tune=tune, **PREDICTS))
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("shapadapter")]
    assert "new classifier" in said
    assert "train_classifier=False" in said
    assert trained_parts(model) == COPIES
    assert torch.allclose(run(model).logits, expected, atol=1e-5)
    model.train()(pixel_values=images(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "modules_to_save" in n)


@pytest.mark.parametrize("options", [{}, {"train_classifier": False}, {"prediction": "vote"}])
def test_others_stay_as_they_are(folder, options, caplog):
    plain = fresh(folder / "base", 7 if options else 5)
    with caplog.at_level(logging.WARNING, "shapadapter"):
        model = get_peft_model(plain, ShapleyConfig(**{**PREDICTS, **options}))
    assert trained_parts(model) == []
    assert not [record for record in caplog.records if record.name.startswith("shapadapter")]


def test_one_that_was_trained_since_stays_as_it_is(folder):
    """As in a notebook that trains a model and then explains it: no checkpoint has this classifier."""
    plain = fresh(folder / "backbone")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for _ in range(3):
        plain.train()(images(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert trained_parts(get_peft_model(plain, ShapleyConfig(**PREDICTS))) == []


def test_a_pretrained_one_is_trained_when_asked(folder):
    plain = fresh(folder / "base", 5)
    assert trained_parts(get_peft_model(plain, ShapleyConfig(train_classifier=True, **PREDICTS))) == COPIES
    with pytest.raises(ValueError, match="prediction='classifier'"):
        ShapleyConfig(train_classifier=True)


def test_full_training_can_leave_it(folder):
    for train, expected in ((None, True), (False, False)):
        config = ShapleyConfig(tune="full", train_classifier=train, **PREDICTS)
        model = get_peft_model(fresh(folder / "base"), config)
        assert any("classifier" in name for name in trained_parts(model)) == expected


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["classifier"]}, {"target_modules": ["q_proj", "classifier"]}]
)
def test_what_the_user_says_of_it_counts(folder, options, caplog):
    with caplog.at_level(logging.WARNING, "shapadapter"):
        model = get_peft_model(fresh(folder / "base"), ShapleyConfig(**PREDICTS, **options))
    assert trained_parts(model) == (COPIES if "modules_to_save" in options else [])
    assert not [record for record in caplog.records if record.name.startswith("shapadapter")]


def test_it_is_kept_in_the_adapter(folder):
    model = stir(get_peft_model(fresh(folder / "base"), ShapleyConfig(**PREDICTS)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
    expected = run(model)
    model.save_pretrained(folder / "adapter")
    roads = (
        lambda: PeftModel.from_pretrained(fresh(folder / "base"), folder / "adapter"),
        lambda: AutoModelForImageClassification.from_pretrained(
            folder / "adapter", num_labels=7, ignore_mismatched_sizes=True
        ),
        lambda: load(folder / "adapter")[0],
    )
    for road in roads:
        again = run(road())
        assert torch.allclose(again.logits, expected.logits, atol=1e-5)
        assert torch.allclose(again.attributions, expected.attributions, atol=1e-5)
    assert torch.allclose(run(model.merge_and_unload()).logits, expected.logits, atol=1e-4)


def test_an_adapter_of_before_still_loads(folder):
    """Its config knows no `train_classifier`, and its frozen classifier is the base model's."""
    fresh(folder / "base").save_pretrained(folder / "seven")
    model = stir(get_peft_model(fresh(folder / "seven"), ShapleyConfig(**PREDICTS)))
    assert trained_parts(model) == []
    expected = run(model)
    model.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"train_classifier": null,', ""))
    again = PeftModel.from_pretrained(fresh(folder / "seven"), folder / "adapter")
    assert torch.allclose(run(again).logits, expected.logits, atol=1e-5)
    with pytest.raises(CheckpointError, match="train_classifier=True"):
        PeftModel.from_pretrained(fresh(folder / "base"), folder / "adapter")


@pytest.mark.parametrize("name", ["levit_teacher", "swiftformer", "hgnet_v2", "resnet"])
@pytest.mark.parametrize("road", ["peft", "transformers"])
def test_other_families(tmp_path, name, road):
    """Several heads, heads within containers, names that end alike."""
    zoo.base(name).save_pretrained(tmp_path)
    plain = type(zoo.base(name)).from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    new = {n for n, p in plain.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
    assert new
    if road == "peft":
        model = get_peft_model(plain, ShapleyConfig(**PREDICTS))
    else:
        model = plain
        model.add_adapter(ShapleyConfig(**PREDICTS))
    assert {part.replace(".modules_to_save.default", "") for part in trained_parts(model)} == new


def test_it_learns_as_well_as_plain_lora(folder):
    """Four colours told apart: with a frozen random classifier both would stay far behind."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 7
    pixels = torch.randn(7, 3, 32, 32)[labels] + 0.5 * torch.randn(64, 3, 32, 32)

    def loss(make):
        torch.manual_seed(0)
        model = make(fresh(folder / "backbone"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(15):
            optimizer.zero_grad()
            model.train()(pixel_values=pixels, labels=labels).loss.backward()
            optimizer.step()
        with torch.no_grad():
            return model.eval()(pixel_values=pixels, labels=labels).loss.item()

    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    plain = loss(lambda base: get_peft_model(base, LoraConfig(modules_to_save=["classifier"], **lora)))
    ours = loss(lambda base: get_peft_model(base, ShapleyConfig(prediction="classifier", **lora)))
    frozen = loss(
        lambda base: get_peft_model(base, ShapleyConfig(prediction="classifier", train_classifier=False, **lora))
    )
    assert abs(ours - plain) < 0.1 * (frozen - plain)
