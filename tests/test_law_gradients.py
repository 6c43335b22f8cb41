"""Training and saving, for every family of the zoo (all but ten of them with `-m families`)."""

import math

import families
import pytest
import torch
import zoo
from families import images, shapley, stir
from laws import (
    CLASSIFIERS,
    DEFAULT,
    MATCHERS,
    OWN,
    QUICK,
    TOKENS,
    close,
    coalitions,
    doubled,
    gradients,
    loss_of,
    on,
    on_pairs,
    one_image,
    own,
    pairs,
    removals,
    run,
    same,
    with_dropout,
    wrapped,
)
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageClassification

from shapadapter import ShapleyConfig
from shapadapter.backbone import original_name
from shapadapter.core.errors import CheckpointError
from shapadapter.core.shapley import shapley_loss

CHECKPOINTED = (*TOKENS, "swin", "swinv2", "donut_swin", "focalnet", "hiera", "pvt_v2", "segformer")
CHECKPOINTED += ("mobilevit", "mobilevitv2", "swiftformer", "pp_lcnet")
FULL = (*DEFAULT, "deit_teacher", "dinov3", "siglip2_model", "levit_teacher", "swiftformer", "hgnet_v2")
"""Families whose backbones are in parts of their own."""

# -- gradients --------------------------------------------------------------------------------------------------------


@on_pairs(QUICK)
def test_gradient_reaches_every_trainable_parameter_and_steps_leave_the_rest_alone(name, prediction):
    """The statistics of a BatchNorm among the rest."""
    model = with_dropout(own(name, prediction), 0.0).train()
    before = {key: value.clone() for key, value in zoo.base(name).state_dict().items()}
    # MobileViT attends to 2 x 2 cells at a time: with no more than those, each is alone, and queries mean nothing.
    inputs = zoo.inputs(name, size=(128, 128) if name == "mobilevit" else None)
    chosen = families.coalitions(2, 4, math.prod(shapley(model).tiling(**inputs).players))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss_of(model(**inputs, coalitions=chosen), chosen).backward()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, path
            assert parameter.grad.abs().max() > 0, path
        else:
            assert parameter.grad is None, path
    optimizer.step()
    if name in DEFAULT:
        loss_of(model(**inputs, coalitions=chosen, coalition_grad=True), chosen).backward()
        optimizer.step()
    now = {original_name(key): value for key, value in model.get_base_model().state_dict().items()}
    for key, value in before.items():
        assert torch.equal(now[key], value), key


@on(["levit", "resnet", "efficientnet", "mobilenet_v2", "swiftformer"])
def test_full_training_leaves_the_statistics_alone_too(name):
    model, chosen = own(name, tune="full").train(), coalitions(name, 3)
    before = {key: value.clone() for key, value in zoo.base(name).named_buffers()}
    loss_of(model(**zoo.inputs(name), coalitions=chosen, coalition_grad=True), chosen).backward()
    for key, value in model.get_base_model().named_buffers():
        assert torch.equal(value, before[original_name(key)]), key


@on_pairs(QUICK, both=())
def test_a_batch_of_4_equals_2_accumulated_batches_of_2(name, prediction):
    """In gradients and in values; of values also an image and a coalition alone."""
    model = with_dropout(own(name, prediction), 0.0).double().train()
    inputs, chosen = doubled(zoo.inputs(name, batch=4)), coalitions(name, batch=4)
    together = model(**inputs, coalitions=chosen, coalition_grad=True)
    loss_of(together, chosen).backward()
    whole = gradients(model)
    model.zero_grad()
    for part in torch.arange(4).split(2):
        some = {key: value[part] if key in OWN else value for key, value in inputs.items()}
        (loss_of(model(**some, coalitions=chosen[part], coalition_grad=True), chosen[part]) / 2).backward()
    for path, gradient in gradients(model).items():
        assert close(gradient, whole[path]), path
    alone = run(model, one_image(inputs, 1), coalitions=chosen[1:2, 1:2])
    assert close(alone.logits[0], together.logits[1])
    assert close(alone.attributions[0], together.attributions[1])
    assert close(alone.coalition_values[0, 0], together.coalition_values[1, 1])


@on(
    [
        (*pair, how)
        for pair in pairs(CHECKPOINTED, both=())
        for how in removals(pair[0])[: 2 if pair[0] in DEFAULT else 1]
    ],
    ("name", "prediction", "removal"),
)
def test_gradient_checkpointing_gives_the_same_gradients(name, prediction, removal):
    model = with_dropout(own(name, prediction, removal=removal), 0.0).train()
    inputs, chosen = zoo.inputs(name), coalitions(name)
    loss_of(model(**inputs, coalitions=chosen, coalition_grad=True), chosen).backward()
    plain = gradients(model)
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert model.get_base_model().is_activation_checkpointing
    loss_of(model(**inputs, coalitions=chosen, coalition_grad=True), chosen).backward()
    again = gradients(model)
    assert again.keys() == plain.keys()
    for path, gradient in again.items():
        assert close(gradient, plain[path]), path


@pytest.mark.parametrize("grad", [False, True])
def test_no_gradient_reaches_the_null_value_through_the_shapley_loss(grad):
    model, chosen = own("vit").train(), coalitions("vit")
    output = model(images(), coalitions=chosen, coalition_grad=grad)
    shapley_loss(output.attributions, chosen, output.coalition_values, output.null_values).backward()
    assert shapley(model).lora_shapley_null["default"].grad is None
    model.zero_grad(set_to_none=True)
    output = model(images(), coalitions=chosen, coalition_grad=True)
    output.coalition_values.square().sum().backward()
    assert shapley(model).lora_shapley_null["default"].grad is None


@on_pairs(DEFAULT, both=())
def test_coalition_values_are_targets_unless_asked_for(name, prediction):
    model, inputs, chosen = own(name, prediction).train(), zoo.inputs(name), coalitions(name)
    assert not model(**inputs, coalitions=chosen).coalition_values.requires_grad
    output = model(**inputs, coalitions=chosen, coalition_grad=True)
    assert output.coalition_values.requires_grad
    output.coalition_values.square().sum().backward()
    reached = {path for path, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(".lora_A" in path for path in reached)
    assert not any("shapley_token." in path or "gate" in path for path in reached)


@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_the_shapley_loss_does_not_move_the_prediction(prediction):
    """Attributions explain the logits: no gradient of theirs reaches their sum, which is the logits."""
    model = own("vit", prediction).train()
    (model(images()).attributions.sum(1) ** 2).sum().backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-4 for p in model.parameters())
    model.zero_grad()
    (model(images()).attributions ** 2).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in model.parameters())


# -- saving -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def train(model, seed=0):
    """Change what is trained in full."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in path:
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@on_pairs(both=())
def test_reload_is_bit_identical_and_another_base_is_refused(tmp_path, name, prediction):
    inputs, chosen = zoo.inputs(name), coalitions(name)
    model = wrapped(name, prediction)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.base(name), tmp_path).eval()
    assert same(run(again, inputs, coalitions=chosen), run(model, inputs, coalitions=chosen))
    if name in DEFAULT:
        with pytest.raises(CheckpointError, match="another base model"):
            PeftModel.from_pretrained(zoo.build(name, seed=1), tmp_path)


@on_pairs(FULL, turn=1, both=())
def test_reload_of_full_training_is_bit_identical(tmp_path, name, prediction):
    inputs, chosen = zoo.inputs(name), coalitions(name)
    model = train(own(name, prediction, tune="full"))
    model.requires_grad_(False)  # as it is loaded: for weights that want gradients torch may choose another kernel
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.base(name), tmp_path).eval()
    assert same(run(again, inputs, coalitions=chosen), run(model, inputs, coalitions=chosen))


@on(["vit", "siglip2", "resnet", "perceiver_conv", "clip_model"])
def test_the_auto_class_of_peft(tmp_path, name):
    """And, for some, the road of transformers."""
    inputs, chosen = zoo.inputs(name), coalitions(name)
    zoo.base(name).save_pretrained(tmp_path / "base")
    model = type(zoo.base(name)).from_pretrained(tmp_path / "base")
    model.add_adapter(ShapleyConfig(r=4, head_width=64))
    expected = run(stir(model).eval(), inputs, coalitions=chosen)
    model.save_pretrained(tmp_path / "adapter")
    assert same(run(AutoPeftModel.from_pretrained(tmp_path / "adapter").eval(), inputs, coalitions=chosen), expected)
    if name in (
        "resnet",
        "swin",
        "beit",
    ):  # of Perceiver's three classes for one config, the Auto class takes the first
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
        assert same(run(again.eval(), inputs, coalitions=chosen), expected)


@on([name for name in DEFAULT if name not in MATCHERS])
def test_another_number_of_classes_is_refused(tmp_path, name):
    wrapped(name, "classifier").save_pretrained(tmp_path)
    labels = {0: "ant", 1: "bee", 2: "cat"}
    three = zoo.build(name, id2label=labels, label2id={label: index for index, label in labels.items()})
    with pytest.raises(CheckpointError, match="predicts 5 classes"):
        PeftModel.from_pretrained(three, tmp_path)


@on([name for name in FULL if name in CLASSIFIERS])
def test_a_merged_classifier_predicts_the_same(name):
    inputs, model = zoo.inputs(name), own(name, "classifier")
    expected = run(model, inputs).logits
    merged = run(model.merge_and_unload(), inputs)
    assert not hasattr(merged, "attributions")
    assert close(zoo.logits(merged), expected, 1e-4)
