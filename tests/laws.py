"""What the law tests share: on which families they run, wrapped models made once, and what is compared."""

import copy
import dataclasses
import functools
import math

import families
import pytest
import torch
import zoo
from families import FAMILIES, shapley, wrap
from torch import nn
from zoo import FIXED, MATCHING, READOUT, SEQUENCE, ZOO, of_kind

from shapadapter.core.shapley import shapley_loss

DEFAULT = ("vit", "dinov2_registers", "siglip", "beit", "siglip2", "swin", "levit", "resnet", "perceiver_conv")
DEFAULT += ("clip_model",)
"""One of each structure, with both predictions. All others run with `-m families`, by turns in one of them."""

PREDICTIONS = ("vote", "classifier")
PATCHED = ("siglip2", "siglip2_model")
"""Their images come as patches, and their padding is masked already."""
RELATIVE = ("beit", "beit_shared", "data2vec", "data2vec_shared", "dinov3")
"""Their tokens know each other's distance, so that none can be left out."""
UNORDERED = ("hiera_two_pools",)
PLAIN = FAMILIES
"""Classifiers of tokens that know places by their embeddings alone."""
TOKENS = of_kind(SEQUENCE, MATCHING)
MAPS = tuple(name for name in of_kind(READOUT) if name not in UNORDERED and ZOO[name].layout != "latents")
LATENTS = tuple(name for name in of_kind(READOUT) if ZOO[name].layout == "latents")
NAMES = (*TOKENS, *MAPS, *LATENTS)
RESIZED = tuple(name for name in NAMES if ZOO[name].resized is not FIXED and name not in PATCHED)
MATCHERS = of_kind(MATCHING)
CLASSIFIERS = tuple(name for name in NAMES if name != "dinov3")
SLOW = ("perceiver_learned", "perceiver_fourier")
"""Every pixel is an input of theirs; what perceiver_conv shows need not be shown again."""
QUICK = tuple(name for name in NAMES if name not in SLOW)

OWN = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""What each image has for itself; texts are the same for all."""


def removals(name):
    """How players can be removed, the default first."""
    if name in PATCHED:
        return ("mask",)
    if name in RELATIVE:
        return "mask", "pixels"
    return ("drop", "mask", "pixels") if name in TOKENS else ("pixels",)


# -- on which families ------------------------------------------------------------------------------------------------


def on(cases, arguments="name"):
    """Parametrises by `cases`, names or tuples that begin with one; those beyond `DEFAULT` are marked `families`.

    Each law file runs in one process, which wraps each family once.
    """
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = [pytest.mark.families] * (values[0] not in DEFAULT)
        marked.append(pytest.param(*values, marks=marks))
    return pytest.mark.parametrize(arguments, marked)


def pairs(names=NAMES, turn=0, both=DEFAULT):
    """Families with a prediction each: `both` of some, by turns of the others; a headless model can only vote."""
    found = []
    for name in names:
        if name == "dinov3":
            kinds = PREDICTIONS[:1]
        else:
            kinds = PREDICTIONS if name in both else (PREDICTIONS[(NAMES.index(name) + turn) % 2],)
        found += [(name, kind) for kind in kinds]
    return found


def on_pairs(names=NAMES, turn=0, both=DEFAULT):
    return on(pairs(names, turn, both), ("name", "prediction"))


def on_removals(names=NAMES, turn=0):
    """Every way of removal of ten families, and the default one of the others."""
    ways = lambda name: removals(name) if name in DEFAULT else removals(name)[:1]  # noqa: E731
    cases = [(*pair, removal) for pair in pairs(names, turn) for removal in ways(pair[0])]
    return on(cases, ("name", "prediction", "removal"))


# -- models -----------------------------------------------------------------------------------------------------------


@functools.cache
def _wrapped(name, prediction, config):
    return wrap(zoo.base(name), prediction, **dict(config))


def wrapped(name, prediction="vote", **config):
    """A wrapped model in eval mode, the same one at every call: for tests that only look."""
    if config.get("removal") == removals(name)[0] and "grid" not in config:
        del config["removal"]  # the default makes the same model
    return _wrapped(name, prediction, tuple(config.items()))


def own(name, prediction="vote", **config):
    """A copy of it, for tests that change it."""
    return copy.deepcopy(wrapped(name, prediction, **config))


def frozen(name):
    """The base untrained, its own head predicting where it has one, and players that are not its cells."""
    prediction = "classifier" if name in CLASSIFIERS else "vote"
    if name in DEFAULT:
        return wrapped(name, prediction, tune="frozen", grid=(2, 2), removal=removals(name)[-1])
    model = wrapped(name, prediction, tune="frozen", removal=removals(name)[-1])
    return with_grid(model, (2, 2))  # where its cells look, which takes long to measure, is a matter of test_offset.py


def with_grid(model, grid):
    """The model with other players, without measuring where its cells look."""
    shapley(model).rules["default"] = dataclasses.replace(shapley(model).rules["default"], grid=grid)
    return model


def regridded(name, grid):
    """A copy of it with other players."""
    return with_grid(copy.deepcopy(frozen(name)), grid)


def players(name):
    """Rows and columns of the players at the entry's own size."""
    return ZOO[name].grid or (2, 2)


def count(name):
    return math.prod(players(name))


def coalitions(name, number=4, batch=2, seed=0):
    return families.coalitions(batch, number, count(name), seed)


def with_dropout(model, share):
    """As much dropout and drop path everywhere, but none on texts: they are what the game is about, not played with."""
    for path, module in [*model.named_modules()]:
        if path.endswith("lora_dropout"):
            module["default"] = nn.Dropout(share)
            continue
        kinds = ("p",) if isinstance(module, nn.Dropout) else ("drop_prob", "dropout", "attention_dropout")
        for kind in kinds:
            if isinstance(vars(module).get(kind), float):
                setattr(module, kind, 0.0 if "text_model" in path else share)
        if hasattr(getattr(module, "config", None), "pos_embed_rescale"):
            module.config.pos_embed_rescale = None if share == 0 else 2.0  # DINOv3 shakes its positions
    return model


# -- calls and comparisons --------------------------------------------------------------------------------------------


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


def close(one, other, tolerance=1e-6):
    return (one - other).abs().max().item() <= tolerance * max(1.0, other.abs().max().item())


def adds_up(output, tolerance=1e-5):
    """Efficiency, for each number by itself."""
    total = output.null_values.double() + output.attributions.double().sum(1)
    gap = (total - output.logits.double()).abs()
    return (gap <= tolerance * output.logits.double().abs().clamp(min=1)).all()


def ends_meet(output, tolerance=1e-5):
    """Whether the first coalition, everybody, is worth the logits, and the last one, nobody, the null values."""
    return close(output.coalition_values[:, 0], output.logits, tolerance) and close(
        output.coalition_values[:, -1], output.null_values, tolerance
    )


def same(one, other):
    """Whether two outputs agree in every bit, explanation included."""
    fields = ("logits", "attributions", "null_values", "coalition_values")
    return all(families.same_bits(getattr(one, field), getattr(other, field)) for field in fields)


def disturb(inputs, grid, where, scale=3.0, seed=0):
    """The inputs with noise added to the players that `where` (B, N) marks; in patches, to the padding as well."""
    images = inputs["pixel_values"]
    noise = scale * torch.randn(images.shape, generator=torch.Generator().manual_seed(300 + seed))
    if images.ndim == 3:
        marked = torch.ones(images.shape[:2], dtype=torch.bool)
        marked[:, : where.shape[1]] = where
        marked = marked[..., None]
    else:
        height, width = (size // tiles for size, tiles in zip(images.shape[2:], grid, strict=True))
        marked = where.unflatten(1, grid).repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]
    return {**inputs, "pixel_values": torch.where(marked, images + noise, images)}


def deaf_to_absent(model, inputs, grid, chosen, scale, seed=0):
    """Whether noise on the players absent from `chosen` (B, 1, N) leaves every bit of its finite value alone."""
    clean = run(model, inputs, coalitions=chosen).coalition_values
    noisy = disturb(inputs, grid, ~chosen[:, 0], scale, seed)
    return clean.isfinite().all() and torch.equal(run(model, noisy, coalitions=chosen).coalition_values, clean)


def one_image(inputs, index):
    return {key: value[index : index + 1] if key in OWN else value for key, value in inputs.items()}


def doubled(inputs):
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def parts(model):
    """What a model is made of: class and plain attributes of each module, and all tensors."""
    plain = (bool, int, float, str, tuple, type(None))
    attributes = {
        name: (type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for name, module in model.named_modules()
    }
    return attributes, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_parts(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][k], other[1][k]) for k in one[1])
    )


def loss_of(output, chosen):
    """Some task's loss and the Shapley loss; both are means over the images."""
    game = shapley_loss(output.attributions, chosen, output.coalition_values, output.null_values)
    return output.logits.float().square().mean() + game


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
