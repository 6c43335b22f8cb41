"""The ready configurations of accelerate, and what several processes change: nothing."""

import copy
from functools import partial
from pathlib import Path

import forks
import pytest
import torch

pytest.importorskip("datasets")

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from launched import METRICS, evaluate, main
from peft import PeftModel
from test_finetune_example import train_on_given_coalitions
from test_trainer import Processor, assert_same, images, tiny_vit, trained, wrapped

from shapadapter import UnsupportedModelError, explain

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"

# Of each file: the kind, how many processes, and what it is for.
EFFECTS = {
    "cpu": ("NO", 1, {"use_cpu": True, "mixed_precision": "no"}),
    "cpu-two-processes": ("MULTI_GPU", 2, {"use_cpu": True, "multi_gpu": True, "mixed_precision": "no"}),
    "single-gpu": ("NO", 1, {"use_cpu": False, "multi_gpu": False, "mixed_precision": "bf16"}),
    "multi-gpu-ddp": ("MULTI_GPU", 8, {"multi_gpu": True, "use_fsdp": False, "mixed_precision": "bf16"}),
    "fsdp": (
        "FSDP",
        8,
        {
            "use_fsdp": True,
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
            "mixed_precision": "bf16",
        },
    ),
    "deepspeed-zero2": ("DEEPSPEED", 8, {"use_deepspeed": True, "zero_stage": 2, "mixed_precision": "no"}),
    "deepspeed-zero3": ("DEEPSPEED", 8, {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True}),
}


def run_by(config, task, folder, *options) -> dict:
    forks.run_as_accelerate(CONFIGS / f"{config}.yaml", partial(main, task, str(folder)), *options)
    return torch.load(folder / "found.pt")


def alone(folder):
    """One process, the global batch of two."""
    return train_on_given_coalitions(folder, 8).model.eval()


def check_saved(folder, model, found) -> None:
    """The adapter that several processes saved, loaded by one, says what one process alone would say."""
    loaded = PeftModel.from_pretrained(tiny_vit(), str(folder / "saved")).eval()
    pictures, processor = images(3)["image"], Processor(size={"height": 32, "width": 32})
    expected = explain(model, pictures, processor).attributions
    torch.testing.assert_close(explain(loaded, pictures, processor).attributions, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["explained"], expected, atol=1e-6, rtol=0)


def test_every_config_is_checked():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == EFFECTS.keys()


@pytest.mark.parametrize("name", EFFECTS)
def test_accelerate_understands_a_config(name):
    kind, processes, effects = EFFECTS[name]
    path = f"{CONFIGS / name}.yaml"
    assert load_config_from_file(path).distributed_type == DistributedType(kind)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))
    assert args.num_processes == processes
    assert {effect: getattr(args, effect) for effect in effects} == effects


def test_a_model_whose_weights_are_elsewhere_is_refused_with_the_remedy():
    with torch.device("meta"):
        base = tiny_vit()
    with pytest.raises(UnsupportedModelError, match="fsdp_cpu_ram_efficient_loading: false"):
        wrapped(base=base)


def test_bare_parameters_are_read_by_a_call_where_something_waits_for_calls():
    """ZeRO-3 gathers a module's weights before its call and takes them away afterwards."""
    model = wrapped(tune="frozen").eval()
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixel_values=pixels).attributions
    layer = model.get_base_model().shapley
    bare = [module for module in layer.children() if isinstance(module, torch.nn.ParameterDict) and len(module)]
    assert len(bare) == 2  # token and null value
    kept = {module: copy.deepcopy(module["default"].data) for module in bare}

    def gather(module, args):
        module["default"].data = kept[module]

    def give_back(module, args, output):
        module["default"].data = torch.empty(0)

    for module in bare:
        give_back(module, None, None)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(give_back)
    torch.testing.assert_close(model(pixel_values=pixels).attributions, expected, atol=0, rtol=0)


@pytest.mark.slow
def test_metrics_of_two_processes_are_those_of_one(tmp_path):
    """Of 7 images two processes with batches of 2 see one again, which counts once."""
    one = evaluate(tmp_path / "one")
    two = run_by("cpu-two-processes", "evaluate", tmp_path)
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert two == pytest.approx(one, rel=1e-5)
    assert two["seen"] == 7
    # A process that gets repeats alone counts for nothing.
    assert {name: evaluate(tmp_path, 7)[name] for name in METRICS} == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_fails_in_all(tmp_path):
    found = run_by("cpu-two-processes", "failing save", tmp_path)
    assert len(found["said"]) == 2
    assert all("checkpoint-1 (OSError: [Errno 28] No room" in said for said in found["said"])
    assert found["best"] == [None, None]


@pytest.mark.slow
def test_fsdp_reaches_the_weights_of_one_process_and_saves_an_ordinary_adapter(tmp_path):
    """Law 8 on weights that two processes share. Rows bring coalitions, whose values carry gradients."""
    options = ("--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no")
    found = run_by("fsdp", "fsdp", tmp_path, *options)
    assert found["type"] == "DistributedType.FSDP"
    assert found["units"] == ["FSDPLayerNorm", "FSDPPeftModel", "FSDPViTLayer", "FSDPViTPatchEmbeddings"]
    model = alone(tmp_path)
    assert_same(trained(model), found["weights"], atol=1e-6, rtol=0)
    assert_same(found["whole run"], found["resumed"], atol=0, rtol=0)
    check_saved(tmp_path, model, found)
    computed, kept, gap = found["bf16"]
    assert (computed, kept) == ("torch.bfloat16", "torch.float32")
    assert gap < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_reaches_the_weights_of_one_process(tmp_path, stage):
    pytest.importorskip("deepspeed")
    forks.run_together(partial(main, f"zero{stage}", str(tmp_path)), DS_ACCELERATOR="cpu")
    found = torch.load(tmp_path / "found.pt")
    assert found["type"] == "DistributedType.DEEPSPEED"
    model = alone(tmp_path)
    assert_same(trained(model), found["weights"], atol=1e-6, rtol=0)
    check_saved(tmp_path, model, found)
