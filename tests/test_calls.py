"""Nothing of a call outlives it, and threads are in calls of their own: whatever is raised, however calls are nested (law 13)."""

import copy
import functools
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import families
import pytest
import torch
import zoo
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn

from shapadapter import PatchGame, ShapleyConfig, attribute, explain
from shapadapter.backbone.attention import _collecting
from shapadapter.backbone.forward import _request
from shapadapter.backbone.hooks import _running

THREADS, PATIENCE = 8, 60

# One of each kind: a token among patches, relative positions, a feature map; the head's own prediction and the base model's.
KINDS = [("vit", "vote"), ("vit", "classifier"), ("beit", "classifier"), ("resnet", "vote")]
PREDICTIONS = ("vote", "classifier")


def _model(family="vit", prediction="vote", **base):
    torch.manual_seed(0)
    made = families.MAKERS[family](**base) if family in families.MAKERS else zoo.base(family)
    model = get_peft_model(made, ShapleyConfig(prediction=prediction)).eval()
    families.randomise(model)
    return model


def _images(family="vit"):
    if family in families.MAKERS:
        return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return zoo.inputs(family)["pixel_values"]


@functools.cache
def _coalitions(players):
    drawn = torch.rand(2, 3, players, generator=torch.Generator().manual_seed(5)) < 0.5
    return torch.cat([drawn, ~drawn], dim=1)


def _answers(model, images, **more):
    with torch.no_grad():
        players = model(images).attributions.shape[1]
        output = model(images, coalitions=_coalitions(players), **more)
    # The null values are a view of a parameter.
    return output.logits, output.attributions, output.null_values.clone(), output.coalition_values


def _same(one, other, exact=True):
    return all(
        torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True)
    )


def _places(model, count=6):
    """Names of modules whose calls are moments of a pass, from the first to the last, those of the adapter among them."""
    leaves = [name for name, module in model.get_base_model().named_modules() if name and not list(module.children())]
    return leaves[:: max(1, len(leaves) // count)] + [name for name in leaves if "shapley_norm" in name]


def _nothing_left():
    return _running.found is None and _request.pending is False and _collecting.weights is None


@pytest.mark.parametrize(("family", "prediction"), KINDS)
def test_an_exception_at_any_module_leaves_nothing(family, prediction):
    model, images = _model(family, prediction), _images(family)
    before = _answers(model, images)
    base = model.get_base_model()

    def stop(module, args):
        raise KeyboardInterrupt

    stopped = 0
    for name in _places(model):
        with base.get_submodule(name).register_forward_pre_hook(stop):
            try:
                _answers(model, images)
            except KeyboardInterrupt:
                stopped += 1
        assert _nothing_left(), name
        assert _same(before, _answers(model, images)), name
    assert stopped >= 3
    with ThreadPoolExecutor(1) as pool:
        assert _same(before, pool.submit(_answers, model, images).result(timeout=PATIENCE))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_an_exception_of_a_hook_on_the_model_itself(when):
    model, images = _model(), _images()
    before = _answers(model, images)

    def stop(*_):
        raise KeyboardInterrupt

    base = model.get_base_model()
    register = base.register_forward_pre_hook if when == "pre" else base.register_forward_hook
    with register(stop), pytest.raises(KeyboardInterrupt):
        model(images)
    assert _nothing_left()
    assert _same(before, _answers(model, images))


@pytest.mark.parametrize(("family", "prediction"), KINDS)
def test_a_call_within_a_call_at_any_module(family, prediction):
    model, images = _model(family, prediction), _images(family)
    expected, other = _answers(model, images), _answers(model, images.flip(0))
    found, inside = [], False

    def call_again(module, args):
        nonlocal inside
        if not inside:
            inside = True
            found.append(_answers(model, images.flip(0)))
            inside = False

    for name in _places(model, 3):
        with model.get_base_model().get_submodule(name).register_forward_pre_hook(call_again):
            assert _same(expected, _answers(model, images)), name
    assert len(found) >= 3
    assert all(_same(other, each) for each in found)


def test_parts_of_the_model_called_by_themselves_know_no_pass():
    model, images = _model(), _images()
    vit = model.get_base_model().vit
    with torch.no_grad():
        before = vit(images).last_hidden_state

    def stop(*_):
        raise KeyboardInterrupt

    with vit.layernorm.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
        model(images, coalitions=_coalitions(16))
    with torch.no_grad():
        assert torch.equal(before, vit(images).last_hidden_state)


@pytest.fixture
def _many_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def _jobs(images):
    """What threads may do at once with one model, each returning numbers that must be those of one thread alone."""
    one, two = images[:1], images[1:]
    return {
        "explain": lambda model: explain(model, one).attributions,
        "explain others": lambda model: explain(model, two).attributions,
        "refine": lambda model: explain(model, one, refine=32).attributions,
        "attention": lambda model: attribute(model, two, method="attention").attributions,
        "grad-cam": lambda model: attribute(model, one, method="grad_cam").attributions,
        "leave one out": lambda model: attribute(model, one, method="leave_one_out").attributions,
        "game": lambda model: PatchGame(model, two[0]).values(_coalitions(16)[0]),
        "targets": lambda model: model(images, coalitions=_coalitions(16)).coalition_values.detach(),
    }


@pytest.mark.usefixtures("_many_switches")
@pytest.mark.parametrize(("prediction", "training"), [("vote", False), ("classifier", True)])
def test_threads_get_what_one_thread_gets(prediction, training):
    # With dropout, so that a pass in the wrong mode shows.
    model = _model(prediction=prediction, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train(training)
    jobs = _jobs(_images())
    alone = {name: job(model) for name, job in jobs.items()}
    modes = [module.training for module in model.modules()]
    wrong, gate = [], threading.Barrier(THREADS)

    def work(name):
        gate.wait(PATIENCE)
        for _ in range(4):
            if not torch.allclose(jobs[name](model), alone[name], atol=1e-5):
                wrong.append(name)

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(work, name) for name in jobs]:
            future.result(timeout=PATIENCE)
    assert not wrong
    assert modes == [module.training for module in model.modules()]


@pytest.mark.usefixtures("_many_switches")
def test_a_training_step_keeps_its_dropout_while_others_explain():
    model, images = _model(hidden_dropout_prob=0.5).train(), _images()
    seen, done = set(), threading.Event()
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    with torch.no_grad():
        evaluated = copy.deepcopy(model).eval()(images).logits

    def explain_on():
        while not done.is_set():
            explain(model, images)

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(explain_on) for _ in range(2)]
        for _ in range(10):
            seen |= {m.training for m in dropouts}
            assert not torch.allclose(model(images).logits, evaluated, atol=1e-4)
        done.set()
        [other.result(timeout=PATIENCE) for other in others]
    assert seen == {True}


def test_explaining_in_training_mode_is_explaining_in_evaluation_mode():
    model, images = _model(hidden_dropout_prob=0.5), _images()
    expected = explain(model, images, refine=16)
    found = explain(model.train(), images, refine=16)
    assert torch.equal(expected.attributions, found.attributions)
    assert torch.equal(expected.logits, found.logits)
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout))


@pytest.mark.parametrize("way", ["model", "in place", "a part"])
def test_explaining_a_compiled_model_in_training_mode(way):
    model, images = _model(hidden_dropout_prob=0.5), _images()
    expected = explain(model, images).logits
    if way == "in place":
        model.compile(backend="eager")
    elif way == "a part":
        vit = model.get_base_model().vit
        vit.layernorm = torch.compile(vit.layernorm, backend="eager")
    compiled = torch.compile(model, backend="eager") if way == "model" else model
    assert torch.allclose(explain(compiled.train(), images).logits, expected, atol=1e-6)
    assert compiled.training


def test_levit_forgets_what_it_computed_before_a_step():
    model, images = _model("levit"), _images("levit")
    explain(model.train(), images)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.add_(torch.randn_like(parameter))
    fresh = copy.deepcopy(model).train().eval()
    assert torch.equal(explain(model, images).logits, explain(fresh, images).logits)


def test_a_method_that_hooks_modules_is_not_heard_by_others():
    model, images = _model(), _images()
    counts = {"hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())}
    heard = []

    def mine(wrapped, inputs, classes):
        # Left behind on purpose.
        wrapped.get_base_model().vit.layernorm.register_forward_hook(lambda *_: heard.append(1))
        wrapped(**inputs)
        return torch.zeros(2, 4, 4, classes.shape[1])

    attribute(model, images, method=mine)
    assert heard
    heard.clear()
    explain(model, images)
    assert not heard
    assert counts["hooks"] == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_answer_by_themselves(copied):
    model, images = _model(), _images()
    expected, other = _answers(model, images), copied(model)
    assert _same(expected, _answers(other, images))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert _same(expected, _answers(other, images))


@pytest.mark.parametrize("order", ["before", "after"])
def test_wrappers_of_accelerate_lie_around_the_forward(order):
    expected = _answers(_model(), _images())
    torch.manual_seed(0)
    base = families.MAKERS["vit"]()
    if order == "before":
        add_hook_to_module(base, AlignDevicesHook())
    model = get_peft_model(base, ShapleyConfig()).eval()
    families.randomise(model)
    if order == "after":
        add_hook_to_module(model.get_base_model(), AlignDevicesHook())
    assert _same(expected, _answers(model, _images()))
    assert torch.equal(explain(model.train(), _images()).logits, expected[0])
    bare = model.eval().unload()
    assert not hasattr(bare(_images()), "attributions")
    if order == "after":
        remove_hook_from_module(bare)
        assert not hasattr(bare(_images()), "attributions")


def test_unloading_gives_the_forward_back():
    base = families.MAKERS["vit"]()
    own = base.forward
    model = get_peft_model(base, ShapleyConfig()).eval()
    assert model.unload() is base
    assert base.forward == own
    assert "forward" not in base.__dict__
