import io
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from shapadapter.core.errors import ClassNotFoundError
from shapadapter.explanation.explanation import Explanation
from shapadapter.visual import (
    draw_comparison,
    draw_explanation,
    draw_strip,
    gallery,
    overlay,
    sample_pictures,
    signed_colors,
    symmetric_limit,
)
from shapadapter.visual.wording import MINUS, columns, expected_error, level, number

RED, BLUE = (255, 13, 87), (30, 136, 229)
HOSTILE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "two", "a\u2028b\nc", "x" * 500)


def make(side=32, rows=4, batch=2, labels=("zero", "one", "two", "seven", "eight"), scale=1.0):
    """`batch` square images, rows x rows players, 3 of 5 classes; the image's number scales its attributions."""
    generator = torch.Generator().manual_seed(1)
    scales = scale * torch.arange(1, batch + 1).view(-1, 1, 1, 1)
    attributions = torch.randn(batch, rows, rows, 3, generator=generator) * scales
    classes, null_values = torch.tensor([[3, 1, 0]] * batch), torch.randn(batch, 5, generator=generator)
    sums = null_values.gather(1, classes) + attributions.sum(dim=(1, 2))
    logits = torch.full((batch, 5), -99.0).scatter(1, classes, sums)
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator)
    return Explanation(attributions, classes, logits, null_values, logits.softmax(1), tuple(labels), images)


# maps


def test_opposite_numbers_give_the_two_hues_at_one_strength():
    values = np.array([[0.5, 2.0], [1.0, 9.0]])
    plus, minus = signed_colors(values, 2.0), signed_colors(-values, 2.0)
    assert (plus[..., :3] == RED).all()
    assert (minus[..., :3] == BLUE).all()
    assert plus[..., 3].tolist() == minus[..., 3].tolist() == [[64, 255], [128, 255]]


def test_zero_is_transparent_even_without_a_scale():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (signed_colors(np.zeros((2, 3)), 1.0)[..., 3] == 0).all()
        assert (signed_colors(np.zeros((2, 3)), symmetric_limit(np.zeros((2, 3))))[..., 3] == 0).all()


def test_limit_is_the_same_on_both_sides():
    assert symmetric_limit([-3.0, 1.0]) == symmetric_limit([3.0, -1.0]) == 3.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(bad):
    for refuse in (symmetric_limit, lambda v: signed_colors(v, 1.0)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            refuse([0.0, bad])
    attributions = make().attributions.clone()
    attributions[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="'seven' hold NaN"):
        draw_explanation(replace(make(), attributions=attributions))


def test_limit_of_nothing_or_below_zero_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        symmetric_limit([])
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="limit"):
            signed_colors([1.0], wrong)


def test_overlay_is_faint_grey_under_zero_and_full_colour_at_the_limit():
    image = np.zeros((1, 4, 3), np.uint8)
    image[0, 1] = (200, 10, 60)
    shown = overlay(image, np.array([[0.0, 0.0, 5.0, -5.0]]), 5.0)
    assert shown.dtype == np.uint8
    assert shown[0, 2].tolist() == list(RED)
    assert shown[0, 3].tolist() == list(BLUE)
    assert len(set(shown[0, 1].tolist())) == 1  # grey
    assert 150 < shown[0, 0, 0] < shown[0, 1, 0] < 255  # faint, and lighter where the picture is


def test_overlay_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="image \\(H, W, 3\\) uint8"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2)), 1.0)
    with pytest.raises(ValueError, match="float"):
        overlay(np.zeros((2, 2, 3)), np.zeros((2, 2)), 1.0)


# strips


def test_signs_of_a_strip_can_be_read_in_grey():
    """The cards on the Hub show it; one map of 2 x 2 patches beside its picture, on a side of 184 pixels."""
    values = torch.tensor([[2.0, -2.0], [0.1, -0.1]])[None, :, :, None]
    one = replace(make()[:1], attributions=values, classes=torch.tensor([[3]]))
    one = replace(one, images=torch.full((1, 32, 32, 3), 128, dtype=torch.uint8))
    grey = np.asarray(draw_strip(one).convert("L"), float)[8:192, 200:384]
    inside = slice(2, 90)  # of the frame
    (plus, minus), (weak, weaker) = (
        [half[:, :92][inside, inside], half[:, 92:][inside, inside]] for half in (grey[:92], grey[92:])
    )
    assert abs(np.median(plus) - np.median(minus)) < 40  # the colours alone hardly tell
    assert np.ptp(plus) == np.ptp(weak) == np.ptp(weaker) == 0
    rows, cols = np.nonzero(minus < np.median(minus) - 40)
    assert (rows.mean(), cols.mean()) == pytest.approx((43.5, 43.5), abs=1)
    assert np.ptp(cols) > 4 * np.ptp(rows) > 0


def test_a_strip_of_the_smallest_patches_can_be_drawn():
    fine = make(rows=100)[:1]
    assert draw_strip(fine, height=30).size[1] > 30
    assert draw_strip(replace(fine, attributions=torch.zeros(1, 100, 100, 3))).size[1] > 30


def test_letters_that_no_font_has_become_question_marks():
    """A box could be a letter; and matplotlib would warn of each."""
    explanation = make(labels=("K\u00e4fer \U00012000", "one", "two", "seven", "eight"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_strip(explanation)
        figure = draw_explanation(explanation)
        figure.savefig(io.BytesIO(), format="png")
    assert any(text.startswith("K\u00e4fer ?  p=") for text in texts(figure))


# wording


@pytest.mark.parametrize(
    ("value", "text"), [(3.976, "3.98"), (-4.1, "~4.10"), (0.0, "0.00"), (2e-7, "2.0e~07"), (1234567.0, "1.2e+06")]
)
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text.replace("~", MINUS)


def test_sum_check_adds_up():
    one = make()[:1]
    one = replace(
        one,
        attributions=torch.full((1, 2, 2, 3), 1.025),
        null_values=torch.full((1, 5), -0.12),
        logits=torch.tensor([[3.98, 3.5, -9, 3.98, -9]]),
    )
    assert not one.sums_to_logits  # by its other classes
    assert columns(one, 0, labels=["seven"], max_classes=9)[0].check == "one forward pass"
    one = replace(one, attributions=one.attributions[..., :1], classes=one.classes[:, :1])
    (exact,) = columns(one, 0, labels=["seven"], max_classes=9)
    assert exact.total == "Σφ=+4.10"
    first, second, made = exact.check.replace(MINUS, "-").split("\n")
    assert made == "one forward pass"
    assert first == "v(∅) -0.12 + Σφ +4.10 = 3.98"
    assert re.fullmatch(r"\(logit 3\.98, gap \de-0[78]\)", second)


# figures


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_figure_shows_picture_first_then_best_classes_with_their_sum_check():
    explanation = make()
    figure = explanation.figure(1, max_classes=2)
    maps = [axes.images[0].get_array() for axes in figure.axes]
    assert len(maps) == 4  # picture, two classes, scale
    assert np.array_equal(maps[0], explanation.images[1].numpy())
    shown = columns(explanation, 1, max_classes=2)
    limit = symmetric_limit([column.values.numpy() for column in shown])
    for pixels, column in zip(maps[1:3], shown, strict=True):
        expected = overlay(explanation.images[1].numpy(), explanation.heatmap(column.index, index=1), limit)
        assert np.array_equal(pixels, expected)
        assert column.check in texts(figure)
        assert f"{column.label}  {column.probability}\n{column.total}" in texts(figure)
    logits = [float(explanation.logits[1, column.index]) for column in shown]
    assert logits == sorted(explanation.logits[1].tolist(), reverse=True)[:2]
    assert {number(-limit), number(limit, sign=True), "contribution to the logit"} <= set(texts(figure))


def test_asked_labels_are_drawn_in_the_asked_order():
    found = " ".join(texts(draw_explanation(make(), labels=["zero", 3])))
    assert found.index("zero  p=") < found.index("seven  p=")
    assert "one  p=" not in found
    with pytest.raises(ClassNotFoundError):
        draw_explanation(make(), labels=["nought"])
    for empty in ({"labels": []}, {"max_classes": 0}):
        with pytest.raises(ValueError, match="no class to draw"):
            draw_explanation(make(), **empty)


def test_smooth_maps_say_so():
    plain, smooth = draw_explanation(make()), draw_explanation(make(), smooth=True)
    assert not any("smoothed" in text for text in texts(plain))
    assert any("smoothed" in text for text in texts(smooth))
    assert not np.array_equal(plain.axes[1].images[0].get_array(), smooth.axes[1].images[0].get_array())


def unitless():
    return replace(make(), attributions=make().attributions.abs(), method="attention_rollout")


def refined():
    errors = make().attributions.abs() * 0.35
    return replace(make(), standard_errors=errors, evaluations=torch.tensor([64, 128]), method="refined")


def test_maps_that_do_not_sum_claim_no_sum():
    found = texts(unitless().figure(1, max_classes=2))
    assert "relevance, does not sum to the logit" in found
    assert not any("Σφ" in text or "gap" in text or "contribution" in text for text in found)
    assert any(text.startswith("seven  p=") and text.endswith("\nattention_rollout") for text in found)


def gradients():
    return replace(refined(), evaluations=torch.tensor([6, 6]), method="gradient")


def test_levels_are_named_with_the_error_that_is_expected():
    found = texts(refined().figure(1, max_classes=2))
    assert any(re.search(r"^seven  p=.*\nΣφ=", text) for text in found)
    assert sum(text.endswith("\nrefined, 128 evaluations\nexpected error about 35 %") for text in found) == 2
    found = texts(gradients().figure(1, max_classes=2))
    assert sum(text.endswith("\nforward and backward pass\nexpected error about 35 %") for text in found) == 2
    assert sum(text.endswith(")\none forward pass") for text in texts(make().figure(1, max_classes=2))) == 2
    own = texts(replace(make(), method="presence_gradient").figure(1, max_classes=2))
    assert any("presence gradient, Σφ=" in text for text in own)
    unknown = replace(refined(), standard_errors=torch.full((2, 4, 4, 3), torch.inf))
    assert not any("expected" in text for text in texts(unknown.figure(0)))


def test_the_level_of_several_explanations():
    assert level([make()]) == "one forward pass"
    assert level([refined()]) == "refined, 64 to 128 evaluations"
    assert level([refined()[1], gradients()]) == "refined, 128 evaluations or forward and backward pass"
    exact = replace(refined(), standard_errors=torch.zeros(2, 4, 4, 3))
    assert expected_error(exact[0], 3) == "exact Shapley values"
    close = replace(refined(), standard_errors=0.001 * refined().attributions.abs())
    assert expected_error(close[0], 3) == "expected error below 1 %"


def test_tiles_and_strips_name_the_level():
    many = gallery(replace(make(batch=8), method="gradient"), max_classes=1)
    assert any("forward and backward pass" in text for text in texts(many))
    _, listed = sample_pictures(gradients(), 2)
    assert {one["level"] for one in listed} == {"forward and backward pass"}


def test_gallery_gives_each_image_a_scale_of_its_own():
    explanation = make(batch=3)
    figure = gallery(explanation, [2, 0], max_classes=2)
    assert len(figure.axes) == 2 * 4
    limits = [
        symmetric_limit([c.values.numpy() for c in columns(explanation, index, max_classes=2)]) for index in (2, 0)
    ]
    assert limits[0] != limits[1]
    found = texts(figure)
    assert [text for text in found if text in {number(limit, sign=True) for limit in limits}] == [
        number(limit, sign=True) for limit in limits
    ]
    assert len(gallery(explanation).axes) == 3 * 4
    with pytest.raises(ValueError, match="no image"):
        gallery(explanation, [])
    with pytest.raises(IndexError):
        gallery(explanation, [3])


def test_comparison_gives_each_method_a_scale_of_its_own():
    other = replace(make(), attributions=9 * make().attributions, method="kernel_shap")
    logits, rest = other.logits.gather(1, other.classes), other.attributions.sum(dim=(1, 2))
    other = replace(other, null_values=other.null_values.scatter(1, other.classes, logits - rest))
    several = [make(), other, replace(unitless(), attributions=2 * unitless().attributions)]
    figure = draw_comparison(several, 1, label="one")
    found = texts(figure)
    for one in several:
        limit = symmetric_limit(one.for_label("one")[1])
        expected = overlay(one.images[1].numpy(), one.heatmap("one", index=1), limit)
        assert any(np.array_equal(expected, axes.images[0].get_array()) for axes in figure.axes)
        assert (number(limit, sign=True) in found) == one.sums_to_logits
        assert any(text.startswith(f"{level([one])}\n") for text in found)
    assert len(figure.axes) == 4 + 2  # the map without a sum has no scale
    assert found.count("contribution to the logit") == 2
    assert any(text.startswith("one  p=") for text in found)


def test_comparison_of_what_cannot_be_compared():
    with pytest.raises(ValueError, match="no explanation"):
        draw_comparison([])
    with pytest.raises(ValueError, match="same images"):
        draw_comparison([make(), make(side=64)])
    with pytest.raises(ValueError, match="not among the columns"):
        draw_comparison([make()], label="two")


@pytest.mark.parametrize(("side", "rows", "scale"), [(64, 8, 1.0), (224, 16, 1e4), (32, 4, 1e-6)])
def test_no_text_is_cut_or_overlaps(side, rows, scale):
    names = ("x" * 300, "Sarcoramphus papa, the long name of a bird", "two", "W" * 40, "eight")
    explanation = replace(
        make(side, rows, labels=names, scale=scale), method="m" * 200, evaluations=torch.tensor([4096, 16384])
    )
    explanation = replace(explanation, standard_errors=explanation.attributions.abs() * 0.123)
    unsummed = replace(explanation, attributions=explanation.attributions.abs())
    for figure in (gallery(explanation, max_classes=3), draw_comparison([explanation, unsummed, explanation])):
        check_places(figure)
    assert any("…" in text for text in texts(figure))


def check_places(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    boxes += [axes.get_window_extent(renderer) for axes in figure.axes]
    for place, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])


def test_figure_of_nothing_but_zeros_and_hostile_names_can_be_written():
    labels = ("$\\frac{$", *HOSTILE[1:])  # would be a mistake if it were read as mathematics
    empty = replace(make(labels=labels), attributions=torch.zeros(2, 4, 4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        draw_explanation(empty).savefig(io.BytesIO(), format="png")
