"""The games of a batch of images, for one class each, played together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shapadapter.explanation.api import Predicted


@dataclass(frozen=True)
class Scores:
    """What the model says of the explained class.

    Attributes:
        values: (B, ...) float64, the logits: the value of the game.
        likelihoods: (B, ...) float64, the probabilities; of quantities (regression) the values again.
    """

    values: Tensor
    likelihoods: Tensor


class Games:
    """B images, each with its own coalitions.

    Args:
        model: a wrapped model.
        batch: the images after their forward pass, with one class each to explain.
        rows: how many coalitions, of all images together, go in a forward pass.
    """

    def __init__(self, model: nn.Module, batch: Predicted, rows: int) -> None:
        self.model = model
        self.batch = batch
        self.rows = rows
        self.classes = batch.classes[:, 0]  # (B,)
        self.players = batch.tiling.count
        self.full = self._read(batch.output.logits[:, None])  # (B, 1)
        self.null = self._read(batch.output.null_values[:, None])  # (B, 1)

    def __len__(self) -> int:
        return self.classes.shape[0]

    def play(self, coalitions: Tensor) -> Scores:
        """The scores (B, M) of coalitions (B, M, N) bool.

        Column by column the coalitions of all images should have one size: then the model evaluates many of one size at
        a time, without padding. Any others are only slower.
        """
        # In order of size, for the same reason.
        order = coalitions.sum(dim=-1).amax(dim=0).argsort(stable=True)  # (M,)
        parts = []
        for chosen in order.split(max(1, self.rows // len(self))):
            part = coalitions[:, chosen].to(self.classes.device)  # (B, m, N)
            parts.append(self._read(self.model(**self.batch.inputs, coalitions=part).coalition_values))
        back = order.argsort()  # (M,)
        return Scores(
            torch.cat([part.values for part in parts], dim=1)[:, back],
            torch.cat([part.likelihoods for part in parts], dim=1)[:, back],
        )

    def passes(self, pixel_values: Tensor) -> Tensor:
        """The class that the model predicts for variants (r, C, H, W) of an image, each in a full pass: (r,)."""
        given = {**self.batch.inputs, "pixel_values": pixel_values}
        return self.model(**given).logits.argmax(dim=1).cpu()

    def _read(self, logits: Tensor) -> Scores:
        """The explained class's scores (B, m) in logits (B, m, K)."""
        logits = logits.double()
        index = self.classes.to(logits.device)[:, None, None].expand(-1, logits.shape[1], 1)  # (B, m, 1)
        values = logits.gather(2, index)[..., 0]  # (B, m)
        if self.batch.likelihood == "softmax":
            likelihoods = (values - logits.logsumexp(dim=2)).exp()  # (B, m)
        else:
            likelihoods = values.sigmoid() if self.batch.likelihood == "sigmoid" else values
        return Scores(values.cpu(), likelihoods.cpu())
