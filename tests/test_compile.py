"""torch.compile: one graph for the whole call, with sizes of coalitions that vary, and the same numbers."""

import shutil

import families
import pytest
import torch
import zoo
from families import wrap
from test_trainer import trained, trainer_of, wrapped
from torch._dynamo.utils import counters
from transformers import ViTConfig, ViTForImageClassification

from shapadapter.core.shapley import sample_pairs, shapley_loss_of_sums
from shapadapter.explanation.game import active_layer

KINDS = {
    # One block each: what tracing takes grows with their number.
    "vit": lambda prediction: (wrap(families.build("vit", num_hidden_layers=1), prediction), families.images(3)),
    "beit": lambda prediction: (
        wrap(zoo.build("beit", num_hidden_layers=1), prediction),
        zoo.inputs(zoo.ZOO["beit"], 3)["pixel_values"],
    ),
    "resnet": lambda prediction: (
        wrap(zoo.base("resnet"), prediction),
        zoo.inputs(zoo.ZOO["resnet"], 3)["pixel_values"],
    ),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def step(model, called, pixels, size):
    """Loss and gradients of `model`, called as it is or compiled, on one pair of coalitions of this size."""
    players = active_layer(model).tiling(pixels).count
    drawn = sample_pairs(len(pixels), players, 1, torch.Generator().manual_seed(size), sizes=torch.tensor([size]))
    sizes = (size, players - size)
    labels = torch.arange(len(pixels))
    torch.manual_seed(0)  # dropout
    output = called(
        pixel_values=pixels, labels=labels, coalitions=drawn, coalition_sizes=sizes, return_attributions=False
    )
    sums, square = output.coalition_attributions, output.expected_square
    loss = output.loss + shapley_loss_of_sums(sums, square, output.coalition_values, output.null_values)
    model.zero_grad()
    loss.backward()
    return loss.item(), {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }


def assert_same(one, other, tolerance):
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], atol=tolerance, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("vit", "vote"), pytest.param("beit", "classifier", marks=pytest.mark.families), ("resnet", "vote")],
)
def test_the_explanation_pass_is_one_graph(kind, prediction):
    model, pixels = KINDS[kind](prediction)
    with torch.no_grad():
        plain = model(pixel_values=pixels)
        found = torch.compile(model, backend="eager", fullgraph=True)(pixel_values=pixels)
    torch.testing.assert_close(found.logits, plain.logits)
    torch.testing.assert_close(found.attributions, plain.attributions)


def test_a_few_graphs_serve_all_sizes_of_coalitions():
    """Of the classifier; the next test is of the vote."""
    model, pixels = KINDS["vit"]("classifier")
    model.train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in (5, 9, 7):
        assert_same(step(model, compiled, pixels, size), step(model, model, pixels, size), 1e-6)
    # One for the first size, one for all.
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.families
@pytest.mark.slow
@needs_compiler
def test_inductor_computes_the_same():
    model = wrap(families.build("vit", num_hidden_layers=1), "vote")
    pixels = families.images(3)
    compiled = torch.compile(model, fullgraph=True)
    model.train()
    assert_same(step(model, compiled, pixels, 5), step(model, model, pixels, 5), 1e-5)


def test_the_trainer_compiles(tmp_path):
    ends = []
    for name, options in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
        torch.manual_seed(0)
        base = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3))
        trainer = trainer_of(tmp_path / name, wrapped(base=base), max_steps=1, **options)
        trainer.train()
        trainer.save_model()
        ends.append(trained(trainer.model))
    assert counters["stats"]["unique_graphs"] > 0
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-5)


def test_wrong_sizes_are_refused_in_a_graph_too():
    model, pixels = KINDS["vit"]("vote")
    drawn = sample_pairs(3, 16, 1, torch.Generator().manual_seed(0), sizes=torch.tensor([5]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # which drops what nobody uses
    with torch.no_grad(), pytest.raises(RuntimeError, match="other sizes than coalition_sizes"):
        compiled(pixel_values=pixels, coalitions=drawn, coalition_sizes=(6, 10))
