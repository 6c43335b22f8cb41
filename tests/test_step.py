"""What a training step asks of a model: sums over coalitions instead of every player, and nothing of the device."""

import families
import matching
import pytest
import torch
import zoo
from families import wrap
from test_trainer import fixed_batch, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode

from shapadapter.adapter.coalitions import evaluate_coalitions
from shapadapter.core.errors import ImageError
from shapadapter.core.shapley import coalition_sums, expected_square, sample_pairs, shapley_loss, shapley_loss_of_sums
from shapadapter.explanation.game import active_layer

KINDS = {
    "vit": lambda prediction: (wrap("vit", prediction), {"pixel_values": families.images(3)}),
    "vit on a coarse grid": lambda prediction: (
        wrap("vit", prediction, grid=(2, 2)),
        {"pixel_values": families.images(3)},
    ),
    "beit": lambda prediction: (wrap(zoo.base("beit"), prediction), zoo.inputs(zoo.ZOO["beit"], 3)),
    "swin": lambda prediction: (wrap(zoo.base("swin"), prediction), zoo.inputs(zoo.ZOO["swin"], 3)),
    "resnet on a fine grid": lambda prediction: (
        wrap(zoo.base("resnet"), prediction, grid=(4, 4)),
        zoo.inputs(zoo.ZOO["resnet"], 3),
    ),
    "clip": lambda prediction: (
        matching.wrapped("clip", prediction),
        {**matching.images("clip", 3), **matching.tokens("clip", ["a cat", "a dog", "two eels"])},
    ),
}


FEW = [
    ("vit", "vote"),
    ("vit", "classifier"),
    ("beit", "vote"),
    ("resnet on a fine grid", "classifier"),
    ("clip", "vote"),
]
MORE = [("vit on a coarse grid", "vote"), ("swin", "classifier"), ("clip", "classifier")]


@pytest.fixture(
    params=[*FEW, *(pytest.param(one, marks=pytest.mark.families) for one in MORE)], ids=str, scope="module"
)
def played(request):
    """A wrapped model, its inputs, and pairs of coalitions with their sizes."""
    kind, prediction = request.param
    model, inputs = KINDS[kind](prediction)
    players = active_layer(model).tiling(**inputs).count
    pairs = sample_pairs(3, players, 2, torch.Generator().manual_seed(0))
    return model, {**inputs, "coalitions": pairs}, tuple(pairs[0].sum(dim=1).tolist())


def gradients(model, loss):
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, found, strict=True) if value is not None}


def test_sums_are_those_of_the_attributions(played):
    model, inputs, sizes = played
    one = model(**inputs)
    other = model(**inputs, coalition_sizes=sizes, return_attributions=False)
    assert other.attributions is None
    assert one.coalition_attributions is None
    scale = one.attributions.abs().max().item()
    sums = coalition_sums(one.attributions, inputs["coalitions"])
    torch.testing.assert_close(other.coalition_attributions, sums, atol=1e-5 * max(1, scale), rtol=1e-5)
    torch.testing.assert_close(other.expected_square, expected_square(one.attributions), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(other.coalition_values, one.coalition_values, atol=2e-5 * max(1, scale), rtol=1e-5)
    torch.testing.assert_close(other.logits, one.logits)


def test_their_loss_has_the_same_gradients(played):
    model, inputs, sizes = played
    one = model(**inputs)
    other = model(**inputs, coalition_sizes=sizes, return_attributions=False)
    targets = one.coalition_values.detach()
    losses = (
        shapley_loss(one.attributions, inputs["coalitions"], targets, one.null_values),
        shapley_loss_of_sums(other.coalition_attributions, other.expected_square, targets, other.null_values),
    )
    expected, found = (gradients(model, loss) for loss in losses)
    assert found
    assert found.keys() <= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value, atol=1e-5, rtol=2e-3)


def test_the_shapley_loss_never_moves_the_sum(played):
    """The gradient of all players' attributions together is nothing, whatever they are."""
    model, inputs, _ = played
    everyone = torch.ones_like(inputs["coalitions"][:, :1])  # (B, 1, N)
    output = model(**{**inputs, "coalitions": everyone}, return_attributions=False)
    torch.testing.assert_close(
        output.coalition_attributions[:, 0], (output.logits - output.null_values).float(), atol=1e-5, rtol=1e-5
    )
    weights = torch.randn(output.coalition_attributions.shape, generator=torch.Generator().manual_seed(1))
    for name, value in gradients(model, (weights * output.coalition_attributions).sum()).items():
        assert value.abs().max() < 1e-4 * weights.numel(), name


class Asked(TorchDispatchMode):
    """Notes what makes the host wait for the device: reading a number or a shape that depends on data, bringing a number."""

    WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "is_nonzero", "equal", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name in self.WAITING:
            self.waited.append(name)
        return operation(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_nowhere(played):
    model, inputs, sizes = played
    model.train()
    model(**inputs)  # BEiT computes its table of positions once
    with Asked() as own, model.disable_adapter():  # CLIP's text tower looks at its mask
        model(**{name: value for name, value in inputs.items() if name != "coalitions"})
    with Asked() as asked:
        model(**inputs, coalition_sizes=sizes, return_attributions=False)
    assert asked.waited == own.waited
    with Asked() as asked:  # that it would notice
        inputs["coalitions"].nonzero()
        inputs["coalitions"].sum().item()
        torch.as_tensor(1.0)
    assert asked.waited == ["nonzero", "_local_scalar_dense", "lift_fresh"]


def test_the_trainer_adds_no_waiting_to_a_step(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = fixed_batch(trainer)
    batch["coalition_sizes"] = tuple(batch["coalitions"][0].sum(dim=1).tolist())
    trainer.model.train()
    trainer.state.max_steps = 1
    with Asked() as asked:
        trainer.compute_loss(trainer.model, batch)
    assert asked.waited == []
    assert trainer.monitor.means("train")["task_loss"] > 0


def test_no_tensor_of_all_players_and_classes_is_kept_for_backward():
    classes, kept = 1000, []
    model = wrap(families.build("vit", id2label=dict.fromkeys(range(classes), "x")), "vote").train()
    pairs = sample_pairs(8, 16, 1, torch.Generator().manual_seed(0))

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    options = {"coalitions": pairs, "coalition_sizes": tuple(pairs[0].sum(dim=1).tolist())}
    for wanted in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(pixel_values=families.images(8), return_attributions=wanted, **options)
            shares = output.attributions if wanted else output.coalition_attributions
            shares.square().sum()
        assert (max(kept) >= 8 * 16 * classes) == wanted


def test_coalition_passes_without_gradient_leave_the_token_out(monkeypatch):
    model = wrap("vit").train()
    lengths = []
    block = active_layer(model).hooks.anatomy.blocks[-1]
    model.get_base_model().get_submodule(block).register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    pairs = sample_pairs(2, 16, 1, torch.Generator().manual_seed(0), sizes=torch.tensor([5]))
    options = {"pixel_values": families.images(2), "coalitions": pairs, "coalition_sizes": (5, 11)}
    model(**options)
    assert lengths == [1 + 1 + 16, 1 + 5, 1 + 11]
    lengths.clear()
    model(**options, coalition_grad=True)  # checkpointing would compute these again, with the token
    assert lengths == [18, 7, 13]


def test_attention_is_called_once_in_a_block_and_without_a_mask(monkeypatch):
    model, called = wrap("vit").train(), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, attn_mask=None, **options):
        called.append((query.shape[2], key.shape[2], attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    pairs = sample_pairs(2, 16, 1, torch.Generator().manual_seed(0), sizes=torch.tensor([5]))
    model(pixel_values=families.images(2), coalitions=pairs, coalition_sizes=(5, 11))
    # The token reads class token and patches, and nobody reads it; a mask would keep flash attention away.
    assert called == [*[(18, 17, None)] * 2, *[(6, 6, None)] * 2, *[(12, 12, None)] * 2]


def test_coalitions_evaluated_a_few_at_a_time():
    model, inputs = wrap("vit").eval(), {"pixel_values": families.images(2)}
    coalitions = torch.rand(2, 7, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.inference_mode():
        expected = model(**inputs, coalitions=coalitions).coalition_values
        every = evaluate_coalitions(model, inputs, coalitions, per_call=3)
        first = evaluate_coalitions(model, inputs, coalitions, per_call=3, read=lambda values: values[..., 0])
    torch.testing.assert_close(every, expected)
    torch.testing.assert_close(first, expected[..., 0])


@pytest.mark.parametrize("sizes", [(5,), (5, 11, 5, 11)])
def test_sizes_of_another_number_are_refused(sizes):
    pairs = sample_pairs(2, 16, 1, torch.Generator().manual_seed(0), sizes=torch.tensor([5]))
    with pytest.raises(ImageError, match="one of coalition_sizes for each coalition"):
        wrap("vit")(pixel_values=families.images(2), coalitions=pairs, coalition_sizes=sizes)


def test_wrong_sizes_are_refused():
    pairs = sample_pairs(2, 16, 1, torch.Generator().manual_seed(0), sizes=torch.tensor([5]))
    with pytest.raises(RuntimeError, match="other sizes than coalition_sizes"):
        wrap("vit")(pixel_values=families.images(2), coalitions=pairs, coalition_sizes=(6, 10))
