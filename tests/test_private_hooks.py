"""Private methods of PEFT and transformers that are overridden or called: all are listed, and are as they were.

A library may rename them without a word; an override would then never be called again, and nothing would say so.
"""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import Pipeline, PreTrainedModel, Trainer

import shapadapter
from shapadapter.adapter import ShapleyLayer, ShapleyModel
from shapadapter.adapter.registration import check_overrides
from shapadapter.training import ShapleyTrainer

ROOT = Path(shapadapter.__file__).parent

# What is overridden, where, and with which parameters the library calls it.
OVERRIDDEN = {
    (LoraModel, "_get_adapter_state_dict"): "model config adapter_name state_dict unwanted_adapter_names",
    (LoraModel, "_remap_adapter_state_dict_for_load"): "model config adapter_name state_dict",
    (LoraModel, "_convert_state_dict_for_initial_model"): (
        "peft_model peft_config path_initial_model_for_weight_conversion output_state_dict kwargs"
    ),
    (LoraModel, "_enable_peft_forward_hooks"): "args kwargs",
    (BaseTuner, "_unload_and_optionally_merge"): "merge progressbar safe_merge adapter_names",
    (BaseTunerLayer, "_move_adapter_to_device_of_base_layer"): "adapter_name device",
    (Pipeline, "_forward"): "input_tensors forward_parameters",
    (Pipeline, "_sanitize_parameters"): "pipeline_parameters",
    (Trainer, "_get_dataloader"): "dataset description batch_size sampler_fn is_training dataloader_key",
    (Trainer, "_get_output_dir"): "trial",
    (Trainer, "_load_best_model"): "",
    (Trainer, "_push_from_checkpoint"): "checkpoint_folder",
    (Trainer, "_run_epoch"): (
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
    ),
    (Trainer, "_save_checkpoint"): "model trial",
}

# What else is called: by us on an object of theirs, or wrapped.
CALLED = {
    (Trainer, "_prepare_inputs"): "inputs",
    (Trainer, "_set_signature_columns_if_needed"): "",
    (BaseTunerLayer, "_get_available_adapters"): "",
    (PreTrainedModel, "_upload_modified_files"): (
        "working_dir repo_id files_timestamps commit_message token create_pr revision commit_description"
    ),
    (peft.PeftModel, "create_or_update_model_card"): "output_dir",
}

# Private names that are read, and where one may see that they are there.
READ = {
    "_assert_async": lambda: torch._assert_async,
    "_assert_tensor_metadata": lambda: torch.ops.aten._assert_tensor_metadata.default,
    "_attn_implementation": lambda: transformers.ViTConfig()._attn_implementation,
    "_forward_pre_hooks": lambda: nn.Module()._forward_pre_hooks,
    "_hf_hook": lambda: add_hook_to_module(nn.Linear(1, 1), ModelHook())._hf_hook,
    "_is_hf_initialized": lambda: "_is_hf_initialized" in inspect.getsource(transformers.modeling_utils) or 1 / 0,
    "_member_map_": lambda: peft.PeftType._member_map_,
    "_member_names_": lambda: peft.PeftType._member_names_,
    "_modules": lambda: nn.Module()._modules,
    "_orig_mod": lambda: torch.compile(nn.Linear(1, 1))._orig_mod,
    "_option_string_actions": lambda: __import__("argparse").ArgumentParser()._option_string_actions,
    "_replace": lambda: transformers.trainer_utils.EvalLoopOutput._replace,
    "_value2member_map_": lambda: peft.PeftType._value2member_map_,
    "_train_batch_size": lambda: "_train_batch_size" in inspect.getsource(Trainer.__init__) or 1 / 0,
}


def parameters(owner, name):
    found = inspect.signature(getattr(owner, name)).parameters
    return [one for one in found if one not in ("self", "cls")]


@pytest.mark.parametrize(("owner", "name"), [*OVERRIDDEN, *CALLED], ids=lambda part: getattr(part, "__name__", part))
def test_a_private_method_is_as_it_was(owner, name):
    assert parameters(owner, name) == (OVERRIDDEN | CALLED)[owner, name].split()


def our_classes():
    for module in pkgutil.walk_packages([str(ROOT)], "shapadapter."):
        if module.name.endswith(("__main__", ".space.page", ".space.app")):  # need gradio
            continue
        for one in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(one) and one.__module__ == module.name:
                yield one


def overrides():
    """(our class, name, class of a library) of each private method of ours that such a class has, too."""
    for ours in our_classes():
        theirs = [above for above in ours.__mro__ if not above.__module__.startswith("shapadapter")]
        for name, method in vars(ours).items():
            private = name.startswith("_") and not name.startswith("__")
            if private and inspect.isroutine(getattr(method, "__func__", method)):
                above = next((one for one in theirs if name in vars(one)), None)
                if above is not None or getattr(getattr(ours, name), "__override__", False):
                    yield ours, name, above


def test_each_override_is_listed_and_marked():
    found = list(overrides())
    assert {(above, name) for _, name, above in found} == set(OVERRIDDEN)
    for ours, name, _ in found:
        assert getattr(getattr(ours, name), "__override__", False), f"@override is missing on {ours.__name__}.{name}"


def test_each_override_takes_what_it_is_called_with():
    for ours, name, above in overrides():
        if above is Pipeline:  # whose methods take what those of a pipeline hand on to each other
            continue
        signature = inspect.signature(vars(ours)[name].__get__(object(), ours))
        wanted = OVERRIDDEN[above, name].split()
        signature.bind(*wanted)
        signature.bind(**dict.fromkeys(wanted))


def private_names():
    """Private names that are used in the package and defined nowhere in it."""
    used, own = set(), set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    own.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(attr=name):
                    used.add(name)
                case ast.Call(
                    func=ast.Name(id="getattr" | "hasattr" | "replace_function")
                    | ast.Attribute(attr="replace_function"),
                    args=[_, ast.Constant(value=str(name)), *_],
                ):
                    used.add(name)
    return {name for name in used - own if name.startswith("_") and not name.startswith("__")}


def test_each_private_name_is_listed_and_there():
    listed = {name for _, name in CALLED if name.startswith("_")} | set(READ)
    assert private_names() == listed
    for look in READ.values():
        look()


@pytest.mark.parametrize("ours", [ShapleyModel, ShapleyLayer, ShapleyTrainer])
def test_a_method_that_was_renamed_is_named_at_import(ours, monkeypatch):
    check_overrides(ours)
    owner, name = next((above, name) for one, name, above in overrides() if one in ours.__mro__)
    for above in ours.__mro__:
        if not above.__module__.startswith("shapadapter") and name in vars(above):
            monkeypatch.delattr(above, name)
    with pytest.raises(
        ImportError, match=rf"{owner.__module__.partition('.')[0]} [\d.]+ has no {name} any more.*pip install"
    ):
        check_overrides(ours)
