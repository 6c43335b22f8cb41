"""Laws of recall@k."""

import pytest
import torch

from shapadapter.evaluation.retrieval import recall_at_k


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_recall_of_known_ranks():
    scores = torch.tensor([[0.9, 0.1, 0.0, 0.2], [0.8, 0.5, 0.1, 0.2], [0.9, 0.8, 0.7, 0.1], [0.4, 0.3, 0.2, 0.1]])
    assert [recall_at_k(scores, k).item() for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]  # the matches' ranks: 1 .. 4
    assert recall_at_k(scores.T, 1).item() == 0.25  # columns: only the first has its maximum on the diagonal
    assert recall_at_k(scores, 9).item() == 1


def test_recall_asks_only_for_the_order():
    scores = normal(7, 7)
    for k in (1, 3):
        assert recall_at_k(100 * scores - 5, k) == recall_at_k(scores, k) == recall_at_k(scores.exp().float(), k)


def test_recall_equals_topk_where_nothing_ties():
    scores = normal(40, 60)
    matches = normal(40, 60, seed=1) > 1.5
    for k in (1, 5, 10):
        found = matches.gather(1, scores.topk(k).indices).any(1).double().mean().item()
        assert recall_at_k(scores, k, matches).item() == pytest.approx(found)


def test_recall_counts_ties_against_the_query():
    assert [recall_at_k(torch.zeros(5, 5), k).item() for k in (1, 4, 5)] == [0, 0, 1]
    scores = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert recall_at_k(scores, 1).item() == pytest.approx(2 / 3)
    assert recall_at_k(scores, 2).item() == 1


def test_recall_with_several_matches_or_none():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1]])
    two = torch.tensor([[False, True, True, False]])
    assert [recall_at_k(scores, k, two).item() for k in (1, 2)] == [0, 1]
    assert recall_at_k(torch.tensor([[0.5, 0.5, 0.4]]), 1, torch.tensor([[True, True, False]])).item() == 1
    assert recall_at_k(scores, 1, torch.ones(1, 4, dtype=torch.bool)).item() == 1
    assert recall_at_k(scores, 9, torch.zeros(1, 4, dtype=torch.bool)).item() == 0


def test_recall_takes_no_advantage_from_nan_and_infinity():
    assert recall_at_k(torch.full((3, 3), torch.nan), 2).item() == 0
    assert recall_at_k(torch.tensor([[1.0, torch.nan], [0, 1]]), 1).item() == 0.5
    assert recall_at_k(torch.full((3, 3), -torch.inf), 2).item() == 0


def test_recall_refuses_what_it_cannot_pair():
    with pytest.raises(ValueError, match="at least 1"):
        recall_at_k(torch.eye(3), 0)
    for shape in ((3,), (2, 3, 3), (0, 0), (2, 0)):
        with pytest.raises(ValueError, match="queries, candidates"):
            recall_at_k(torch.zeros(shape), 1)
    with pytest.raises(ValueError, match="one to one"):
        recall_at_k(torch.zeros(2, 3), 1)
    for matches in (torch.eye(3).bool(), torch.zeros(3, 2).bool(), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="bool and of shape"):
            recall_at_k(torch.zeros(2, 3), 1, matches)
