"""The projection head: from the features of players to what each contributes to each class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ProjectionHead:
    """One adapter's head, as a view on the layer's parameters.

    With h_n the normalised feature of player n and t that of the token, the contribution is

        phi_n = vote(h_n) / N + c_n - mean_m c_m,    c_n = share(gelu(patch(h_n)) * gate(t)) / N.

    The second part is centred over the players that are present, so the token can only redistribute contributions
    between players and never adds to their sum. Were there an additive path from the token, the prediction would flow
    through it past the players, and the attributions would go flat.

    Attributes:
        norm: layer norm of players' features (D).
        vote: linear map D to K without bias: a bias would credit every player alike.
        patch: linear map D to W, the branch's view of a player.
        share: linear map W to K without bias, zero at the start.
        token_norm: layer norm of the token (D), None without a token.
        gate: linear map D to W, the token's gate, None without a token.
    """

    norm: nn.Module
    vote: nn.Linear
    patch: nn.Module
    share: nn.Module
    token_norm: nn.Module | None
    gate: nn.Module | None

    def votes(self, features: Tensor, players: int) -> Tensor:
        """Sum of the contributions of the players present, (B, s, D) to (B, K) fp32; `players` is the N of the image."""
        # Summed before it is projected: the map is linear, and K may be a thousand.
        with self._precisely(features):
            total = self.norm(features.to(self.vote.weight.dtype)).sum(dim=1)  # (B, D)
            return self.vote(total).float() / players  # (B, K)

    def contributions(self, features: Tensor, token: Tensor | None, players: int) -> Tensor:
        """What each player present contributes, (B, s, D) and token (B, D) to (B, s, K) fp32."""
        dtype = self.vote.weight.dtype
        with self._precisely(features):
            normed = self.norm(features.to(dtype))  # (B, s, D)
            branch = F.gelu(self.patch(normed))  # (B, s, W)
            if self.gate is not None and self.token_norm is not None and token is not None:
                branch = branch * self.gate(self.token_norm(token.to(dtype)))[:, None]  # (B, s, W)
            centred = branch - branch.mean(dim=1, keepdim=True)  # (B, s, W)
            return (self.vote(normed).float() + self.share(centred).float()) / players  # (B, s, K)

    @staticmethod
    def _precisely(features: Tensor) -> torch.autocast:
        # In bf16 the shares would no longer sum to zero, nor the attributions to the value of all players.
        return torch.autocast(features.device.type, enabled=False)


def new_leaves(
    width: int, classes: int, branch: int, *, null: bool, token: bool
) -> dict[str, nn.Module | nn.Parameter]:
    """Freshly initialised parameters of one adapter, by leaf: D = `width`, K = `classes`, W = `branch`."""
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
    if token:
        gate = nn.Linear(width, branch)
        nn.init.ones_(gate.bias)
        leaves |= {
            "token": nn.Parameter(torch.randn(1, 1, width) * 0.02),
            "token_norm": nn.LayerNorm(width),
            "gate": gate,
        }
    return leaves
