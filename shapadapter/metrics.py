"""Measures of attributions as pure arithmetic: tensors in, one number per image or per vector out."""

import torch
from torch import Tensor


def relative_l2(estimate: Tensor, truth: Tensor) -> Tensor:
    """The relative error `|estimate - truth| / |truth|` of vectors along the last dimension.

    Args:
        estimate: (..., N) vectors.
        truth: (..., N) vectors.

    Returns:
        (...) without a unit: 0 is perfect, 1 as bad as all zeros; not finite where the truth is all zero.
    """
    return torch.linalg.vector_norm(estimate - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)


def energy_inside(attributions: Tensor, inside: Tensor) -> Tensor:
    """The share of the positive attribution that lies inside a region: `sum phi+ * inside / sum phi+`.

    The energy-based pointing game (Wang et al. 2020) on players. Negative attributions are set aside first: in a
    signed sum they would cancel, and the share would have no bound. A map that knows nothing gets the share of the
    image that the region covers.

    Args:
        attributions: (..., rows, cols) attribution of each player to one class.
        inside: (..., rows, cols) share of each player's tile inside the region, 0 to 1
            (`grid.pixels_to_players` makes it from a pixel mask).

    Returns:
        (...) share in 0 .. 1; nan where no attribution is positive.

    Raises:
        ValueError: If the two are not on the same grid.
    """
    if attributions.shape[-2:] != inside.shape[-2:]:
        raise ValueError(
            f"attributions are on a grid of {tuple(attributions.shape[-2:])}, the region on one of "
            f"{tuple(inside.shape[-2:])}. Take a pixel mask through `grid.pixels_to_players` first."
        )
    positive = attributions.clamp(min=0)  # (..., rows, cols)
    return (positive * inside).sum(dim=(-2, -1)) / positive.sum(dim=(-2, -1))  # (..., rows, cols) -> (...)


def recall_at_k(similarity: Tensor, k: int, matches: Tensor | None = None) -> Tensor:
    """The share of queries that find a match among their `k` highest candidates (recall@k of retrieval).

    Ties count against the query: it finds its match if fewer than `k` non-matching candidates score at least as high
    as its best match. So equal scores everywhere, as a collapsed model gives them, earn nothing. Further matches
    never push a match out; a nan counts as a tie with everything.

    Args:
        similarity: (Q, C) scores of C candidates for Q queries, any floating type and unit; higher is nearer.
            Image-to-text retrieval takes `logits_per_image`, text-to-image its transpose.
        k: How many candidates each query may look at, at least 1.
        matches: (Q, C) bool, which candidates are right for a query. By default candidate i belongs to query i,
            and no other. A query without a match finds none.

    Returns:
        () share of the queries in 0 .. 1.

    Raises:
        ValueError: If `k` is below 1, `similarity` is no filled matrix, `matches` is not bool or of another shape, or
            it is missing although there are not as many candidates as queries.
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
