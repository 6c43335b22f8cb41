"""The projection head: from the features of cells to what each contributes to each class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapadapter.adapter.weights import plain_weight

_FREQUENCIES = 8
_READER_HEADS = 4


@dataclass(frozen=True)
class Evidence:
    """What the head has read off each cell; its map to contributions is linear.

    So where sums over cells are all that is asked for, as in training, the cells are summed first, and no tensor has both
    N and K: with 200 players and 1,000 classes that would be the largest of the whole step.
    """

    normed: Tensor  # (B, s, D), for the vote
    centred: Tensor  # (B, s, W), for the shares; sums to zero over the cells
    vote: nn.Module  # linear map D to K without bias
    share: nn.Module  # linear map W to K without bias
    cells: int  # of the full image

    def contributions(self) -> Tensor:
        """What each cell contributes, (B, s, K) fp32; under autocast rounded to its precision."""
        contributions = self.vote(self.normed)  # (B, s, K)
        contributions += self.share(self.centred)
        return contributions.float().div_(self.cells)

    def sums(self, weights: Tensor) -> Tensor:
        """Sums of what the cells contribute, (B, M, K) fp32, by weights (B, M, s): 1 for the cells of present players."""
        with precisely(weights):
            weights = weights.to(self.normed.dtype)
            summed = self.vote(weights @ self.normed) + self.share(weights @ self.centred)  # (B, M, s) @ (B, s, D)
            return summed.float() / self.cells  # (B, M, K)

    def total(self, weights: Tensor | None = None) -> Tensor:
        """What all cells vote for together, (B, K) fp32, each by its weight (B, s) if given. The shares sum to zero."""
        with precisely(self.normed):
            return self.vote(total_of(self.normed, weights)).float() / self.cells  # (B, D) -> (B, K)


@dataclass(frozen=True)
class ProjectionHead:
    """One adapter's head, as a view on the layer's parameters.

    With h_n the normalised feature of cell n and t that of the token, the contribution is

        phi_n = vote(h_n) / N + c_n - mean_m c_m,    c_n = share(gelu(patch(h_n)) * gate(t)) / N.

    The second part is centred over the cells that are present, so the token can only redistribute contributions
    between players and never adds to their sum. Were there an additive path from the token, the prediction would flow
    through it past the players, and the attributions would go flat.

    Where the token does not stand in the sequence of the blocks, it reads the cells here, by attention. Where features
    have no place in the image, each cell first gathers its feature from the latents, by attention from its position.
    """

    norm: nn.Module  # layer norm of cells' features (D)
    vote: nn.Linear  # D to K without bias, which would credit every player alike
    patch: nn.Module  # linear map D to W, the branch's view of a cell
    share: nn.Module  # linear map W to K without bias, zero at the start
    token_norm: nn.Module | None = None  # None without a token
    gate: nn.Module | None = None  # linear map to W, the token's gate, None without a token
    key: nn.Module | None = None  # linear map D to W, what the token looks at; None where it stands in the sequence
    value: nn.Module | None = None  # linear map D to W, what it reads; None likewise
    place: nn.Module | None = (
        None  # linear map of a position to W, what a cell looks for; None where features have one
    )
    place_key: nn.Module | None = None  # linear map D to W without bias, what it looks at in the latents

    def votes(self, features: Tensor, cells: tuple[int, int], weights: Tensor | None = None) -> Tensor:
        """Sum of the contributions of the cells present, (B, K) fp32: what the prediction is made of.

        `features` are (B, s, D), or latents (B, L, D); `cells` (rows, cols) of the full image; `weights` (B, s) say how
        much of each cell is present, all of it unless given.
        """
        # Summed before it is projected: the map is linear, and K may be a thousand.
        with precisely(features):
            total = total_of(self._normed(features, cells), weights)  # (B, s, D) -> (B, D)
            return self.vote(total).float() / math.prod(cells)  # (B, K)

    def read(self, features: Tensor, token: Tensor | None, cells: tuple[int, int]) -> Evidence:
        """What the head sees in each cell, from which follows what it contributes.

        `features` and `cells` are as in `votes`; `token` is the one that came through the blocks (B, D), or the one that
        has yet to read (1, 1, W).
        """
        with precisely(features):
            normed = self._normed(features, cells)  # (B, s, D)
        # Under autocast in its precision: centring, below, takes away what rounding would add to the sum.
        branch = F.gelu(self.patch(normed))  # (B, s, W)
        if self.gate is not None and self.token_norm is not None and token is not None:
            read = token if self.key is None else self._read(token, normed)  # (B, D) or (B, W)
            branch = branch * self.gate(self.token_norm(read.to(normed.dtype)))[:, None]  # (B, s, W)
        with precisely(features):
            branch = branch.to(normed.dtype)
            centred = branch - branch.mean(dim=1, keepdim=True)  # (B, s, W)
        return Evidence(normed, centred, self.vote, self.share, math.prod(cells))

    def _normed(self, features: Tensor, cells: tuple[int, int]) -> Tensor:
        """Normalised features of the cells (B, s, D), or of latents (B, L, D) as each cell gathers them (B, cells, D)."""
        features = features.to(self.vote.weight.dtype)
        if self.place is not None and self.place_key is not None:
            query = self.place(positions(cells, features))  # (cells, W)
            key = self.place_key(F.layer_norm(features, features.shape[-1:]))  # (B, L, W)
            attention = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)  # (B, cells, L)
            features = attention @ features  # (B, cells, D)
        return self.norm(features)

    def _read(self, token: Tensor, normed: Tensor) -> Tensor:
        """The token (1, 1, W) after it has attended to the cells (B, s, D): (B, W)."""
        assert self.key is not None
        assert self.value is not None
        query = token.to(normed.dtype).expand(normed.shape[0], -1, -1)  # (B, 1, W)
        heads = _READER_HEADS if query.shape[-1] % _READER_HEADS == 0 else 1
        split = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, self.key(normed), self.value(normed))
        )
        read = F.scaled_dot_product_attention(*split)  # (B, heads, 1, W / heads)
        return query[:, 0] + read.flatten(1)  # (B, W)


def total_of(normed: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of features (B, s, D) over the cells, by weights (B, s) if given: (B, D)."""
    return normed.sum(dim=1) if weights is None else torch.einsum("bsd,bs->bd", normed, weights.to(normed))


def precisely(like: Tensor) -> torch.autocast:
    """Out of autocast: in bf16 the shares would not sum to zero, nor the attributions to the value of all players."""
    return torch.autocast(like.device.type, enabled=False)


def positions(cells: tuple[int, int], like: Tensor) -> Tensor:
    """Sines and cosines of the cells' centres, (cells, 4 * frequencies), the same for every image."""
    waves = math.pi * 2.0 ** torch.arange(_FREQUENCIES, device=like.device)  # (F,)
    axes = [(torch.arange(count, device=like.device) + 0.5) / count for count in cells]
    parts = [torch.cat([(axis[:, None] * waves).sin(), (axis[:, None] * waves).cos()], dim=1) for axis in axes]
    rows, cols = parts[0][:, None].expand(-1, cells[1], -1), parts[1][None].expand(cells[0], -1, -1)
    return torch.cat([rows, cols], dim=-1).flatten(0, 1).to(like.dtype)  # (rows * cols, 4 * F)


def new_leaves(
    width: int, classes: int, branch: int, *, null: bool, token: bool, mechanism: str, fill: list[float] | None
) -> dict[str, nn.Module | nn.Parameter]:
    """Freshly initialised parameters of one adapter, by leaf: `width` is D, `classes` K, `branch` W.

    `mechanism` says where the token works ("sequence", "readout" or "latents"); `fill` is the color (C,) that a learned
    one starts from.
    """
    vote = nn.Linear(width, classes, bias=False)
    nn.init.normal_(vote.weight, std=0.02)
    share = nn.Linear(branch, classes, bias=False)
    nn.init.zeros_(share.weight)
    leaves: dict[str, nn.Module | nn.Parameter] = {
        "norm": nn.LayerNorm(width),
        "vote": vote,
        "patch": nn.Linear(width, branch),
        "share": share,
    }
    if null:
        leaves["null"] = nn.Parameter(torch.zeros(classes))
    if fill is not None:
        leaves["fill"] = nn.Parameter(torch.tensor(fill))
    if token:
        own = width if mechanism == "sequence" else branch
        gate = nn.Linear(own, branch)
        nn.init.ones_(gate.bias)
        leaves["token"] = nn.Parameter(torch.randn(1, 1, own) * 0.02)
        leaves |= {"token_norm": nn.LayerNorm(own), "gate": gate}
        if mechanism != "sequence":
            leaves |= {"key": nn.Linear(width, branch), "value": nn.Linear(width, branch)}
    if mechanism == "latents":
        leaves |= {
            "place": nn.Linear(4 * _FREQUENCIES, branch),
            "place_key": nn.Linear(width, branch, bias=False),
        }
    return leaves


@torch.no_grad()
def start_from_classifiers(vote: Tensor, null: Tensor | None, classifiers: list[nn.Linear], unit_norm: bool) -> None:
    """Copy the base model's classifier, the mean of several, into the vote (K, D) and the null value (K,) if it fits.

    A model that classifies the mean of its normalised features then predicts by vote what it predicted before; others
    start nearer to that than from random numbers. A classifier that is itself new is as good a start as any.
    With texts, the projection to the space of embeddings is copied, scaled to embeddings of about unit length.
    """
    heads = [
        (head, weight)
        for head in classifiers
        if not head.weight.is_meta and (weight := plain_weight(head)).shape == vote.shape
    ]
    if not heads or vote.is_meta:
        return
    weight = torch.stack([weight.to(vote) for _, weight in heads]).mean(dim=0)  # (K, D)
    vote.copy_(weight / weight.norm() if unit_norm else weight)
    biases = [head.bias for head, _ in heads if head.bias is not None]
    if null is not None and len(biases) == len(heads):
        null.copy_(torch.stack([bias.to(null) for bias in biases]).mean(dim=0))  # (K,)
