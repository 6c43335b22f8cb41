"""One test for each known trap of plugging a third-party method into PEFT and transformers.

Traps 6 (SigLIP forwards no extra arguments to attention), 9 (BEiT's masks) and 17 (what was never tested) do not apply
to this design: nothing is passed through those arguments, BEiT is not supported.
"""

import copy
import pickle
import subprocess
import sys

import families
import pytest
import torch
from families import CLASSES, base, images, shapley, stir, wrap
from laws import on
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

from shapadapter import ShapleyConfig, register
from shapadapter.core.errors import CheckpointError, UnsupportedModelError


def run(model, **kwargs):
    with torch.no_grad():
        return model(pixel_values=images(), **kwargs)


def test_trap_01_the_base_is_frozen():
    """A tuner layer that exists before the first injection makes PEFT leave the whole base trainable."""
    model = wrap("vit", r=4, head_width=256)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1024 + 9957 + 8544  # LoRA, head, token
    mixed = base("vit")
    mixed.add_adapter(ShapleyConfig(r=4))
    assert sum(p.numel() for p in mixed.parameters() if p.requires_grad) == 1024 + 9957 + 8544  # LoRA, head, token
    model.add_adapter("other", ShapleyConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.set_adapter("other")
    other = {name for name, p in model.named_parameters() if p.requires_grad}
    assert other == {name.replace(".default", ".other") for name in trainable}


def test_trap_02_the_type_is_a_real_enum_member():
    """transformers asks the type for `.value`; on Python 3.12 and later getattr needs a class attribute."""
    member = PeftType.SHAPLEY
    assert isinstance(member, PeftType)
    assert member.value == member.name == member == "SHAPLEY"
    assert PeftType("SHAPLEY") is PeftType["SHAPLEY"] is member
    assert member in list(PeftType)
    assert member in PeftType
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert hash(member) == hash("SHAPLEY")
    assert len(PeftType) == len(set(PeftType))
    assert ShapleyConfig().peft_type is member
    assert ShapleyConfig(peft_type="LORA").peft_type is member
    assert PeftType.LORA.value == "LORA"
    assert LoraConfig().peft_type is PeftType.LORA


@pytest.mark.parametrize("token", [True, False])
def test_trap_03_keys_begin_with_the_one_prefix_transformers_knows(tmp_path, token):
    """transformers inserts the adapter's name after the prefix `lora_` only; other keys are lost with a report."""
    wrap("vit", shapley_token=token).save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    ours = {key for key in keys if ".shapley." in key}
    assert all(key.startswith("base_model.model.shapley.lora_shapley_") for key in ours)
    assert {key for key in keys - ours if "lora_A" not in key and "lora_B" not in key} == set()
    assert len(ours) == (12 if token else 7)


@pytest.mark.parametrize("name", ["default", "why", "vote", "head"])
def test_trap_04_no_key_holds_the_adapters_name(tmp_path, name):
    """With the name in the key, the adapter would load under that one name only."""
    model = get_peft_model(base("vit"), ShapleyConfig(r=4), adapter_name=name)
    stir(model).save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    keys = load_file(folder / "adapter_model.safetensors")
    if name in ("default", "why", "head"):
        assert not any(name in key.split(".") for key in keys)
    for other in ("another", "vote"):
        again = PeftModel.from_pretrained(base("vit"), folder, adapter_name=other)
        assert torch.equal(run(again).attributions, run(model.eval()).attributions), other


def test_trap_05_nothing_lives_on_the_tuner_and_copies_have_their_own_hooks():
    """Closures would keep a copy's hooks pointing at the original; PEFT drops the tuner on some roads."""
    model = wrap("vit")
    for holder in (model, model.base_model):
        assert not any("shapley" in name for name, _ in holder.named_parameters(recurse=False))
        assert not holder._forward_hooks
        assert not holder._forward_pre_hooks
    before = run(model)
    again = copy.deepcopy(model)
    with torch.no_grad():
        shapley(again).lora_shapley_token["default"].normal_()
        shapley(again).lora_shapley_vote["default"].weight.normal_()
    assert not torch.equal(run(again).attributions, before.attributions)
    assert torch.equal(run(model).attributions, before.attributions)
    assert shapley(again).hooks.anatomy == shapley(model).hooks.anatomy
    assert shapley(again).hooks is not shapley(model).hooks
    bare = copy.deepcopy(model.get_base_model())
    assert torch.equal(run(bare).attributions, before.attributions)


def test_trap_07_the_attention_kernel_may_be_changed_later():
    """`set_attn_implementation` would remove an attention function that was set by name on the model."""
    model = wrap("siglip", "classifier", tune="frozen")
    before = run(model)
    for kernel in ("eager", "sdpa", "eager"):
        model.get_base_model().set_attn_implementation(kernel)
        assert (run(model).logits - before.logits).abs().max() < 1e-5
        assert (run(model).attributions - before.attributions).abs().max() < 1e-5
    assert model.config.vision_config._attn_implementation == "eager"


def test_trap_07_a_lost_split_is_an_error_not_a_wrong_answer():
    """If somebody takes the attention function away after all, the token would change the base model silently."""
    model = wrap("vit")
    attention = model.get_base_model().vit.layers[0].attention
    attention.config = model.config
    with pytest.raises(UnsupportedModelError, match="hidden in 1 of 2"):
        run(model)


def test_trap_08_recorded_outputs_have_the_usual_lengths():
    """A token pass inside the forward would leave extra entries in attentions and hidden states."""
    model = wrap("vit")
    model.get_base_model().set_attn_implementation("eager")
    output = run(model, output_attentions=True, output_hidden_states=True, coalitions=families.coalitions())
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 17, 17)] * 2
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 17, 32)] * 3


@pytest.mark.parametrize("family", ["dinov2", "ijepa", "clip", "siglip"])
@pytest.mark.parametrize("removal", ["drop", "mask"])
def test_trap_10_absent_players_do_not_reach_mean_pools(family, removal):
    """An attention mask alone leaves absent patches in the mean of the patches."""
    model = wrap(family, "classifier", removal=removal)
    chosen = torch.rand(2, 1, 16) < 0.5
    dirty = model(pixel_values=families.remove_noise(images(), chosen[:, 0]), coalitions=chosen).coalition_values
    assert torch.equal(dirty, model(pixel_values=images(), coalitions=chosen).coalition_values)


@on(families.FAMILIES, "family")
def test_trap_11_default_targets_exist(family):
    """PEFT has no default target modules for vision models, and transformers 5 renamed theirs."""
    model = wrap(family)
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}
    count = sum("lora_A" in name for name, _ in model.named_parameters())
    assert count == 4  # the vision blocks alone


def test_trap_12_unload_keeps_a_trained_classifier_and_restores_attention():
    """`unload` gives back the base with the trained classifier of modules_to_save: documented, not changed."""
    model = wrap("vit", "classifier", modules_to_save=["classifier"])
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
        trained = model.get_base_model().classifier.modules_to_save["default"].weight.clone()
    clean = model.unload()
    assert torch.equal(clean.classifier.weight, trained)
    assert all(m.config is clean.config for m in clean.modules() if hasattr(m, "config"))
    assert clean.config._attn_implementation == "sdpa"


def test_trap_13_a_trained_base_is_not_saved_silently(tmp_path):
    """Base parameters are not in the adapter: trained ones would be lost without a word."""
    model = wrap("vit")
    parameter = model.get_base_model().vit.layers[0].mlp.fc1.weight
    parameter.requires_grad_(True)
    with pytest.raises(CheckpointError, match="trainable but would not be in the checkpoint"):
        model.save_pretrained(tmp_path)
    parameter.requires_grad_(False)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        parameter.mul_(1.01)
    with pytest.raises(CheckpointError, match="have changed"):
        model.save_pretrained(tmp_path)


def test_trap_13_small_changes_of_the_base_are_noticed(tmp_path):
    """A fine-tuned base has nearly the same norms: 1 % of noise moves the logits and not the norms."""
    model = wrap("vit")
    before = run(model).logits
    with torch.no_grad():
        for name, parameter in model.get_base_model().vit.layers.named_parameters():
            if "lora_" not in name and parameter.ndim == 2:
                noise = torch.randn_like(parameter)
                noise -= (noise * parameter).sum() / parameter.square().sum() * parameter
                parameter.add_(0.01 * parameter.norm() / noise.norm() * noise)
    assert (run(model).logits - before).abs().max() > 0.01
    with pytest.raises(CheckpointError):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["vit.embeddings.position_embeddings", "vit.layernorm.weight", "classifier.weight"])
def test_trap_13_changes_outside_the_blocks_are_noticed(tmp_path, part):
    """The fingerprint covers patch embedding and blocks; positions, final norm and classifier predict as well."""
    model = wrap("vit", "classifier")
    with torch.no_grad():
        model.get_base_model().get_parameter(part).mul_(1.5)
    with pytest.raises(CheckpointError):
        model.save_pretrained(tmp_path)


def test_trap_13_a_bias_setting_does_not_switch_the_check_off(tmp_path):
    """`bias="all"` trains biases, which PEFT saves; trainable weights beside them are still lost."""
    model = wrap("vit", bias="all")
    model.save_pretrained(tmp_path / "fine")
    model.get_base_model().vit.layers[0].mlp.fc1.weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match="trainable but would not be in the checkpoint"):
        model.save_pretrained(tmp_path / "wrong")


def test_trap_13_stacked_adapters_are_refused_when_wrapping():
    """LoRA tensors of a stacked adapter get into the checkpoint, its config does not describe them."""
    stacked = get_peft_model(base("vit"), LoraConfig(r=4, target_modules=["q_proj"]))
    logits = run(stacked).logits
    with pytest.raises(UnsupportedModelError, match="PeftModel already"):
        get_peft_model(stacked, ShapleyConfig())
    mixed = base("vit")
    mixed.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="default")
    for name in ("default", "other"):
        with pytest.raises(UnsupportedModelError, match="other adapters"):
            get_peft_model(copy.deepcopy(mixed), ShapleyConfig(), adapter_name=name)
    with pytest.raises(UnsupportedModelError, match="PeftModel already"):
        get_peft_model(wrap("vit"), ShapleyConfig())
    assert torch.equal(run(stacked).logits, logits)


def test_trap_13_stacked_adapters_are_refused_when_saving(tmp_path):
    """A plain LoRA adapter that was added to the same model later."""
    mixed = base("vit")
    mixed.add_adapter(ShapleyConfig(r=4), adapter_name="why")
    mixed.add_adapter(LoraConfig(r=4, target_modules=["k_proj"]), adapter_name="plain")
    mixed.set_adapter("why")
    with pytest.raises(CheckpointError, match="plain"):
        mixed.save_pretrained(tmp_path)


def test_trap_14_loading_an_adapter_leaves_eval_mode_and_switching_back_works(tmp_path):
    """After load_adapter (load_best_model_at_end) the model is in eval mode; targets never depend on the mode."""
    model = wrap("vit", lora_dropout=0.5)
    model.save_pretrained(tmp_path)
    model.train()
    model.load_adapter(tmp_path, adapter_name="best")
    assert not model.training
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    model.eval()
    assert not shapley(model).training


def test_trap_15_reentrant_checkpointing_is_refused(tmp_path):
    """Reentrant checkpointing loses the gradient of the token."""
    pytest.importorskip("accelerate")
    from shapadapter import ShapleyTrainingArguments

    with pytest.raises(ValueError, match="use_reentrant"):
        ShapleyTrainingArguments(
            str(tmp_path),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
            report_to=[],
        )
    arguments = ShapleyTrainingArguments(str(tmp_path), gradient_checkpointing=True, report_to=[])
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_trap_16_importing_the_package_registers_and_does_it_once():
    """PEFT discovers no plug-ins: this is why README and model card tell to import the package first."""
    register()
    register()
    assert list(PeftType).count(PeftType.SHAPLEY) == 1
    code = (
        "import sys\nfrom peft import PeftType, get_peft_config\n"
        "try:\n    get_peft_config({'peft_type': 'SHAPLEY'})\n"
        "except KeyError as error:\n    assert 'SHAPLEY' in str(error)\nelse:\n    raise AssertionError\n"
        "import shapadapter\n"
        "assert PeftType.SHAPLEY.value == 'SHAPLEY';"
        "assert 'datasets' not in sys.modules and 'matplotlib' not in sys.modules;"
        "assert type(get_peft_config({'peft_type': 'SHAPLEY'})).__name__ == 'ShapleyConfig'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr


def test_attention_names_never_reach_a_config(tmp_path):
    """The token's attention function is found by a name that lives on private copies of the config."""
    model = wrap("vit")
    model.get_base_model().config.save_pretrained(tmp_path)
    again = ViTForImageClassification(ViTConfig.from_pretrained(tmp_path))
    assert again.config._attn_implementation == "sdpa"
    assert again.config.num_labels == CLASSES
