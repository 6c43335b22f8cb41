"""Write `models.md`: what wrapping finds in each family, measured on the tiny models of the tests.

python docs/models.py --write     # into docs/models.md
python docs/models.py             # to the standard output
"""

import argparse
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import families
import zoo
from torch import nn
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, ViTConfig, ViTModel

from shapadapter.backbone import default_targets, settle
from shapadapter.backbone.families import refused_families
from shapadapter.core.errors import UnsupportedModelError

SIDE = 224
SUFFIX = "ForImageClassification"
TITLES = {
    "sequence": "## Sequences of patch tokens",
    "readout": "## Feature maps",
    "latents": "## Latents",
    "matching": "## Models that match images with texts",
    "headless": "## Models without a classifier",
}
SAYS = {
    "sequence": "One token stands for one patch from the first block to the last. The Shapley token travels through the "
    "blocks, and absent patches are taken out of them. Players are patches, or groups of whole patches.",
    "readout": "Hierarchical and convolutional models. The Shapley token reads the final feature map. Players are its cells, "
    "or any other tiles, and removed by replacing their pixels.",
    "latents": "The features belong to no place in the image. Each player gathers its own from them, by attention, and the "
    "Shapley token reads what they gathered. Any grid will do; the default is tiles of 32 pixels.",
    "matching": "Texts take the place of classes: see [Match texts](match-texts.md).",
    "headless": 'The adapter brings a head of its own, with `prediction="vote"`; the number of classes is the config\'s '
    "`num_labels`. Two sequences and a feature map stand here for many.",
}
HEAD = "| model | the token | players are removed by | grid at 224 px | LoRA adapts | notes |\n| --- | --- | --- | --- | --- | --- |"
INTRODUCTION = f"""# Models

What wrapping finds in each family of transformers, without being told. This page is written by `docs/models.py` from the
tiny models on which the tests check every law, and a test compares the two; for families that are not listed, see
[Add a family](add-a-family.md).

- **the token**: it travels through the blocks, or reads the final features (see
  [The Shapley token](how-it-works.md#the-shapley-token)).
- **players are removed by**: in bold what `removal="auto"` takes; the others can be asked for.
- **grid**: the players by default, at {SIDE} x {SIDE} pixels and with the patches of the family's default configuration.
  `grid=` makes it another one.
- **LoRA adapts**: the layers that get low-rank updates if no `target_modules` are named.

Where no other name is given, the class ends in `{SUFFIX}`.
"""
TIMM = """## timm

`TimmWrapperForImageClassification` holds any of timm's models; it needs `timm` and `torchvision`. What is found depends on
the architecture, by the same rules. timm does not call transformers' attention interface, so the token never travels.

| architecture | the token | players are removed by | LoRA adapts |
| --- | --- | --- | --- |
| ViT, DeiT, DINOv2, SigLIP, CaiT | reads | **drop**, pixels | `qkv` |
| DINOv3, ViT with shared relative positions | reads | **mask**, pixels | `qkv` |
| BEiT, EVA-02 | reads | **mask**, pixels | linear layers, `qkv` left out: the model takes its weights without calling it |
| ViT with relative positions of its own in each block, XCiT | reads | **pixels** | `qkv` |
| Swin and other hierarchies | reads | **pixels** | `qkv` |
| ResNet, ConvNeXt, EfficientNet and other convolutional networks | reads | **pixels** | linear layers and convolutions |
"""
LEFT_OUT = """## Not supported

| model | why |
| --- | --- |
"""


def models():
    """The model of every family, and how to make one of the size it takes, if that is one alone."""
    for name in families.MAKERS:
        yield families.base(name), None
    for name, entry in zoo.ZOO.items():
        if entry.kind != zoo.REFUSED and not name.endswith(("_shared", "_two_pools")):
            yield zoo.base(name), entry.make if entry.resized is None else None
    torch.manual_seed(0)
    yield ViTModel(ViTConfig(**families._VISION, **families._IMAGE)), None
    yield DINOv3ConvNextModel(DINOv3ConvNextConfig(**zoo._STAGES)), None


def section(anatomy):
    """Under which title a model belongs."""
    if anatomy.kind != "classifier":
        return anatomy.kind
    return anatomy.mechanism


def operators(model, chosen):
    """The removal operators that pass the self-test, the one that "auto" takes in bold."""
    sound = [chosen]
    for removal in ("drop", "mask", "pixels"):
        if removal != chosen:
            try:
                settle(model, removal)
            except UnsupportedModelError:
                continue
            sound.append(removal)
    return ", ".join([f"**{chosen}**", *sound[1:]])


def grid(model, anatomy, remake):
    """Rows and columns of the players at 224 px, with the patches of the default configuration."""
    config = type(model.config)()
    config = getattr(config, "vision_config", config)
    if anatomy.family.patches:
        return "its patches"
    if anatomy.blocks:
        anatomy = replace(anatomy, cell=(config.patch_size, config.patch_size))
    elif remake is not None:
        anatomy, _ = settle(remake(image_size=SIDE).eval())  # its cells may depend on its size
    rows, cols = anatomy.cells(torch.zeros(1, anatomy.channels, SIDE, SIDE))
    return f"{rows} x {cols}"


def targets(model, anatomy):
    """What LoRA adapts, in words."""
    names = default_targets(model, anatomy)
    parts = [model.get_submodule(name) for name in names if "." in name]
    last = dict.fromkeys(sorted(name.split(".")[-1] for name in names))
    if not parts or last.keys() <= {"q_proj", "v_proj", "query", "value"}:
        where = {"matching": " of the image tower", "classifier": " of the encoder"}[anatomy.kind] if parts else ""
        return " and ".join(f"`{name}`" for name in last) + where
    linear = any(isinstance(part, nn.Linear) for part in parts)
    convolutions = any(isinstance(part, nn.Conv2d) for part in parts)
    return " and ".join(["linear layers"] * linear + ["convolutions"] * convolutions)


def notes(model, anatomy, remake):
    """What limits its use."""
    # DINOv3's processor serves both of its architectures.
    torchvision = model.config.model_type.startswith(("dinov3", "pp_lcnet"))
    said = ["its image processor needs `torchvision`"] if torchvision else []
    if remake is not None:
        said.append("takes the configured size alone")
    elif anatomy.options:
        said.append("other sizes with `interpolate_pos_encoding=True`")
    if anatomy.family.patches:
        said.append("images of one shape in a batch")
    return "; ".join(said)


def render():
    """The page."""
    rows: dict[str, dict[str, list[str]]] = {title: {} for title in TITLES}
    for model, remake in models():
        anatomy, removal = settle(model)
        name = type(model).__name__
        rows[section(anatomy)].setdefault(
            name.removesuffix(SUFFIX),
            [
                "travels" if anatomy.attentions else "reads",
                operators(model, removal),
                grid(model, anatomy, remake),
                targets(model, anatomy),
                notes(model, anatomy, remake),
            ],
        )
    parts = [INTRODUCTION]
    for title, heading in TITLES.items():
        lines = [f"| {' | '.join([f'`{name}`', *facts])} |" for name, facts in rows[title].items()]
        parts.append("\n".join([heading, "", textwrap.fill(SAYS[title], 120), "", HEAD, *lines, ""]))
    refused = [f"| `{name}` | {reason} |" for name, reason in refused_families().items()]
    refused.append(f"| `Hiera{SUFFIX}` with fewer query pools than stages less one | {hiera()} |")
    other = "| detection, segmentation, video | they give no one score for each class of an image |"
    return "\n".join([*parts, TIMM, LEFT_OUT + "\n".join([*refused, other]) + "\n"])


def hiera():
    """Why some of its configurations are refused."""
    try:
        settle(zoo.base("hiera_two_pools"))
    except UnsupportedModelError as error:
        return str(error).split(" stages ")[-1]
    raise AssertionError("Hiera with two pools is supported.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/models.md instead of printing")
    page = render()
    if parser.parse_args().write:
        (HERE / "models.md").write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)
