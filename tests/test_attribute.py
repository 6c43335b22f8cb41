"""`attribute`: every method on the user's own model, each against an independent computation."""

import copy
import itertools

import families
import matching
import numpy as np
import pytest
import torch
import zoo
from families import CLASSES, images, shapley, wrap

from shapadapter import PatchGame, attribute, explain
from shapadapter.backbone import attention_weights, fill_absent, sum_over_tiles
from shapadapter.core.errors import ClassNotFoundError, ImageError, ShapleyError
from shapadapter.core.shapley import all_coalitions
from shapadapter.explanation.methods import METHODS

attr = pytest.importorskip("captum.attr")

VALUES = ("kernel_shap", "permutation", "exact", "leave_one_out")
ATTENTION = ("attention", "attention_rollout")
GRADIENTS = ("grad_cam", "gradient_x_input", "integrated_gradients")
REFERENCES = ("random", "centre", "equal")
NINE = {"interpolate_pos_encoding": True}  # 24 x 24 pixels, 9 players


@pytest.fixture(scope="module")
def model():
    return wrap("vit", lora_dropout=0.5)


@pytest.fixture(scope="module")
def chosen():
    """A model whose own classifier predicts, from the class token."""
    return wrap("vit", "classifier")


def nine(count=2, seed=0):
    return images(count, 24, 24, seed)


def game(model, pixels, **options):
    return PatchGame(model, pixels, **options)


def by_patch(pixels, side=families.PATCH):
    """Sums over colours and patches of (B, 3, H, W), cut by hand."""
    rows, cols = pixels.shape[2] // side, pixels.shape[3] // side
    return pixels.reshape(len(pixels), 3, rows, side, cols, side).sum(dim=(1, 3, 5))


# -- the interface ----------------------------------------------------------------------------------------------------


def test_every_method_is_tested_here():
    assert set(METHODS) == {
        "shapadapter",
        "gradient",
        "refined",
        "presence_gradient",
        *VALUES,
        *ATTENTION,
        *GRADIENTS,
        *REFERENCES,
    }


@pytest.mark.parametrize("method", METHODS)
def test_one_interface(model, method):
    """Fields, shapes and counts; nothing depends on the batch size, nothing is left behind in the model."""
    target = copy.deepcopy(model).train()
    target.get_base_model().vit.layers[0].eval()
    before = state_of(target)
    explanation = attribute(target, nine(3), method=method, top_k=2, evaluations=32, **NINE)
    assert state_of(target) == before
    assert all(parameter.grad is None for parameter in target.parameters())
    assert explanation.method == method
    assert explanation.attributions.shape == (3, 3, 3, 2)
    assert explanation.attributions.isfinite().all()
    assert explanation.evaluations.shape == (3,)
    ours = explain(target, nine(3), top_k=2, **NINE)
    for field in ("classes", "logits", "null_values", "probabilities", "images"):
        assert torch.allclose(getattr(explanation, field), getattr(ours, field)), field
    again = attribute(target, nine(3), method=method, top_k=2, evaluations=32, batch_size=2, **NINE)
    assert torch.allclose(again.attributions, explanation.attributions, atol=2e-4)


def state_of(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        model.get_base_model().config._attn_implementation,
        hooks,
    )


def test_refined_is_explain(model):
    ours = attribute(model, nine(), method="refined", evaluations=32, seed=3, top_k=2, **NINE)
    same = explain(model, nine(), refine=32, seed=3, top_k=2, **NINE)
    assert torch.equal(ours.attributions, same.attributions)
    assert torch.equal(ours.standard_errors, same.standard_errors)
    assert ours.evaluations.tolist() == [32, 32]
    assert (ours.method, same.method) == ("refined", "refined")


def test_ours_is_explain(model):
    ours, one_pass = attribute(model, images()), explain(model, images())
    assert torch.equal(ours.attributions, one_pass.attributions)
    assert ours.evaluations.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("method", "spent"),
    {
        "kernel_shap": 32,
        "permutation": 32,
        "exact": 510,
        "leave_one_out": 9,
        "attention": 0,
        "gradient_x_input": 3,
        "grad_cam": 3,
        "integrated_gradients": 99,
        "random": 0,
    }.items(),
)
def test_evaluations_are_counted(model, method, spent):
    count = 32 if method == "kernel_shap" else 33
    explanation = attribute(model, nine(), method=method, evaluations=count, top_k=3, **NINE)
    assert explanation.evaluations.tolist() == [spent, spent]


def test_targets(model):
    everything = attribute(model, nine(), method="leave_one_out", **NINE)
    some = attribute(model, nine(), method="leave_one_out", targets=["dog", 0], **NINE)
    assert some.classes.tolist() == [[3, 0]] * 2
    assert torch.allclose(some.attributions, everything.attributions[..., [3, 0]], atol=1e-6)
    with pytest.raises(ClassNotFoundError, match="Did you mean 'dog'"):
        attribute(model, nine(), method="random", targets=["dogg"], **NINE)
    with pytest.raises(ValueError, match="either"):
        attribute(model, nine(), method="random", targets=["dog"], top_k=1, **NINE)


def test_a_method_that_is_none(model):
    with pytest.raises(ValueError, match=r"no method 'gradcam'. Did you mean 'grad_cam'"):
        attribute(model, images(), method="gradcam")
    with pytest.raises(ValueError, match="leave_one_out, attention"):
        attribute(model, images(), method="xyz")
    with pytest.raises(ValueError, match="no method None"):
        attribute(model, images(), method=None)


def test_what_cannot_be_asked(model):
    for evaluations in (0, 1, -4, 64.0, "64", None):
        with pytest.raises(ValueError, match="at least 2"):
            attribute(model, images(), method="kernel_shap", evaluations=evaluations)
    for method in ("kernel_shap", "refined"):
        with pytest.raises(ValueError, match=f"must be an even number for '{method}'.*got 7"):
            attribute(model, images(), method=method, evaluations=7)
    with pytest.raises(ValueError, match="30 evaluations, got evaluations=29"):
        attribute(model, images(), method="permutation", evaluations=29)
    with pytest.raises(ValueError, match="enumerated"):
        attribute(model, images(1, 40, 40), method="exact", **NINE)
    with pytest.raises(ShapleyError, match="get_peft_model"):
        attribute(families.base("vit"), images(), method="random")
    with pytest.raises(ImageError):
        attribute(model, [], method="random")


# -- values of coalitions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_sampling_converges_to_the_exact_values(prediction):
    model = wrap("vit", prediction)
    exact = attribute(model, nine(), method="exact", **NINE)
    direct = game(model, nine()[1], **NINE).exact().float()  # (N, K)
    assert torch.allclose(exact.attributions[1].flatten(0, 1), direct, atol=1e-5)
    for method in ("kernel_shap", "permutation"):
        found = [attribute(model, nine(), method=method, evaluations=m, **NINE) for m in (32, 1024)]
        few, many = ((e.attributions - exact.attributions).norm() / exact.attributions.norm() for e in found)
        assert many < 0.5 * few, method
        assert many < 0.15, method
        assert all((e.efficiency_gap < 1e-4).all() for e in found), method


def test_leave_one_out_by_hand(model):
    found = attribute(model, nine(), method="leave_one_out", **NINE)
    for player in range(9):
        present = torch.ones(2, 1, 9, dtype=torch.bool)
        present[:, 0, player] = False
        with torch.no_grad():
            output = model(pixel_values=nine(), coalitions=present, **NINE)
        lost = output.logits - output.coalition_values[:, 0]  # (B, K)
        assert torch.allclose(found.attributions[:, player // 3, player % 3], lost, atol=1e-5)


def test_standard_errors_of_permutations(model):
    """The error of the estimate is as large as the standard error says."""
    exact = attribute(model, nine(), method="exact", **NINE).attributions
    found = [attribute(model, nine(), method="permutation", evaluations=160, seed=s, **NINE) for s in range(10)]
    squares = torch.stack([((e.attributions - exact) / e.standard_errors).square() for e in found])
    # The square of Student's t with 9 degrees of freedom is 9 / 7 on average.
    assert 0.9 < squares.mean() < 1.8
    assert attribute(model, nine(), method="permutation", evaluations=16, **NINE).standard_errors is None


def test_a_permutation_is_a_chain_of_gains(model):
    """The cheapest answer, from one order and its reverse, is that of one of the 24 orders of four players."""
    found = attribute(model, images(1, 16, 16), method="permutation", evaluations=6, **NINE)
    played = game(model, images(1, 16, 16), **NINE)
    values = played.values(all_coalitions(4))  # by bitmask
    distances = []
    for order in itertools.permutations(range(4)):
        expected = torch.zeros(4, CLASSES)
        for chain in (order, order[::-1]):
            present = 0
            for player in chain:
                expected[player] += (values[present | 1 << player] - values[present]) / 2
                present |= 1 << player
        distances.append((found.attributions[0].flatten(0, 1) - expected).abs().max().item())
    assert sorted(distances)[1] < 1e-5  # the order and its reverse
    assert sorted(distances)[2] > 1e-3


def test_seeds(model):
    for method in ("kernel_shap", "permutation", "random"):
        one, same, other = (
            attribute(model, nine(), method=method, evaluations=32, seed=seed, **NINE).attributions
            for seed in (0, 0, 1)
        )
        assert torch.equal(one, same), method
        assert not torch.allclose(one, other, atol=1e-3), method


# -- attention --------------------------------------------------------------------------------------------------------


def own_attentions(family, pixels):
    """The base model's own attention (blocks, B, heads, T, T), by transformers' eager kernel, on an untrained adapter."""
    plain = families.base(family)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(plain(pixel_values=pixels, output_attentions=True).attentions).numpy()


@pytest.mark.parametrize("family", ["deit_teacher", "dinov2_registers", "siglip"])
def test_attention_and_rollout_by_hand(family):
    model, prefix = wrap(family, trained=False), families.PREFIX[family]
    assert model.get_base_model().config._attn_implementation == "sdpa"
    own = own_attentions(family, images())
    joint = np.eye(own.shape[-1])[None]
    for block in own.mean(axis=2):  # (B, T, T)
        mixed = block + np.eye(block.shape[-1])
        joint = mixed / mixed.sum(axis=-1, keepdims=True) @ joint
    for method, expected in (("attention", own[-1].mean(axis=1)), ("attention_rollout", joint)):
        row = expected[:, 0] if prefix else expected[:, prefix:].mean(axis=1)  # (B, T)
        found = attribute(model, images(), method=method, top_k=2).attributions
        assert np.allclose(found[..., 0].flatten(1), row[:, prefix:], atol=1e-6), method
        assert torch.equal(found[..., 0], found[..., 1])
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_attention_of_a_trained_adapter_is_what_the_model_returns(model):
    eager = copy.deepcopy(model)
    eager.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        last = eager(pixel_values=images(), output_attentions=True).attentions[-1]  # (B, heads, T, T)
    found = attribute(model, images(), method="attention").attributions[..., 0].flatten(1)
    assert torch.allclose(found, last.mean(dim=1)[:, 0, 1:], atol=1e-6)


def test_nothing_is_collected_after_an_error(model):
    base = model.get_base_model()

    def stop(*_):
        assert base.config._attn_implementation == "sdpa"  # which other threads go on using
        raise KeyError

    with base.vit.layernorm.register_forward_pre_hook(stop), pytest.raises(KeyError), attention_weights() as found:
        model(images())
    assert len(found) == 2
    model(images())
    assert len(found) == 2


def test_players_of_several_patches():
    fine, coarse = wrap("vit", trained=False), wrap("vit", trained=False, grid=(2, 2))
    one, other = (attribute(m, images(), method="attention").attributions for m in (fine, coarse))
    assert torch.allclose(one.unflatten(1, (2, 2)).unflatten(3, (2, 2)).sum(dim=(2, 4)), other, atol=1e-6)


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(model, pixels, label, **options):
    pixels = pixels.clone().requires_grad_()
    logits = model(pixel_values=pixels, **options).logits
    return torch.autograd.grad(logits[:, label].sum(), pixels)[0], logits.detach()


@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_gradient_x_input_by_hand(prediction):
    model = wrap("vit", prediction)
    found = attribute(model, images(), method="gradient_x_input")
    for label in range(CLASSES):
        expected = by_patch(gradients(model, images(), label)[0] * images())
        assert torch.allclose(found.attributions[..., label], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_integrated_gradients_are_complete(family):
    """They sum to the difference of the logits of the image and of the fill colour."""
    colour = [0.5, -1.0, 0.25]
    model = wrap("vit" if family == "vit" else zoo.base(family), removal="pixels", fill_color=colour)
    pixels = images() if family == "vit" else zoo.inputs(family)["pixel_values"]
    steps = 200 if family == "vit" else 400  # a path through many kinks
    found = attribute(model, pixels, method="integrated_gradients", evaluations=steps, targets=[0, 2])
    with torch.no_grad():
        empty = model(pixel_values=torch.tensor(colour).view(1, 3, 1, 1).expand_as(pixels)).logits
    moved = (found.logits - empty)[:, [0, 2]]
    assert (found.attributions.sum(dim=(1, 2)) - moved).abs().max() < 0.05 * moved.abs().max()


def test_integrated_gradients_are_captums(model):
    method = attr.IntegratedGradients(lambda pixels: model(pixel_values=pixels).logits)
    expected = by_patch(method.attribute(images(), target=torch.tensor([3, 3]), n_steps=20).float())
    found = attribute(model, images(), method="integrated_gradients", evaluations=20, targets="dog", batch_size=4)
    assert torch.allclose(found.attributions[..., 0], expected.detach(), atol=1e-5)


@pytest.mark.parametrize("prediction", ["vote", "classifier"])
def test_grad_cam_is_captums_on_a_convolutional_model(prediction):
    model, pixels = wrap(zoo.base("resnet"), prediction, tune="frozen"), zoo.inputs("resnet")["pixel_values"]
    # A frozen model's own classifier says what it said without an adapter.
    reference = model if prediction == "vote" else zoo.base("resnet")
    last = next(m for name, m in reference.named_modules() if name.endswith("resnet.encoder.stages.3"))
    method = attr.LayerGradCam(lambda pixels: reference(pixel_values=pixels).logits, last)
    found = attribute(model, pixels, method="grad_cam")
    for label in range(CLASSES):
        expected = method.attribute(pixels, target=label, relu_attributions=True)  # (B, 1, rows, cols)
        assert torch.allclose(found.attributions[..., label], expected[:, 0].detach(), atol=1e-5)
    assert found.attributions.max() > 0


def test_grad_cam_of_tokens_by_hand(model):
    """In `vote` the head's features are those after the last block."""
    caught = []
    last = model.get_base_model().vit.layers[-1]
    with last.register_forward_hook(lambda module, args, output: caught.append(output)):
        logits = model(pixel_values=images().requires_grad_()).logits
    features = caught[0]
    for label in range(CLASSES):
        gradient = torch.autograd.grad(logits[:, label].sum(), features, retain_graph=True)[0][:, 1:]
        expected = (features[:, 1:] * gradient.mean(dim=1, keepdim=True)).sum(dim=-1).relu().unflatten(1, (4, 4))
        found = attribute(model, images(), method="grad_cam", targets=label).attributions[..., 0]
        assert torch.allclose(found, expected.detach(), atol=1e-5)


def test_grad_cam_where_the_class_token_predicts(chosen):
    """The last block's patches have no part in the prediction; what enters it does."""
    base = copy.deepcopy(chosen)
    shapley(base).detach(base.get_base_model())  # no Shapley token in the way
    caught = []
    last = base.get_base_model().vit.layers[-1]
    with last.register_forward_pre_hook(lambda module, args: caught.append(args[0])):
        logits = base.get_base_model()(pixel_values=images().requires_grad_()).logits
    gradient = torch.autograd.grad(logits[:, 2].sum(), caught[0])[0][:, 1:]
    expected = (caught[0][:, 1:] * gradient.mean(dim=1, keepdim=True)).sum(dim=-1).relu().unflatten(1, (4, 4))
    found = attribute(chosen, images(), method="grad_cam", targets=2).attributions[..., 0]
    assert torch.allclose(found, expected.detach(), atol=1e-5)
    assert found.max() > 0


def test_grad_cam_without_places():
    with pytest.raises(ShapleyError, match="'integrated_gradients'"):
        attribute(wrap(zoo.base("perceiver_conv")), zoo.inputs("perceiver_conv"), method="grad_cam")


@pytest.mark.parametrize("method", GRADIENTS)
def test_gradients_inside_the_caller_s_inference_mode(model, method):
    settings = {"method": method, "top_k": 2, "evaluations": 4}
    expected = attribute(model, images(2), **settings)
    with torch.inference_mode():
        found = attribute(model, images(2), **settings)
    assert torch.equal(found.attributions, expected.attributions)


def test_frozen_models_have_gradients_too():
    frozen = wrap("vit", "classifier", tune="frozen")
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    for method in GRADIENTS:
        assert attribute(frozen, images(), method=method, evaluations=4, top_k=1).attributions.abs().max() > 0


@pytest.mark.parametrize(("players", "seen"), [((3, 4), (24, 32)), ((3, 5), (31, 37)), ((2, 3), (30, 36))])
def test_sums_over_tiles_follow_removal(players, seen):
    """A pixel belongs to the player with whom it goes."""
    pixels = torch.randn(2, 31 if seen[0] > 24 else 24, 37 if seen[1] > 32 else 32, 3)
    found = sum_over_tiles(pixels, players, seen)  # (B, N, 3)
    for player in range(players[0] * players[1]):
        present = torch.ones(2, players[0] * players[1], dtype=torch.bool)
        present[:, player] = False
        kept = fill_absent(pixels.permute(0, 3, 1, 2), present, players, torch.zeros(3), False, seen)
        gone = (pixels.permute(0, 3, 1, 2) - kept).sum(dim=(2, 3))  # (B, 3)
        assert torch.allclose(found[:, player], gone, atol=1e-4)


# -- references -------------------------------------------------------------------------------------------------------


def test_references(model):
    equal = attribute(model, images(2, 24, 32), method="equal", **NINE)
    assert (equal.efficiency_gap < 1e-5).all()
    assert equal.attributions.flatten(1, 2).std(dim=1).max() < 1e-6
    centre = attribute(model, images(2, 24, 32), method="centre", **NINE).attributions[0, ..., 0]
    assert torch.allclose(centre, centre.flip(0))
    assert torch.allclose(centre, centre.flip(1))
    assert centre[1, 1] == centre.max()
    assert centre[0, 0] == centre.min()
    noise = attribute(model, images(3), method="random").attributions
    assert 0 <= noise.min() < 0.2 < 0.8 < noise.max() <= 1
    assert not torch.allclose(noise[0], noise[1])


# -- the user's own ---------------------------------------------------------------------------------------------------


def saliency(model, inputs, classes):
    method = attr.Saliency(lambda pixels: model(**{**inputs, "pixel_values": pixels}).logits)
    pixels = inputs["pixel_values"].requires_grad_()
    maps = [method.attribute(pixels, target=target) for target in classes.T]  # C of (B, 3, H, W)
    return torch.stack(maps, dim=-1).sum(dim=1)  # (B, H, W, C)


def test_a_method_of_pixels(model):
    given = images()
    found = attribute(model, given, method=saliency, top_k=2)
    assert not given.requires_grad
    assert found.method == "saliency"
    assert found.evaluations is None
    for image in range(2):
        for column, label in enumerate(found.classes[image].tolist()):
            expected = by_patch(gradients(model, images(), label)[0].abs())[image]
            assert torch.allclose(found.attributions[image, ..., column], expected, atol=1e-5)


def test_a_method_of_players(model):
    """Numpy will do, and options are among the inputs."""

    def ones(model, inputs, classes):
        assert inputs["interpolate_pos_encoding"]
        assert model(**inputs).logits.shape == (2, CLASSES)
        return np.ones((2, 3, 3, classes.shape[1]))

    assert attribute(model, nine(), method=ones, top_k=1, **NINE).attributions.eq(1).all()


def test_a_method_of_something_else(model):
    with pytest.raises(ShapleyError, match=r"\(2, 4, 4, 5\).*\(2, 32, 32, 5\).*got \(2, 16\)"):
        attribute(model, images(), method=lambda model, inputs, classes: torch.zeros(2, 16))
    with pytest.raises(ShapleyError, match=r"\(2, 4, 4, 5\).*got NoneType"):
        attribute(model, images(), method=lambda model, inputs, classes: None)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ShapleyError, match="NaN or infinite"):
            attribute(model, images(), method=lambda *_, bad=bad: torch.full((2, 4, 4, CLASSES), bad))


# -- other kinds of models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["swin", "resnet"])
def test_models_without_tokens(family):
    model = wrap(zoo.base(family), "classifier")
    for method in (*VALUES, *GRADIENTS, *REFERENCES):
        found = attribute(model, zoo.inputs(family), method=method, evaluations=24, top_k=2)
        assert found.attributions.shape == (2, 2, 2, 2), method
        if method in ("kernel_shap", "permutation", "exact", "equal"):
            assert (found.efficiency_gap < 1e-4).all(), method
    for method in ATTENTION:
        with pytest.raises(ShapleyError, match="'kernel_shap'"):
            attribute(model, zoo.inputs(family), method=method)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["clip", "siglip2"])
@pytest.mark.parametrize("method", [m for m in (*VALUES, *ATTENTION, *GRADIENTS, *REFERENCES) if m != "exact"])
def test_images_and_texts(family, method):
    model, processor = matching.wrapped(family), matching.processor(family)
    texts = ["a one", "a two", "a six"]
    found = attribute(
        model, matching.pictures(2), processor, method=method, texts=texts, targets="a two", evaluations=30
    )
    assert found.labels == tuple(texts)
    assert found.attributions.shape == (2, 4, 4, 1)
    assert found.classes.tolist() == [[1], [1]]
    if method in ("kernel_shap", "permutation", "equal"):
        assert (found.efficiency_gap < 1e-3).all()
    with pytest.raises(ShapleyError, match="texts="):
        attribute(model, matching.pictures(2), processor, method=method)


@pytest.mark.filterwarnings("ignore")
def test_values_of_texts_converge():
    """Values of coalitions are similarities to the texts: sampled, they lead to the enumerated answer."""
    model, processor = matching.wrapped("clip", grid=(2, 2)), matching.processor("clip")
    arguments = {"processor": processor, "texts": ["a one", "a two"]}
    exact, sampled = (
        attribute(model, matching.pictures(2), method=method, evaluations=400, **arguments).attributions
        for method in ("exact", "kernel_shap")
    )
    assert (sampled - exact).norm() < 0.1 * exact.norm()


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_patches():
    """NaFlex images come as patches; each patch's values belong to its player."""
    model, inputs = wrap(zoo.base("siglip2")), zoo.inputs("siglip2")
    pixels = inputs["pixel_values"].clone().requires_grad_()
    logits = model(**{**inputs, "pixel_values": pixels}).logits
    expected = (torch.autograd.grad(logits[:, 1].sum(), pixels)[0] * pixels).sum(dim=-1)[:, :16]
    found = attribute(model, inputs, method="gradient_x_input", targets=1).attributions[..., 0]
    assert torch.allclose(found.flatten(1), expected.detach(), atol=1e-5)
