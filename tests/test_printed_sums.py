"""What is printed as a sum is the sum of what is printed."""

import re
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from test_visual import make, texts

from shapadapter.hub.space.answers import View, sum_check
from shapadapter.visual import alt_text, draw_contrast, draw_explanation
from shapadapter.visual.figures import describe_strip
from shapadapter.visual.maps import exponent, rounded
from shapadapter.visual.wording import MINUS, adding_up, columns


def read(text):
    return Decimal(text.replace(MINUS, "-"))


NUMBER = rf"([+{MINUS}]?\d+(?:\.\d+)?(?:e[+{MINUS}]\d+)?)"


def check_lines(text):
    """Every `a + Σφ b = c` of a text, as numbers that must fit; returns the b."""
    found = re.findall(rf"v\(∅\) {NUMBER} \+ Σφ {NUMBER} = {NUMBER}", text)
    for start, added, end in found:
        assert read(start) + read(added) == read(end), text
    return [added for _, added, _ in found]


def one(null, total, logit=None):
    """An explanation of one image and one class with these ends; the map has 4 patches."""
    values = torch.tensor([0.4, 0.3, 0.2, 0.1]) * total
    logits = torch.tensor([[null + total if logit is None else logit]])
    return replace(
        make()[:1],
        attributions=values.view(1, 2, 2, 1),
        classes=torch.zeros(1, 1, dtype=torch.int64),
        logits=logits,
        null_values=torch.tensor([[null]]),
        probabilities=torch.ones(1, 1),
        labels=("only",),
    )


@pytest.mark.parametrize("size", [1e-7, 0.004, 0.1, 5, 300, 2e6])
def test_printed_numbers_add_up(size):
    draws = np.random.default_rng(0).normal(size=(300, 2)) * size
    for start, added in draws.tolist():
        texts_of = adding_up([start], [added], [start + added])
        a, b, c, d = map(read, texts_of)
        assert a + b == c == d, texts_of
        largest = max(abs(start), abs(added), abs(start + added))
        unit = 0.01 if 0.01 <= largest < 1e5 else 10 ** (np.floor(np.log10(largest)) - 1)
        for text, value in ((a, start), (b, added), (c, start + added)):
            assert abs(float(text) - value) <= 1.001 * unit
    assert adding_up([0.0151], [6.1789], [6.194]) == ("0.02", "+6.17", "6.19", "6.19")
    assert adding_up([0.0], [0.0], [0.0]) == ("0.00", "+0.00", "0.00", "0.00")


def test_a_logit_that_the_sum_does_not_reach_stays_apart():
    assert adding_up([1.0], [2.0], [3.04]) == ("1.00", "+2.00", "3.00", "3.04")


def test_figures_words_strips_and_the_space_print_the_same_sum():
    explanation = one(0.0151, 6.1789)
    (column,) = columns(explanation, 0, max_classes=1)
    assert column.check.startswith("v(∅) 0.02 + Σφ +6.17 = 6.19\n(logit 6.19")
    assert column.total == "Σφ=+6.17"
    assert column.sum == "+6.17"
    assert "sum to +6.17" in alt_text(explanation)
    assert "sum +6.17" in describe_strip(explanation)
    for null, total in np.random.default_rng(1).normal(size=(40, 2)).tolist():
        found = re.findall(NUMBER, re.sub("<[^>]*>", "", sum_check(View(one(null, total)))))
        start, added, end, _ = map(read, found)
        assert start + added == end


def test_a_contrast_is_the_difference_of_what_is_printed():
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        whole = make()[:1]
        values = torch.randn(whole.attributions.shape, generator=draw)
        nulls = torch.randn(whole.null_values.shape, generator=draw)
        logits = nulls.clone()
        logits[0, whole.classes[0]] += values.double().sum(dim=(1, 2))[0].float()
        explanation = replace(whole, attributions=values, null_values=nulls, logits=logits)
        first, second = whole.classes[0, :2].tolist()
        found = "\n".join(texts(draw_contrast(explanation, 0, first, second)))
        totals = [read(text) for text in check_lines(found)]
        assert len(totals) == 3
        assert totals[0] - totals[1] == totals[2]


@pytest.mark.parametrize("size", [0.003, 0.3, 4, 40, 4000])
def test_numbers_on_patches_give_the_total(size):
    source = np.random.default_rng(0)
    for _ in range(30):
        values = source.normal(size=(7, 7)) * size
        limit = np.abs(values).max()
        places = 2 if limit * 10.0 ** -exponent(limit) < 10 else 1
        shown = rounded(values, limit, float(f"{values.sum():.2f}"))
        unit = 10.0 ** (exponent(limit) - places)
        assert np.abs(shown * 10.0 ** exponent(limit) - values).max() < unit
        printed = sum(Decimal(f"{value:.{places}f}") for value in shown.flat)
        assert abs(float(printed) * 10.0 ** exponent(limit) - values.sum()) <= 1.01 * unit
    values = np.array([[0.004, 0.004], [0.004, -1.0]])
    assert rounded(values, 1.0, -0.99).sum() == pytest.approx(-0.99)
    assert rounded(np.zeros((2, 2)), 0.0, 0.0).tolist() == [[0, 0], [0, 0]]


def test_numbers_in_a_figure_give_the_sum_above_them():
    explanation = one(0.3, 0.0)
    values = torch.tensor([[[[0.104], [0.104]], [[0.104], [0.204]]]])
    total = float(values.double().sum())
    explanation = replace(explanation, attributions=values, logits=torch.tensor([[0.3 + total]]))
    figure = draw_explanation(explanation, numbers=True)
    shown = [read(text.get_text()) for axes in figure.axes for text in axes.texts]
    assert len(shown) == 4
    assert sum(shown) == read(columns(explanation, 0, max_classes=1)[0].sum)
