"""Every option of LoRA works on every road with the same numbers, or is refused when a model is wrapped."""

import re

import pytest
import torch
import zoo
from families import MAKERS, base, images, shapley, stir
from peft import (
    ArrowConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import preprocess_loraga
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from shapadapter import ShapleyConfig

OPTIONS = {
    "use_dora": {"use_dora": True},
    "use_dora_convolution": {"use_dora": True, "target_modules": ["projection", "q_proj"]},
    "use_rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "exclude_modules": {"exclude_modules": r".*\.1\..*"},
    "target_parameters": {"target_parameters": ["mlp.fc1.weight"]},
    "layers_to_transform": {"layers_to_transform": [1]},
    "modules_to_save": {"modules_to_save": ["layernorm"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "random": {"init_lora_weights": False},
}


EVA = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": lambda inputs, *_: inputs[0].flatten(0, -2)}


def run(model):
    with torch.no_grad():
        return model.eval()(pixel_values=images())


def close(one, other):
    return all(torch.allclose(getattr(one, f), getattr(other, f), atol=1e-4) for f in ("logits", "attributions"))


@torch.no_grad()
def trained(model):
    stir(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.add_(0.1)
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_all_roads_give_the_same_numbers(tmp_path, option):
    """Of DoRA transformers did not find the magnitudes, which PEFT saves under a name that is not their module's."""
    base("vit").save_pretrained(tmp_path / "base")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = trained(get_peft_model(plain, ShapleyConfig(r=4, **OPTIONS[option])))
    expected = run(model)
    model.save_pretrained(tmp_path / "adapter")
    assert close(run(PeftModel.from_pretrained(base("vit"), tmp_path / "adapter")), expected)
    assert close(run(AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")), expected)
    model.merge_adapter()
    assert close(run(model), expected)


def test_dora_saved_as_peft_does_still_loads(tmp_path):
    from safetensors.torch import save_file

    model = trained(get_peft_model(base("vit"), ShapleyConfig(r=4, use_dora=True)))
    expected = run(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    assert any(name.endswith("lora_magnitude_vector.weight") for name in weights)
    save_file({name.replace("vector.weight", "vector"): value for name, value in weights.items()}, path)
    assert close(run(PeftModel.from_pretrained(base("vit"), tmp_path)), expected)


@pytest.mark.parametrize(
    "options",
    [
        *({"init_lora_weights": start} for start in ("pissa", "pissa_niter_4", "olora", "corda", "nonsense")),
        {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
        {"kasa_config": KasaConfig()},
        {"alora_invocation_tokens": [1]},
        {"arrow_config": ArrowConfig()},
        {"layer_replication": [(0, 2)]},
        {"megatron_config": {"tensor_model_parallel_size": 1}},
    ],
    ids=lambda options: next(iter(options.values())) if "init_lora_weights" in options else next(iter(options)),
)
def test_refused_when_a_model_is_wrapped(options):
    plain = base("vit")
    before, modules = run(plain).logits, [name for name, _ in plain.named_modules()]
    with pytest.raises(ValueError, match=next(iter(options))):
        get_peft_model(plain, ShapleyConfig(**options))
    assert [name for name, _ in plain.named_modules()] == modules
    assert torch.equal(run(plain).logits, before)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_gradients_of_lora_ga_do_not_change_the_base():
    plain, config = base("vit"), ShapleyConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), r=2)
    config.target_modules = {"q_proj"}
    preprocess_loraga(plain, config, lambda: plain(images(), labels=torch.tensor([0, 1])).loss.backward())
    with pytest.raises(ValueError, match="lora_ga"):
        get_peft_model(plain, config)
    assert torch.equal(run(plain).logits, run(base("vit")).logits)


def test_eva(tmp_path):
    """It starts LoRA from what the layers see, and leaves the base as it is."""
    base("vit").save_pretrained(tmp_path / "base")
    config = ShapleyConfig(r=2, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(tmp_path / "base"), config)
    initialize_lora_eva_weights(model, [{"pixel_values": images(8, seed=seed)} for seed in range(3)], **EVA)
    expected = run(trained(model))
    model.save_pretrained(tmp_path / "adapter")
    assert close(run(PeftModel.from_pretrained(base("vit"), tmp_path / "adapter")), expected)
    assert close(run(AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")), expected)


def adapted(model):
    return sorted({name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name})


@pytest.mark.parametrize(
    ("options", "inside"),
    [
        ({"layers_to_transform": [1]}, "stages.1."),
        ({"layers_to_transform": 0}, "stages.0."),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, "layers.0."),
        ({"layers_to_transform": [1, 3], "layers_pattern": ["stages"]}, "stages.[13]."),
    ],
)
def test_chosen_layers_of_a_convolutional_model(tmp_path, options, inside):
    everywhere = adapted(get_peft_model(zoo.base("resnet"), ShapleyConfig(r=2)))
    model = get_peft_model(zoo.base("resnet"), ShapleyConfig(r=2, **options))
    assert adapted(model) == [name for name in everywhere if re.search(inside, name)]
    model.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(zoo.base("resnet"), tmp_path)) == adapted(model)


def test_excluded_convolutions_and_ranks():
    everywhere = adapted(get_peft_model(zoo.base("resnet"), ShapleyConfig(r=2)))
    options = {"exclude_modules": r".*stages\.0.*", "rank_pattern": {r".*stages\.1.*": 3}}
    model = get_peft_model(zoo.base("resnet"), ShapleyConfig(r=2, **options))
    assert adapted(model) == [name for name in everywhere if "stages.0" not in name]
    ranks = {name: p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if "stages.1" in name} == {3}


def test_no_layer_is_left():
    with pytest.raises(ValueError, match=r"layers_to_transform=\[9\]"):
        get_peft_model(zoo.base("resnet"), ShapleyConfig(layers_to_transform=[9]))


def test_chosen_layers_where_names_are_whole():
    """The text tower of a matching model has layers of the same names."""
    model = get_peft_model(zoo.base("clip_model"), ShapleyConfig(r=2, layers_to_transform=[1]))
    assert adapted(model)
    assert all("vision_model" in name and "layers.1." in name for name in adapted(model))


def test_what_cannot_be_adapted_leaves_the_model_as_it_was():
    """PEFT has put LoRA into some layers when it comes to one that it cannot adapt."""
    for wrap in (get_peft_model, lambda model, config: model.add_adapter(config)):
        plain = MAKERS["vit"]().eval()
        before, modules = run(plain).logits, [name for name, _ in plain.named_modules()]
        with pytest.raises(ValueError, match="LayerNorm"):
            wrap(plain, ShapleyConfig(r=2, target_modules=["q_proj", "layernorm_after"]))
        assert [name for name, _ in plain.named_modules()] == modules
        assert torch.equal(run(plain).logits, before)
        assert all(parameter.requires_grad for parameter in plain.parameters())
        wrap(plain, ShapleyConfig(r=2))
        assert shapley(plain).active == "default"


def test_a_second_adapter_that_fails_leaves_the_first():
    model = trained(get_peft_model(base("vit"), ShapleyConfig(r=2)))
    expected, names = run(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="LayerNorm"):
        model.add_adapter("other", ShapleyConfig(r=2, target_modules=["q_proj", "k_proj", "layernorm_after"]))
    assert [name for name, _ in model.named_modules()] == names
    assert set(model.peft_config) == {"default"}
    assert close(run(model), expected)
    model.add_adapter("other", ShapleyConfig(r=2))
    assert "other" in shapley(model).rules
