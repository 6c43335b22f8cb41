"""What a call of a wrapped model returns: by either attention kernel, in any precision, with whatever else is asked for."""

import families
import pytest
import torch
import zoo
from families import CLASSES, DEPTH, HEADS, WIDTH, base, images, shapley, wrap
from laws import PLAIN, adds_up, close, coalitions, deaf_to_absent, ends_meet, on, own, players, run, wrapped

each_prediction = pytest.mark.parametrize("prediction", ["vote", "classifier"])
FIELDS = ("logits", "attributions", "null_values", "coalition_values")

# -- attention kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prediction", "removal"),
    [("vit", "vote", "mask"), ("dinov2_registers", "classifier", "drop"), ("siglip", "vote", "mask")],
)
def test_eager_and_sdpa_agree_also_when_switched_after_wrapping(name, prediction, removal):
    model, inputs = own(name, prediction, removal=removal), zoo.inputs(name)
    chosen = coalitions(name, 6)
    sdpa = run(model, inputs, coalitions=chosen)
    for kernel in ("eager", "sdpa"):
        model.get_base_model().set_attn_implementation(kernel)
        assert model.config._attn_implementation == kernel
        other = run(model, inputs, coalitions=chosen)
        assert all(close(other[field], sdpa[field], 1e-5) for field in FIELDS)
        assert deaf_to_absent(model, inputs, players(name), chosen[:, 2:3], 30.0)
    model.get_base_model().set_attn_implementation("eager")
    with model.disable_adapter():
        disabled = run(model, inputs).logits
    plain = zoo.base(name)
    plain.set_attn_implementation("eager")
    assert torch.equal(disabled, run(plain, inputs).logits)


@on(PLAIN)
def test_an_eager_model_computes_as_before_with_the_same_attentions(name):
    plain, inputs = zoo.base(name), zoo.inputs(name)
    plain.set_attn_implementation("eager")
    expected = run(plain, inputs, output_attentions=True, output_hidden_states=True)
    model = wrap(plain, "classifier", tune="frozen")
    assert model.config._attn_implementation == "eager"
    asked = {"coalitions": coalitions(name, 5), "output_attentions": True, "output_hidden_states": True}
    got = run(model, inputs, **asked)
    assert close(got.logits, expected.logits)
    tokens = families.PREFIX[name] + families.PLAYERS
    assert len(got.attentions) == len(expected.attentions) == DEPTH
    assert len(got.hidden_states) == len(expected.hidden_states) == DEPTH + 1
    for one, other in zip(got.attentions, expected.attentions, strict=True):
        assert one.shape == other.shape == (2, HEADS, tokens, tokens)
        assert close(one, other)
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert one.shape == other.shape == (2, tokens, WIDTH)
        assert close(one, other)


# -- further outputs --------------------------------------------------------------------------------------------------


@each_prediction
def test_outputs_asked_for_in_the_config(prediction):
    model = own("vit", prediction)
    model.config.output_hidden_states = True
    output = run(model, zoo.inputs("vit"), coalitions=coalitions("vit"))
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 17, WIDTH)] * (DEPTH + 1)


@each_prediction
def test_a_tuple_on_request(prediction):
    model, inputs = wrapped("vit", prediction), zoo.inputs("vit")
    named, some = run(model, inputs), run(model, inputs, return_dict=False)
    for one, field in zip(some, FIELDS[:3], strict=True):
        assert torch.equal(one, named[field])
    asked = {"labels": torch.tensor([0, 4]), "coalitions": coalitions("vit")}
    five, named = run(model, inputs, return_dict=False, **asked), run(model, inputs, **asked)
    assert len(five) == 5
    for one, other in zip(five, named.to_tuple(), strict=True):
        assert torch.equal(one, other)


@each_prediction
def test_losses_are_those_of_the_base_model(prediction):
    inputs, labels = zoo.inputs("vit"), torch.tensor([1, 3])
    output = run(wrapped("vit", prediction), inputs, labels=labels)
    assert close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    frozen = wrap("vit", "classifier", tune="frozen")
    assert close(run(frozen, inputs, labels=labels).loss, run(base("vit"), inputs, labels=labels).loss)
    plain = base("vit")
    plain.config.problem_type = "multi_label_classification"
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 1, 1]])
    output = run(wrap(plain, prediction), inputs, labels=labels)
    assert close(output.loss, torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels))


@each_prediction
def test_without_a_token(prediction):
    model = wrapped("dinov2", prediction, shapley_token=False)
    assert not any("token" in name for name, p in model.named_parameters() if p.requires_grad)
    output = run(model, zoo.inputs("dinov2"), coalitions=coalitions("dinov2"))
    assert adds_up(output)
    assert ends_meet(output)


@each_prediction
def test_no_coalitions_at_all_give_an_empty_answer(prediction):
    output = run(wrapped("vit", prediction), zoo.inputs("vit"), coalitions=torch.ones(2, 0, 16, dtype=torch.bool))
    assert output.coalition_values.shape == (2, 0, CLASSES)


# -- precision (more in test_precision.py) ----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_a_base_in_double_precision(prediction):
    inputs, chosen = zoo.inputs("vit"), coalitions("vit")
    exact = run(wrapped("vit", prediction), inputs, coalitions=chosen)
    model = wrap(base("vit").double(), prediction)
    output = run(model, {"pixel_values": inputs["pixel_values"].double()}, coalitions=chosen)
    assert adds_up(output)
    for field in FIELDS:
        assert close(output[field].float(), exact[field], 1e-4), field


@each_prediction
def test_a_wrapped_model_moved_to_bf16_as_a_whole(prediction):
    model = own("vit", prediction).to(torch.bfloat16)
    output = run(model, {"pixel_values": images().bfloat16()}, coalitions=coalitions("vit"))
    assert close(output.null_values + output.attributions.sum(1), output.logits.float(), 2e-2)


# -- what a call leaves behind (more in test_calls.py) ----------------------------------------------------------------


def test_a_failed_call_leaves_nothing_behind():
    model, inputs = wrapped("vit"), zoo.inputs("vit")
    before = run(model, inputs)
    with pytest.raises(ValueError):
        run(model, {"pixel_values": images(2, 48, 48)})  # without interpolate_pos_encoding
    assert shapley(model).hooks.call is None
    assert torch.equal(run(model, inputs).attributions, before.attributions)
