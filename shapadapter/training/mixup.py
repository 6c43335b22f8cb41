"""Mixup and cutmix: training on pictures made of two, with players that belong to one of them each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shapadapter.backbone import Tiling
from shapadapter.training.task_loss import as_shares


@dataclass(frozen=True)
class Mix:
    """How the pictures of one micro-batch are mixed.

    Attributes:
        partners: (B,) whose picture is mixed in.
        share: of the own picture, 0 to 1.
        box: (top, left, height, width) in players of the part that is the partner's; None to blend all pixels.
    """

    partners: Tensor
    share: float
    box: tuple[int, int, int, int] | None


def draw_mix(images: int, players: tuple[int, int], alphas: tuple[float, float], key: tuple[int, ...]) -> Mix:
    """Draw a mix: the share from Beta(alpha, alpha), mixup or cutmix with equal chances where both are on.

    A cutmix box has about the share of players that Beta says, and the share of the label is the one it really has.

    Args:
        images: B.
        players: (rows, cols).
        alphas: of mixup and cutmix, 0 for off.
        key: the same numbers draw the same mix.
    """
    generator = np.random.default_rng(np.random.SeedSequence(key))
    cuts = bool(generator.integers(2)) if min(alphas) > 0 else alphas[1] > 0
    share = float(generator.beta(alphas[cuts], alphas[cuts]))
    partners = torch.from_numpy(generator.permutation(images))  # (B,)
    if not cuts:
        return Mix(partners, share, None)
    side = (1 - share) ** 0.5
    height, width = (round(side * length) for length in players)
    top, left = (
        int(generator.integers(0, length - part + 1)) for length, part in zip(players, (height, width), strict=True)
    )
    return Mix(partners, 1 - height * width / (players[0] * players[1]), (top, left, height, width))


def mix_pictures(pixels: Tensor, mix: Mix, tiling: Tiling) -> Tensor:
    """The mixed pictures (B, C, H, W): mixup (Zhang et al. 2018) blends, cutmix (Yun et al. 2019) puts in whole players."""
    others = pixels[mix.partners.to(pixels.device, non_blocking=True)]  # (B, C, H, W)
    if mix.box is None:
        return mix.share * pixels + (1 - mix.share) * others
    (top, left, height, width), (rows, cols) = mix.box, tiling.players
    down, up = (round(row * tiling.seen[0] / rows) for row in (top, top + height))
    start, end = (round(col * tiling.seen[1] / cols) for col in (left, left + width))
    mixed = pixels.clone()
    mixed[..., down:up, start:end] = others[..., down:up, start:end]
    return mixed


def mix_labels(labels: Tensor, mix: Mix, classes: int) -> Tensor:
    """What is in the mixed pictures: class indices (B,) to shares (B, K)."""
    shares = as_shares(labels, classes)  # (B, K)
    return mix.share * shares + (1 - mix.share) * shares[mix.partners.to(labels.device, non_blocking=True)]


def mixed(
    inputs: dict[str, Any], alphas: tuple[float, float], tiling: Tiling, classes: int, key: tuple[int, ...]
) -> dict[str, Any]:
    """A micro-batch with mixed pictures, and labels (B, K) in the place of (B,) if it has labels.

    Args:
        inputs: with `pixel_values` (B, C, H, W) and perhaps `labels` (B,).
        alphas: of mixup and cutmix, 0 for off.
        tiling: how the players lie on the pictures.
        classes: K.
        key: as for `draw_mix`.
    """
    pixels, labels = inputs["pixel_values"], inputs.get("labels")
    mix = draw_mix(len(pixels), tiling.players, alphas, key)
    soft = {} if labels is None else {"labels": mix_labels(labels, mix, classes)}
    return {**inputs, "pixel_values": mix_pictures(pixels, mix, tiling), **soft}
