"""Every road by which PEFT and transformers make, save, load and take away an adapter."""

import copy
import pickle
import warnings

import families
import numpy as np
import pytest
import torch
from families import CLASSES, FAMILIES, LABELS, base, images, shapley, stir, wrap
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessor, ViTImageProcessorPil, pipeline

from shapadapter import ShapleyConfig, ShapleyOutput
from shapadapter.core.errors import CheckpointError, ShapleyError

FORMS = {
    "lora": {},
    "lora_no_token": {"shapley_token": False},
    "frozen": {"tune": "frozen"},
    "full": {"tune": "full"},
    "new_head": {"prediction": "classifier", "modules_to_save": ["classifier"]},
    "full_classifier": {"prediction": "classifier", "tune": "full"},
    "all_linear": {"target_modules": "all-linear"},
    "mask": {"removal": "mask", "prediction": "classifier"},
}
every_form = pytest.mark.parametrize("form", FORMS)


def run(model, **kwargs):
    with torch.no_grad():
        return model(pixel_values=images(), **kwargs)


def same(one, other):
    """Whether two outputs agree in every bit, explanation included."""
    fields = ("logits", "attributions", "null_values", "coalition_values")
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields)


def full_run(model):
    return run(model.eval(), coalitions=families.coalitions())


@pytest.fixture
def base_dir(tmp_path):
    return saved_base("vit", tmp_path)


def saved_base(family, folder):
    path = folder / f"base_{family}"
    base(family).save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return str(path)


def loaded_base(path, **kwargs):
    return AutoModelForImageClassification.from_pretrained(path, **kwargs)


@torch.no_grad()
def train(model, seed=0):
    """Change whatever the adapter says it trains, modules_to_save included."""
    stir(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def trained(path, form="lora", seed=0, **config):
    return train(get_peft_model(loaded_base(path), ShapleyConfig(r=4, **{**FORMS[form], **config})), seed)


# -- saving and loading -----------------------------------------------------------------------------------------------


def _peft(path, base_path):
    return PeftModel.from_pretrained(loaded_base(base_path), path)


def _peft_other_name(path, base_path):
    return PeftModel.from_pretrained(loaded_base(base_path), path, adapter_name="why")


def _peft_low_memory(path, base_path):
    return PeftModel.from_pretrained(loaded_base(base_path), path, low_cpu_mem_usage=True)


def _peft_trainable(path, base_path):
    return PeftModel.from_pretrained(loaded_base(base_path), path, is_trainable=True)


def _peft_config_given(path, base_path):
    return PeftModel.from_pretrained(loaded_base(base_path), path, config=PeftConfig.from_pretrained(path))


def _auto_peft(path, base_path):
    return AutoPeftModel.from_pretrained(path)


def _auto_transformers(path, base_path):
    return AutoModelForImageClassification.from_pretrained(path)


def _mixin_load(path, base_path):
    model = loaded_base(base_path)
    model.load_adapter(path)
    return model


def _mixin_load_other_name(path, base_path):
    model = loaded_base(base_path)
    model.load_adapter(path, adapter_name="why")
    return model


ROADS = {
    "peft": _peft,
    "peft_other_name": _peft_other_name,
    "peft_low_memory": _peft_low_memory,
    "peft_trainable": _peft_trainable,
    "peft_config_given": _peft_config_given,
    "auto_peft": _auto_peft,
    "auto_transformers": _auto_transformers,
    "mixin": _mixin_load,
    "mixin_other_name": _mixin_load_other_name,
}


@pytest.mark.parametrize("form", FORMS)
def test_reload_is_bit_identical(tmp_path, base_dir, form):
    """The plainest and the fullest form by every road, the others by one of PEFT and one of transformers."""
    model = trained(base_dir, form)
    expected = full_run(model)
    model.save_pretrained(tmp_path / "adapter")
    for road in ROADS if form in ("lora", "full_classifier") else ("peft", "auto_transformers"):
        assert same(full_run(ROADS[road](str(tmp_path / "adapter"), base_dir)), expected), road


@pytest.mark.families
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deit_teacher"])
def test_transformers_reloads_every_family(tmp_path, family):
    """But one: for DeiT's config the Auto class builds the model without the second head."""
    base_path = saved_base(family, tmp_path)
    model = trained(base_path, "lora")
    expected = full_run(model)
    model.save_pretrained(tmp_path / "adapter")
    assert same(full_run(_auto_transformers(str(tmp_path / "adapter"), base_path)), expected)


def test_reload_of_a_saved_reload(tmp_path, base_dir):
    model = trained(base_dir, "new_head")
    expected = full_run(model)
    for turn, road in enumerate(("peft_other_name", "auto_transformers", "mixin")):
        name = "why" if turn == 1 else None
        folder = tmp_path / f"turn{turn}"
        model.save_pretrained(folder)
        # PEFT writes adapters not called "default" into folders of their own.
        folder = folder / name if name and (folder / name).is_dir() else folder
        model = ROADS[road](str(folder), base_dir)
        assert same(full_run(model), expected)


def test_the_file_holds_the_adapter_alone(tmp_path, base_dir):
    model = trained(base_dir)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]


def test_saving_leaves_the_base_config_alone(tmp_path, base_dir):
    model = trained(base_dir)
    model.get_base_model().config.save_pretrained(tmp_path / "config")
    text = (tmp_path / "config" / "config.json").read_text()
    assert "shapadapter" not in text
    assert "_attn_implementation_internal" not in text


def test_config(tmp_path, base_dir):
    trained(base_dir, "new_head", head_width=8).save_pretrained(tmp_path / "adapter")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert type(config) is ShapleyConfig
    assert config.peft_type.value == "SHAPLEY"
    assert (config.prediction, config.tune, config.removal, config.head_width) == ("classifier", "lora", "drop", 8)
    assert (config.num_classes, config.id2label) == (CLASSES, LABELS)
    assert config.base_model_name_or_path == base_dir
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.auto_mapping["base_model_class"] == "ViTForImageClassification"
    assert config.inference_mode
    direct = ShapleyConfig.from_pretrained(str(tmp_path / "adapter"))
    assert direct.to_dict() == config.to_dict()


def test_the_users_config_is_not_written_to(base_dir):
    config = ShapleyConfig(r=4)
    before = copy.deepcopy(config.to_dict())
    first = get_peft_model(loaded_base(base_dir), config)
    after = config.to_dict()
    # PEFT itself notes the base model's name and class there.
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"base_model_name_or_path", "auto_mapping", "revision"}
    second = get_peft_model(base("dinov2"), config)
    assert first.peft_config["default"].base_fingerprint != second.peft_config["default"].base_fingerprint


def test_new_labels_come_back(tmp_path, base_dir):
    names = {0: "low", 1: "middle", 2: "high"}
    plain = loaded_base(base_dir, num_labels=3, id2label=names, ignore_mismatched_sizes=True)
    model = train(get_peft_model(plain, ShapleyConfig(r=4)))
    expected = full_run(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        loaded_base(base_dir, num_labels=3, ignore_mismatched_sizes=True), tmp_path / "adapter"
    )
    assert again.config.id2label == names
    assert again.config.label2id == {"low": 0, "middle": 1, "high": 2}
    assert same(full_run(again), expected)
    auto = AutoPeftModel.from_pretrained(tmp_path / "adapter", num_labels=3, ignore_mismatched_sizes=True)
    assert same(full_run(auto), expected)
    other = AutoModelForImageClassification.from_pretrained(
        tmp_path / "adapter", num_labels=3, ignore_mismatched_sizes=True
    )
    assert same(full_run(other), expected)
    assert other.config.id2label == names


# -- the transformers mixin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "frozen", "full_classifier", "new_head"])
def test_add_adapter_and_save(tmp_path, base_dir, form):
    model = loaded_base(base_dir)
    model.add_adapter(ShapleyConfig(r=4, **FORMS[form]))
    train(model)
    expected = full_run(model)
    assert isinstance(expected, ShapleyOutput)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    for road in ("peft", "mixin"):
        assert same(full_run(ROADS[road](str(tmp_path / "adapter"), base_dir)), expected), road


def test_auto_peft_loads_what_the_mixin_saved(tmp_path, base_dir):
    """AutoPeftModel finds the base class in `auto_mapping`, which PEFT fills in on its own roads only."""
    model = loaded_base(base_dir)
    model.add_adapter(ShapleyConfig(r=4))
    train(model).save_pretrained(tmp_path / "adapter")
    assert same(full_run(_auto_peft(tmp_path / "adapter", base_dir)), full_run(model))


def test_mixin_several_adapters(tmp_path, base_dir):
    plain = run(loaded_base(base_dir))
    paths, expected = [], []
    for seed, form in enumerate(("lora", "mask")):
        model = trained(base_dir, form, seed=seed)
        expected.append(full_run(model))
        model.save_pretrained(tmp_path / form)
        paths.append(str(tmp_path / form))
    model = loaded_base(base_dir)
    model.load_adapter(paths[0], adapter_name="one")
    model.load_adapter(paths[1], adapter_name="two")
    for name, output in (("one", expected[0]), ("two", expected[1]), ("one", expected[0])):
        model.set_adapter(name)
        assert same(full_run(model), output)
    model.disable_adapters()
    assert torch.equal(run(model).logits, plain.logits)
    model.enable_adapters()
    assert same(full_run(model), expected[0])
    model.delete_adapter("one")
    model.set_adapter("two")
    assert same(full_run(model), expected[1])
    model.delete_adapter("two")
    assert torch.equal(run(model).logits, plain.logits)


def test_pipeline(tmp_path, base_dir):
    model = trained(base_dir)
    model.save_pretrained(tmp_path / "adapter")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    classify = pipeline("image-classification", model=str(tmp_path / "adapter"))
    answer = classify(picture, top_k=CLASSES)
    processor = ViTImageProcessorPil.from_pretrained(base_dir)
    with torch.no_grad():
        expected = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
    assert {row["label"] for row in answer} == set(LABELS.values())
    for row in answer:
        index = {label: i for i, label in LABELS.items()}[row["label"]]
        assert row["score"] == pytest.approx(expected[index].item(), abs=2e-3)


# -- several adapters on one PeftModel --------------------------------------------------------------------------------


SECOND = {
    "classifier": {"prediction": "classifier", "target_modules": ["q_proj", "v_proj"]},
    "no_token": {"shapley_token": False, "target_modules": ["q_proj", "v_proj"]},
    "default_targets": {},
    "all_linear": {"target_modules": "all-linear"},
    "frozen": {"tune": "frozen"},
    "full": {"tune": "full"},
    "new_head": {"prediction": "classifier", "modules_to_save": ["classifier"], "target_modules": ["q_proj"]},
    "wider": {"head_width": 8, "target_modules": ["fc1"]},
}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lora", "classifier"),
        ("lora", "full"),
        ("frozen", "default_targets"),
        ("frozen", "full"),
        ("full", "frozen"),
        ("full", "all_linear"),
        ("new_head", "new_head"),
        ("new_head", "wider"),
    ],
)
def test_adding_a_second_adapter(tmp_path, base_dir, first, second):
    model = trained(base_dir, first)
    one = full_run(model)
    forms = (FORMS[first], SECOND[second])
    if {config.get("tune", "lora") for config in forms} == {"lora", "full"}:
        # PEFT would put LoRA inside the trained copy of the backbone, and could not save either adapter.
        with pytest.raises(ShapleyError, match="full"):
            model.add_adapter("other", ShapleyConfig(r=2, **SECOND[second]))
        assert same(full_run(model), one)
        return
    model.add_adapter("other", ShapleyConfig(r=2, **SECOND[second]))
    assert same(full_run(model), one)
    model.set_adapter("other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    two = full_run(model)
    assert not same(two, one)
    for name, expected in (("default", one), ("other", two), ("default", one)):
        model.set_adapter(name)
        assert same(full_run(model), expected)
    model.save_pretrained(tmp_path / "both")
    for folder, expected in ((tmp_path / "both", one), (tmp_path / "both" / "other", two)):
        assert same(full_run(_peft(folder, base_dir)), expected)
        assert same(full_run(_auto_transformers(folder, base_dir)), expected)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert same(full_run(model), two)
    assert not any(".default" in name for name, _ in model.named_parameters())
    assert "default" not in shapley(model).rules


def test_loading_a_second_adapter(tmp_path, base_dir):
    expected = {}
    for seed, form in enumerate(("lora", "new_head", "all_linear", "frozen")):
        model = trained(base_dir, form, seed=seed)
        expected[form] = full_run(model)
        model.save_pretrained(tmp_path / form)
    model = PeftModel.from_pretrained(loaded_base(base_dir), tmp_path / "lora", adapter_name="first")
    for form in ("new_head", "all_linear", "frozen"):
        model.load_adapter(tmp_path / form, adapter_name=form)
    for name in ("frozen", "first", "all_linear", "new_head"):
        model.set_adapter(name)
        assert same(full_run(model), expected["lora" if name == "first" else name]), name
    with model.disable_adapter():
        assert torch.equal(run(model).logits, run(loaded_base(base_dir)).logits)


def test_deleting_the_last_adapter(base_dir):
    model = trained(base_dir)
    plain = run(loaded_base(base_dir))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    # Not `model(...)`: without an adapter PEFT itself raises KeyError there, for plain LoRA too.
    assert torch.equal(run(model.base_model.model).logits, plain.logits)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_second_adapter_trains_the_same_layers_as_a_first(base_dir, targets):
    alone = get_peft_model(loaded_base(base_dir), ShapleyConfig(target_modules=targets))
    model = trained(base_dir)
    model.add_adapter("other", ShapleyConfig(target_modules=targets))
    expected = {name.replace(".default", "") for name, _ in alone.named_parameters() if ".default" in name}
    got = {name.replace(".other", "") for name, _ in model.named_parameters() if ".other" in name}
    assert got == expected


def test_two_adapters_at_once_are_refused(base_dir):
    model = trained(base_dir)
    model.add_adapter("other", ShapleyConfig(target_modules=["q_proj"]))
    with pytest.raises(ShapleyError, match="One Shapley adapter"):
        model.base_model.set_adapter(["default", "other"])
    # Nothing half done: the first is still the active one.
    assert shapley(model).active == "default"


# -- taking it away ---------------------------------------------------------------------------------------------------


@every_form
def test_disabled_is_the_base(base_dir, form):
    model, plain = trained(base_dir, form), run(loaded_base(base_dir))
    with model.disable_adapter():
        disabled = run(model)
        assert not hasattr(disabled, "attributions")
        assert torch.equal(disabled.logits, plain.logits)
        with pytest.raises(ValueError, match="no Shapley adapter is active"):
            run(model, coalitions=families.coalitions())
        assert torch.equal(run(model, coalitions=None, coalition_grad=False).logits, plain.logits)
    assert isinstance(run(model), ShapleyOutput)


@pytest.mark.parametrize("form", ["lora", "frozen", "all_linear", "mask"])
def test_unload_is_bit_identical_to_the_base(base_dir, form):
    plain = loaded_base(base_dir)
    clean = trained(base_dir, form).unload()
    assert torch.equal(run(clean).logits, run(plain).logits)
    assert clean.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in clean.named_modules()] == [n for n, _ in plain.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clean.modules())
    assert not any("_shapadapter_patch" in vars(m) for m in clean.modules())
    again = wrap(clean)
    assert isinstance(run(again), ShapleyOutput)


def test_merge_and_unload_of_the_classifier(base_dir):
    for form in ("mask", "new_head", "full_classifier"):
        model = trained(base_dir, form)
        expected = run(model).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            merged = model.merge_and_unload()
        assert (run(merged).logits - expected).abs().max() < 1e-4
        assert not hasattr(run(merged), "attributions")


def test_merge_and_unload_of_a_vote_warns(base_dir):
    model = trained(base_dir)
    with pytest.warns(UserWarning, match="projection head"):
        merged = model.merge_and_unload()
    assert not hasattr(run(merged), "attributions")


@pytest.mark.parametrize("form", ["lora", "mask", "new_head"])
def test_merge_and_unmerge(tmp_path, base_dir, form):
    model = trained(base_dir, form)
    expected = full_run(model)
    model.merge_adapter()
    merged = full_run(model)
    for field in ("logits", "attributions", "coalition_values"):
        gap = (getattr(merged, field) - getattr(expected, field)).abs().max()
        assert gap < 1e-4 * expected.logits.abs().max()
    model.save_pretrained(tmp_path / "merged")
    assert same(full_run(_peft(tmp_path / "merged", base_dir)), expected)
    model.unmerge_adapter()
    gap = (full_run(model).attributions - expected.attributions).abs().max()
    assert gap < 1e-4 * expected.logits.abs().max()


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "how"), [(form, "deepcopy") for form in FORMS] + [("lora", "pickle"), ("new_head", "torch")]
)
def test_copies_are_bit_identical_and_independent(tmp_path, base_dir, form, how):
    model = trained(base_dir, form)
    expected = full_run(model)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert same(full_run(again), expected)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    assert same(full_run(model), expected)
    assert not same(full_run(again), expected)
    kept = copy.deepcopy(model)
    clean = kept.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clean.modules())
    assert same(full_run(model), expected)


def test_state_dict_round_trip(base_dir):
    model, other = trained(base_dir, "new_head", seed=1), trained(base_dir, "new_head", seed=2)
    other.load_state_dict(model.state_dict())
    assert same(full_run(other), full_run(model))


# -- counting ---------------------------------------------------------------------------------------------------------


def _expected(form, width=32, classes=CLASSES, branch=256):
    head = classes + 2 * width + width * classes + (width * branch + branch) + branch * classes
    token = width + 2 * width + (width * branch + branch)
    lora = 2 * 2 * 2 * 4 * width  # q and v, A and B, 2 blocks, r = 4
    classifier = width * classes + classes
    return {
        "lora": head + token + lora,
        "lora_no_token": head + lora,
        "frozen": head + token,
        "new_head": head + token + lora + classifier,
        "mask": head + token + lora,
        "full": head + token + sum(p.numel() for p in base("vit").vit.parameters()),
        "full_classifier": head + token + sum(p.numel() for p in base("vit").parameters()),
    }[form]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "all_linear"])
def test_trainable_parameters(base_dir, form, capsys):
    model = trained(base_dir, form)
    expected = _expected(form) - (CLASSES if FORMS[form].get("prediction") == "classifier" else 0)
    unused = _unused(model)
    assert model.get_nb_trainable_parameters()[0] - unused == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected + unused:,}" in capsys.readouterr().out


def _unused(model):
    """The null value of `classifier` prediction, if the layer makes one: nothing reads it."""
    layer = shapley(model)
    null = layer.lora_shapley_null
    return CLASSES if layer.rules["default"].prediction == "classifier" and "default" in null else 0


def test_all_linear_leaves_the_classifier_out(base_dir):
    model = trained(base_dir, "all_linear")
    names = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(names) == 2 * 6
    assert not any("classifier" in name for name in names)


def test_lora_is_refused_where_nothing_tunes_it(base_dir):
    for tune in ("frozen", "full"):
        with pytest.raises(ValueError, match="trains no LoRA"):
            get_peft_model(loaded_base(base_dir), ShapleyConfig(tune=tune, target_modules=["q_proj"]))


def test_unknown_settings_are_refused():
    for wrong in (
        {"prediction": "both"},
        {"tune": "half"},
        {"removal": "blur"},
        {"task_type": "FEATURE_EXTRACTION"},
    ):
        with pytest.raises(ValueError):
            ShapleyConfig(**wrong)


def test_a_file_that_lacks_tensors_is_not_saved_silently(tmp_path, base_dir):
    model = trained(base_dir)
    with torch.no_grad():
        model.get_base_model().vit.layers[0].mlp.fc1.weight.add_(0.1)
    with pytest.raises(CheckpointError, match="have changed"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
