"""Retrieval with a matching model, before and after the patches that matter most are taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.backbone import evaluation_view
from shapadapter.core.errors import ShapleyError
from shapadapter.data.images import as_list
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.passes import base_of, embed_texts, inputs_on, prepared_batches


def recall_at_k(similarity: Tensor, k: int, matches: Tensor | None = None) -> Tensor:
    """The share of queries that find a match among their `k` highest candidates (recall@k of retrieval).

    Ties count against the query: it finds its match if fewer than `k` non-matching candidates score at least as high
    as its best match. So equal scores everywhere, as a collapsed model gives them, earn nothing. Further matches
    never push a match out; a nan counts as a tie with everything.

    Args:
        similarity: (Q, C) scores of C candidates for Q queries, any floating type and unit; higher is nearer.
            Image-to-text retrieval takes `logits_per_image`, text-to-image its transpose.
        k: how many candidates each query may look at, at least 1.
        matches: (Q, C) bool, which candidates are right for a query. By default candidate i belongs to query i,
            and no other. A query without a match finds none.

    Returns:
        () share of the queries in 0 .. 1.

    Raises:
        ValueError: `k` is below 1, `similarity` is no filled matrix, `matches` is not bool or of another shape, or it is
            missing although there are not as many candidates as queries.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity must be (queries, candidates), got shape {tuple(similarity.shape)}.")
    queries, candidates = similarity.shape
    if matches is None:
        if queries != candidates:
            raise ValueError(
                f"{queries} queries and {candidates} candidates do not pair up one to one. "
                "Say in `matches` (queries, candidates) which belong together."
            )
        matches = torch.eye(queries, dtype=torch.bool, device=similarity.device)
    if matches.dtype != torch.bool or matches.shape != similarity.shape:
        raise ValueError(
            f"matches must be bool and of shape {tuple(similarity.shape)} like similarity, got {matches.dtype} "
            f"of shape {tuple(matches.shape)}."
        )
    best = similarity.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)  # (Q, C) -> (Q, 1)
    ahead = ~matches & ~(similarity < best)  # (Q, C); not `>=`, so that a nan is no advantage
    return (matches.any(dim=1) & (ahead.sum(dim=1) < k)).float().mean()  # (Q, C) -> (Q,) -> ()


@dataclass(frozen=True)
class RetrievalRow:
    """Recall of one condition, each in 0..1.

    Attributes:
        deleted: the share of each image's patches that were taken away.
        order: which: "top" (those that speak most for the image's own text), "bottom" (those that speak least for it,
            or against it), or "random".
        k: how many candidates a query may look at.
        image_to_text: share of images that find their text.
        text_to_image: share of texts that find their image.
    """

    deleted: float
    order: str
    k: int
    image_to_text: float
    text_to_image: float


@dataclass(frozen=True)
class Retrieval:
    """Retrieval before and after deletion. Faithful attributions: "top" falls fast, "bottom" stays, "random" between.

    Attributes:
        rows: one for each share, order and k.
        pairs: number of images with their texts.
    """

    rows: tuple[RetrievalRow, ...]
    pairs: int

    def recall(self, deleted: float, order: str, k: int) -> RetrievalRow:
        """The row of one condition; without deletion the order does not matter."""
        for row in self.rows:
            if row.deleted == deleted and row.k == k and (row.order == order or deleted == 0):
                return row
        raise KeyError(f"No row with deleted={deleted}, order={order!r}, k={k}.")

    def table(self) -> str:
        """The rows as text."""
        lines = [f"{'deleted':>8} {'order':>7} {'k':>3} {'image to text':>14} {'text to image':>14}"]
        lines += [
            f"{row.deleted:>8.0%} {row.order:>7} {row.k:>3} {row.image_to_text:>14.3f} {row.text_to_image:>14.3f}"
            for row in self.rows
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for json."""
        return asdict(self)


def retrieval_after_deletion(
    model: nn.Module,
    images: Any,
    texts: Sequence[str],
    processor: Any,
    *,
    deleted: Sequence[float] = (0.0, 0.1, 0.2, 0.5),
    ks: Sequence[int] = (1, 5),
    batch_size: int = 32,
    seed: int = 0,
) -> Retrieval:
    """Recall@k between images and texts while more and more patches of each image are removed.

    The patches are ranked by their attribution to the image's own text and removed as the model's game does it. Texts
    that are equal count as matches of each other's images.

    Args:
        model: a wrapped matching model.
        images: as `explain` takes them.
        texts: one for each image, in order.
        processor: of images and texts.
        deleted: shares of the patches to remove, in 0..1.
        ks: how many candidates a query may look at.
        batch_size: images in a forward pass.
        seed: of the random order, which is drawn anew for each image.

    Raises:
        ShapleyError: the model does not match images with texts, or there is not one text for each image.
        ImageError: an image that the model cannot take.
        ValueError: a share outside 0..1, or a k below 1.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    images = images if isinstance(images, Mapping) and "pixel_values" in images else as_list(images)
    _check(model, images, texts, deleted, ks)
    model = evaluation_view(model)
    with torch.inference_mode():
        directions = embed_texts(model, texts, processor)  # (T, P)
        conditions = [
            (share, order) for share in deleted for order in ("top", "random", "bottom") if share or order == "top"
        ]
        generator = torch.Generator().manual_seed(seed)
        parts, start = [], 0
        for inputs in prepared_batches(images, processor, batch_size):
            placed = inputs_on(inputs, model)
            own = torch.arange(start, start + len(inputs["pixel_values"]), device="cpu")
            parts.append(_similarities(model, placed, directions, own, conditions, generator))
            start += len(own)
    similarity = torch.cat(parts, dim=1)  # (conditions, B, T)
    matches = torch.tensor([[one == other for other in texts] for one in texts], device="cpu")  # (B, T)
    rows = []
    for (share, order), scores in zip(conditions, similarity, strict=True):
        for k in ks:
            found, back = recall_at_k(scores, k, matches), recall_at_k(scores.t(), k, matches.t())
            rows.append(RetrievalRow(share, order if share else "none", k, float(found), float(back)))
    return Retrieval(tuple(rows), len(texts))


def _check(model: nn.Module, images: Any, texts: list[str], deleted: Sequence[float], ks: Sequence[int]) -> None:
    if active_layer(model).anatomy.kind != "matching":
        raise ShapleyError(f"{type(base_of(model)).__name__} does not match images with texts.")
    if not deleted or not ks or not all(0 <= share <= 1 for share in deleted) or min(ks) < 1:
        raise ValueError(f"Expected shares from 0 to 1 and k of at least 1, got deleted={deleted} and ks={ks}.")
    count = len(images["pixel_values"] if isinstance(images, Mapping) else images)
    if count != len(texts):
        raise ShapleyError(f"Expected one text for each image, got {count} images and {len(texts)} texts.")


def _similarities(
    model: nn.Module,
    inputs: dict[str, Tensor],
    directions: Tensor,
    own: Tensor,
    conditions: list[tuple[float, str]],
    generator: torch.Generator,
) -> Tensor:
    """Similarity of B images, each with `own` text (B,), to all texts (T, P) in each condition: (conditions, B, T)."""
    output = model(**inputs, text_embeds=directions[own], return_dict=True)
    attributions = output.attributions.diagonal(dim1=0, dim2=2).t()  # (B, N, B) -> (N, B) -> (B, N)
    ranks = attributions.argsort(dim=1, descending=True).argsort(dim=1).cpu()  # (B, N), 0 for the largest
    batch, players = ranks.shape
    noise = torch.rand(batch, players, generator=generator, device="cpu").argsort(dim=1)  # (B, N)
    order = {"top": ranks, "bottom": players - 1 - ranks, "random": noise}
    present = torch.stack([order[name] >= round(share * players) for share, name in conditions], dim=1)  # (B, M, N)
    values = model(
        **inputs, text_embeds=directions, coalitions=present.to(directions.device), return_dict=True
    ).coalition_values  # (B, M, T)
    return values.transpose(0, 1).float().cpu()
