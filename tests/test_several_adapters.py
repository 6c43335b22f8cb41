"""Several adapters on one model: all parts of it belong to one of them, or nothing happens."""

import copy
import functools
import warnings

import families
import pytest
import torch
from families import LABELS, base, images, shapley, stir
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import delete_adapter, set_adapter
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers import AutoModelForImageClassification

from shapadapter import ShapleyConfig, explain
from shapadapter.core.errors import CheckpointError, ShapleyError

CLASSIFIES = {"prediction": "classifier", "train_classifier": True}
FORMS = {
    "vote": ({}, {}),
    "classifier": (CLASSIFIES, CLASSIFIES),
    "both": (CLASSIFIES, {}),
    "frozen": ({"tune": "frozen"}, {}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def run(model, **kwargs):
    with torch.no_grad():
        return model(pixel_values=images(), **kwargs)


def same(one, other):
    return torch.equal(one.logits, other.logits) and torch.equal(one.attributions, other.attributions)


def close(one, other):
    return all(torch.allclose(getattr(one, f), getattr(other, f), atol=1e-4) for f in ("logits", "attributions"))


@torch.no_grad()
def trained(model, names=("one", "two")):
    """Each adapter with weights of its own, copies of the classifier included."""
    for seed, name in enumerate(names):
        stir(model, seed, only=name)
        for path, parameter in model.named_parameters():
            if f"modules_to_save.{name}." in path:
                parameter.add_(1.0 + seed)
    return model.eval()


@functools.cache
def _pair(form):
    first, second = FORMS[form]
    model = get_peft_model(base("vit"), ShapleyConfig(r=4, **first), adapter_name="one")
    model.add_adapter("two", ShapleyConfig(r=4, **second))
    return trained(model)


def pair(form="vote"):
    return copy.deepcopy(_pair(form))


@functools.cache
def _mixed_in(form):
    model = base("vit")
    for name, config in zip(("one", "two"), FORMS[form], strict=True):
        model.add_adapter(ShapleyConfig(r=4, **config), name)
    trained(model)
    model.set_adapter("one")
    return model


def mixed_in(form="vote"):
    """The same by transformers, without PEFT's wrapper."""
    return copy.deepcopy(_mixed_in(form))


def answers(model):
    """What each adapter says, the first one active again."""
    said = {}
    for name in ("two", "one"):
        model.set_adapter(name)
        said[name] = run(model)
    assert not close(said["one"], said["two"])
    return said


# -- refused before anything changes ----------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("make", [pair, mixed_in])
def test_two_at_once(make, form):
    model = make(form)
    expected = answers(model)["one"]
    tuner = model.base_model if isinstance(model, PeftModel) else model
    with pytest.raises(ShapleyError, match="One Shapley adapter"):
        tuner.set_adapter(["one", "two"])
    assert same(run(model), expected)
    tuner.set_adapter(["one"])
    assert same(run(model), expected)


def test_an_unknown_adapter():
    model = pair()
    expected = run(model)
    with pytest.raises(ValueError, match="'one', 'two'"):
        model.base_model.set_adapter("three")
    assert same(run(model), expected)


@pytest.mark.parametrize("make", [pair, mixed_in])
def test_a_batch_of_several_adapters(make):
    model = make()
    expected = run(model)
    for names in (["one", "two"], ["two", "two"], ["one", "__base__"]):
        with pytest.raises(ShapleyError, match="once for each adapter"):
            run(model, adapter_names=names)
    assert same(run(model), expected)


@every_form
def test_a_weighted_sum(form):
    model = pair(form)
    expected, names = run(model), {name for name, _ in model.named_parameters()}
    for kind in ("linear", "cat", "svd"):
        with pytest.raises(ShapleyError, match="heads and tokens"):
            model.base_model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum", combination_type=kind)
    assert set(model.peft_config) == {"one", "two"}
    assert {name for name, _ in model.named_parameters()} == names
    assert same(run(model), expected)


@pytest.mark.parametrize("names", [["two"], ["one", "two"], ["three"]])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_what_is_not_active(method, names):
    model = pair("classifier")
    expected = answers(model)
    with pytest.raises(ShapleyError, match="Only the active adapter"):
        getattr(model, method)(adapter_names=names)
    assert same(run(model), expected["one"])
    model.set_adapter("two")
    merged = model.merge_and_unload(adapter_names=["two"])
    assert torch.allclose(run(merged).logits, expected["two"].logits, atol=1e-4)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_fails(method, safe):
    """In the last layer: those before it would be merged already."""
    model = pair("classifier")
    last = model.base_model.model.vit.layers[1].attention.v_proj
    with torch.no_grad():
        last.lora_B["one"].weight[0, 0] = torch.nan
    if not safe:
        last.lora_bias["one"], last.base_layer.bias = True, None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)):
        getattr(model, method)(safe_merge=safe)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) or name.endswith("lora_B.one.weight") for name in before)
    assert model.get_model_status().merged_adapters == []
    with torch.no_grad():
        last.lora_B["one"].weight[0, 0] = 0.0
    assert run(model).attributions.isfinite().all()


def test_weight_conversion(tmp_path):
    model = pair()
    model.save_pretrained(tmp_path / "first")
    with pytest.raises(CheckpointError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(
            tmp_path / "second", path_initial_model_for_weight_conversion=str(tmp_path / "first" / "one")
        )


# -- done rightly -----------------------------------------------------------------------------------------------------


@every_form
def test_merged_and_taken_back(form):
    model = pair(form)
    said = answers(model)
    for name in ("one", "two"):
        model.set_adapter(name)
        model.merge_adapter()
        status = model.get_model_status()
        has_lora = model.peft_config[name].tune == "lora"
        assert status.merged_adapters == ([name] if has_lora else [])
        assert status.enabled is True
        assert close(run(model), said[name])
        model.unmerge_adapter()
        assert model.get_model_status().merged_adapters == []
        assert close(run(model), said[name])
    model.merge_adapter(["two"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is unmerged
        model.set_adapter("one")
    assert close(run(model), said["one"])
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.allclose(run(model).logits, run(base("vit")).logits, atol=1e-4)
    assert model.get_model_status().merged_adapters == []
    assert close(run(model), said["one"])


@every_form
@pytest.mark.parametrize("gone", ["one", "two"])
def test_deleting_the_active_one(form, gone):
    model = pair(form)
    said, (left,) = answers(model), {"one", "two"} - {gone}
    model.set_adapter(gone)
    with pytest.warns(UserWarning, match=f"{left!r} is the active adapter now"):
        model.delete_adapter(gone)
    assert model.active_adapter == left
    assert same(run(model), said[left])
    if form != "both":  # PEFT says "irregular" where a copy of a module is another adapter's, for plain LoRA as well
        assert model.get_model_status().active_adapters == [left]


def test_deleting_where_layers_would_choose_differently():
    """By name "a" comes first, but it has no LoRA: each layer, left to itself, would choose "b"."""
    model = get_peft_model(base("vit"), ShapleyConfig(r=4), adapter_name="z")
    model.add_adapter("a", ShapleyConfig(tune="frozen"))
    model.add_adapter("b", ShapleyConfig(r=4))
    trained(model, ("z", "a", "b"))
    model.set_adapter("a")
    expected = run(model)
    model.set_adapter("z")
    with pytest.warns(UserWarning, match="'a' is the active adapter now"):
        model.delete_adapter("z")
    assert same(run(model), expected)


@every_form
def test_disabled_and_enabled_by_transformers(form):
    model = mixed_in(form)
    said = answers(model)
    plain = run(base("vit")).logits
    for name in ("one", "two"):
        model.set_adapter(name)
        model.disable_adapters()
        assert torch.equal(run(model).logits, plain)
        model.enable_adapters()
        assert same(run(model), said[name])


def test_an_exception_while_disabled():
    model = pair("classifier")
    said = answers(model)
    with pytest.raises(KeyboardInterrupt), model.disable_adapter():
        raise KeyboardInterrupt
    assert same(run(model), said["one"])


def test_plain_lora_beside_it():
    model = mixed_in()
    said = answers(model)
    alone = base("vit")
    alone.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "plain")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "plain")
    for wrapped in (alone, model):
        with torch.no_grad():
            for path, parameter in wrapped.named_parameters():
                if ".plain." in path:
                    parameter.fill_(0.3)
    assert torch.equal(run(model).logits, run(alone).logits)
    model.set_adapter("two")
    assert same(run(model), said["two"])


# -- roads that pass the Shapley layer by -----------------------------------------------------------------------------


def _functional(model):
    with pytest.raises(ShapleyError):
        set_adapter(model, ["one", "two"])


def _layers_alone(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter("two")


def _merged_alone(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge(adapter_names=["two"])


def _loaded_plain(model):
    plain = LoraConfig(r=4, target_modules=["q_proj"])
    model.load_adapter(peft_config=plain, adapter_state_dict={}, adapter_name="plain")


@pytest.mark.parametrize("road", [_functional, _layers_alone, _merged_alone, _loaded_plain])
def test_parts_of_different_adapters_do_not_answer(road):
    model = mixed_in()
    said = answers(model)
    road(model)
    with pytest.raises(ShapleyError, match=r"set_adapter\('one'\)"):
        run(model)
    model.set_adapter("one")
    assert close(run(model), said["one"])


def test_deleted_by_a_function():
    model = mixed_in()
    said = answers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        delete_adapter(model, "one", prefix="lora_")
    assert same(run(model), said["two"])


# -- classes and tasks ------------------------------------------------------------------------------------------------


def test_each_adapter_has_its_own_classes(tmp_path):
    """The names are in the base model's config, where the last adapter that was loaded would have the say."""
    names = {0: "low", 1: "middle", 2: "high"}
    base("vit").save_pretrained(tmp_path / "base")
    for folder, labels in (("one", LABELS), ("two", names)):
        plain = AutoModelForImageClassification.from_pretrained(
            tmp_path / "base", id2label=labels, num_labels=len(labels), ignore_mismatched_sizes=True
        )
        plain.config.problem_type = "regression" if folder == "two" else None
        stir(get_peft_model(plain, ShapleyConfig(r=4))).save_pretrained(tmp_path / folder)
    model = PeftModel.from_pretrained(base("vit"), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    for name, labels, task in (("one", LABELS, None), ("two", names, "regression"), ("one", LABELS, None)):
        model.set_adapter(name)
        assert list(explain(model, images(), top_k=None).labels) == list(labels.values())
        assert model.config.problem_type == task
    model.save_pretrained(tmp_path / "both")
    assert model.peft_config["one"].problem_type is None
    assert model.peft_config["two"].problem_type == "regression"


# -- optimizers of PEFT -----------------------------------------------------------------------------------------------


def test_lorafa_is_refused():
    model = pair()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(ShapleyError, match="create_lorafa_optimizer"):
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable


def test_loraplus_trains_all_of_it():
    model = families.wrap("vit")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    output = model(pixel_values=images(), labels=torch.tensor([0, 1]))
    (output.loss + output.attributions.square().mean()).backward()
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert shapley(model).active == "default"
