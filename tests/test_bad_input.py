"""What is wrong on the way in: one clear error of ours each, and nothing half loaded."""

import copy
import shutil

import families
import pytest
import torch
from families import CLASSES, base, images, shapley, stir, wrap
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from shapadapter import ShapleyConfig
from shapadapter.core.errors import (
    CheckpointError,
    ClassNotFoundError,
    ImageError,
    ShapleyError,
    UnsupportedModelError,
)


@pytest.fixture(scope="module")
def model():
    return wrap("vit")


def run(model, **kwargs):
    with torch.no_grad():
        return model(**{"pixel_values": images(), **kwargs})


# -- the call ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "coalitions",
    [
        torch.full((2, 3, 16), 1.5),
        torch.ones(2, 3, 16, dtype=torch.long),
        torch.ones(2, 16, dtype=torch.bool),
        torch.ones(1, 3, 16, dtype=torch.bool),
        torch.ones(2, 3, 15, dtype=torch.bool),
        torch.ones(2, 3, 4, 4, dtype=torch.bool),
        [[[True] * 16]] * 2,
    ],
    ids=lambda c: f"{c.dtype}-{tuple(c.shape)}" if isinstance(c, torch.Tensor) else "list",
)
def test_coalitions_of_the_wrong_kind(model, coalitions):
    with pytest.raises(ImageError, match=r"coalitions|from 0 to 1, got 1\.5"):
        run(model, coalitions=coalitions)
    assert run(model).attributions is not None


@pytest.mark.parametrize("name", ["attention_mask", "bool_masked_pos"])
def test_other_ways_of_removing_players(model, name):
    with pytest.raises(ValueError, match=f"takes no {name}"):
        run(model, **{name: torch.ones(2, 17)})
    assert run(model, **{name: None}).attributions is not None


def test_arguments_by_position(model):
    with torch.no_grad():
        assert torch.equal(model(images()).logits, run(model).logits)
        with pytest.raises(TypeError, match="by keyword"):
            model(images(), torch.tensor([0, 1]))
        with pytest.raises(TypeError, match="by keyword"):
            model(images(), pixel_values=images())


@pytest.mark.parametrize(
    "pixels",
    [
        None,
        [[1.0]],
        torch.zeros(3, 32, 32),
        torch.zeros(2, 1, 32, 32),
        torch.zeros(2, 4, 32, 32),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 3, 4, 4),
    ],
    ids=lambda p: str(tuple(p.shape)) if isinstance(p, torch.Tensor) else str(p),
)
def test_pixel_values_of_the_wrong_kind(model, pixels):
    with pytest.raises(ImageError):
        run(model, pixel_values=pixels)


def test_an_unknown_size_without_interpolation_is_the_models_own_error(model):
    with pytest.raises(ValueError, match="doesn't match"):
        run(model, pixel_values=images(2, 48, 48))


def test_coalitions_without_an_adapter(model):
    with model.disable_adapter(), pytest.raises(ValueError, match="no Shapley adapter is active"):
        run(model, coalitions=families.coalitions())


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a base model and an adapter of it."""
    folder = tmp_path_factory.mktemp("saved")
    base("vit").save_pretrained(folder / "base")
    plain = AutoModelForImageClassification.from_pretrained(folder / "base")
    wrapped = stir(get_peft_model(plain, ShapleyConfig(r=4)))
    wrapped.save_pretrained(folder / "adapter")
    return folder


def plain_model(saved):
    return AutoModelForImageClassification.from_pretrained(saved / "base")


def untouched(model, logits):
    """Nothing half loaded: the base predicts as before and holds no part of an adapter."""
    return (
        torch.equal(run(model).logits, logits)
        and not any("lora_" in name or "shapley" in name for name, _ in model.named_modules())
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    )


def three_classes():
    names = {i: str(i) for i in range(3)}
    return families.build("vit", id2label=names, label2id={v: k for k, v in names.items()})


def test_another_class_count(saved, tmp_path):
    """The base model's own head predicts, so its classes have to be the adapter's."""
    adapted = families.wrap(plain_model(saved), prediction="classifier")
    adapted.save_pretrained(tmp_path / "adapter")
    other = three_classes()
    logits = run(other).logits
    with pytest.raises(CheckpointError, match=r"5 classes \(ant, bee, cat, \.\.\.\).*has 3"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert untouched(other, logits)
    assert other.config.id2label == {0: "0", 1: "1", 2: "2"}
    with pytest.raises(CheckpointError, match="num_labels=5"):
        other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(run(other).logits, logits)


def test_vote_brings_its_own_classes(saved):
    """With `vote` the base model's head is not used: a base with another number of classes will do."""
    expected = run(PeftModel.from_pretrained(plain_model(saved), saved / "adapter"))
    other = AutoModelForImageClassification.from_pretrained(saved / "base", num_labels=3, ignore_mismatched_sizes=True)
    output = run(PeftModel.from_pretrained(other, saved / "adapter"))
    assert torch.equal(output.logits, expected.logits)
    assert other.config.num_labels == 5
    assert other.config.id2label[1] == "bee"


def test_a_new_class_count_reloads_by_every_road(saved, tmp_path):
    """As in the README: the base has 5 classes, the task 3."""
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    base_of_task = AutoModelForImageClassification.from_pretrained(saved / "base", **options)
    adapted = families.wrap(base_of_task)
    expected = run(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    for loaded in (
        AutoPeftModel.from_pretrained(tmp_path / "adapter"),
        AutoModelForImageClassification.from_pretrained(tmp_path / "adapter"),
    ):
        output = run(loaded.eval())
        assert output.logits.shape[1] == 3
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.attributions, expected.attributions)


OTHERS = {
    "other_weights": lambda: families.build("vit", seed=1),
    "other_weights_no_stir": lambda: families.MAKERS["vit"](),
    "deeper": lambda: families.build("vit", num_hidden_layers=3),
    "wider": lambda: families.build("vit", hidden_size=48),
    "other_patches": lambda: families.build("vit", patch_size=16),
    "other_family": lambda: base("dinov2"),
    "deit": lambda: base("deit"),
    "clip": lambda: base("clip"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_base(saved, name):
    other = OTHERS[name]().eval()
    logits = run(other).logits
    with pytest.raises(CheckpointError, match="another base"):
        PeftModel.from_pretrained(other, saved / "adapter")
    assert untouched(other, logits)
    with pytest.raises(CheckpointError, match="another base"):
        other.load_adapter(str(saved / "adapter"))


def test_a_fine_tuned_sibling_of_the_base(saved):
    """The same architecture, the same norms, slightly other weights: what a fine-tuned checkpoint looks like."""
    other = plain_model(saved)
    with torch.no_grad():
        for parameter in other.vit.parameters():
            if parameter.ndim == 2:
                noise = torch.randn_like(parameter)
                noise -= (noise * parameter).sum() / parameter.square().sum() * parameter
                parameter.add_(0.02 * parameter.norm() / noise.norm() * noise)
    with pytest.raises(CheckpointError, match="another base"):
        PeftModel.from_pretrained(other, saved / "adapter")


def test_permuted_weights_are_another_base(saved):
    other = plain_model(saved)
    with torch.no_grad():
        for block in other.vit.layers:
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight.flip(0))
    with pytest.raises(CheckpointError, match="another base"):
        PeftModel.from_pretrained(other, saved / "adapter")


def test_a_random_head_under_classifier_prediction(tmp_path):
    """A new head is random at each load; without modules_to_save the adapter would meet another one, silently."""
    base("vit").save_pretrained(tmp_path / "base")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    torch.nn.init.normal_(plain.classifier.weight)
    wrapped = stir(get_peft_model(plain, ShapleyConfig(prediction="classifier")))
    wrapped.save_pretrained(tmp_path / "adapter")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    torch.nn.init.normal_(again.classifier.weight)
    with pytest.raises(CheckpointError, match=r"another base|modules_to_save"):
        PeftModel.from_pretrained(again, tmp_path / "adapter")


@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_another_head_is_fine_where_it_is_not_used_or_saved(tmp_path, prediction):
    base("vit").save_pretrained(tmp_path / "base")
    saved = ["classifier"] if prediction == "classifier" else None
    wrapped = wrap(base("vit"), prediction, modules_to_save=saved)
    wrapped.save_pretrained(tmp_path / "adapter")
    other = base("vit")
    torch.nn.init.normal_(other.classifier.weight)
    again = PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    assert torch.equal(run(again).logits, run(wrapped).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_precision_is_accepted(saved, dtype):
    again = PeftModel.from_pretrained(plain_model(saved).to(dtype), saved / "adapter")
    assert shapley(again).rules


def damaged(saved, tmp_path, content):
    folder = tmp_path / "damaged"
    shutil.copytree(saved / "adapter", folder)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def cuts(size):
    header = 8 + 2000
    return [0, 1, 7, 8, 9, 100, header, size // 2, size - 4, size - 1]


@pytest.mark.parametrize("kept", [0, 4, 6, 9])
def test_a_cut_off_file(saved, tmp_path, kept):
    whole = (saved / "adapter" / "adapter_model.safetensors").read_bytes()
    folder = damaged(saved, tmp_path, whole[: cuts(len(whole))[kept]])
    model = plain_model(saved)
    logits = run(model).logits
    with pytest.raises(CheckpointError, match="damaged"):
        PeftModel.from_pretrained(model, folder)
    assert untouched(model, logits)
    with pytest.raises(CheckpointError, match="damaged"):
        AutoPeftModel.from_pretrained(folder)
    with pytest.raises(Exception):  # noqa: B017 - transformers words it
        AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(Exception):  # noqa: B017 - transformers words it
        model.load_adapter(str(folder))


def test_a_file_with_something_behind_its_end_or_overwritten(saved, tmp_path):
    whole = (saved / "adapter" / "adapter_model.safetensors").read_bytes()
    for turn, content in enumerate((whole + b"0" * 16, b"<html>not found</html>" * 99, b"\0" * len(whole))):
        folder = damaged(saved, tmp_path / str(turn), content)
        with pytest.raises(CheckpointError, match="damaged"):
            PeftModel.from_pretrained(plain_model(saved), folder)


@pytest.mark.parametrize("leaf", ["token", "vote.weight", "gate.bias", "null", "norm.weight"])
def test_a_file_that_lacks_part_of_the_head(saved, tmp_path, leaf):
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.endswith(f"lora_shapley_{leaf}")}
    assert len(kept) == len(tensors) - 1
    folder = damaged(saved, tmp_path, b"")
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks.*lora_shapley_{leaf}"):
        PeftModel.from_pretrained(plain_model(saved), folder)
    with pytest.raises(CheckpointError):
        AutoPeftModel.from_pretrained(folder)
    # transformers' own loader asks nobody: it reports missing tensors and goes on (docs/laws-and-limits.md).


def test_a_file_that_lacks_lora(saved, tmp_path):
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    folder = damaged(saved, tmp_path, b"")
    save_file({k: v for k, v in tensors.items() if "q_proj" not in k}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks"):
        PeftModel.from_pretrained(plain_model(saved), folder)


def test_a_failed_load_beside_a_good_adapter_leaves_that_one_alone(saved, tmp_path):
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    folder = damaged(saved, tmp_path, b"")
    save_file({k: v for k, v in tensors.items() if "vote" not in k}, folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(plain_model(saved), saved / "adapter")
    before = run(model)
    with pytest.raises(CheckpointError):
        model.load_adapter(folder, adapter_name="broken")
    assert shapley(model).active == "default"
    assert torch.equal(run(model).attributions, before.attributions)


def test_a_missing_weight_file(saved, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(saved / "adapter", folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises((ValueError, OSError)):
        PeftModel.from_pretrained(plain_model(saved), folder)


def test_errors_are_shapley_errors_with_their_usual_kind():
    for kind, usual in (
        (UnsupportedModelError, ValueError),
        (CheckpointError, ValueError),
        (ImageError, ValueError),
        (ClassNotFoundError, KeyError),
    ):
        assert issubclass(kind, ShapleyError)
        assert issubclass(kind, usual)
    assert str(ClassNotFoundError("no 'cat'")) == "no 'cat'"


def test_a_model_that_failed_can_be_wrapped_afterwards(saved):
    other = families.build("vit", seed=1)
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(other, saved / "adapter")
    wrapped = wrap(copy.deepcopy(other))
    assert run(wrapped).attributions.shape == (2, 16, CLASSES)
