"""How well queries find what belongs to them."""

import torch
from torch import Tensor


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
