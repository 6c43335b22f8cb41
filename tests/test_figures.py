"""What figures add to the maps: contrasts, marks, numbers, errors, many images, class means, curves, words."""

import io
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_visual import HOSTILE, check_places, make, texts

from shapadapter.core.errors import ClassNotFoundError
from shapadapter.core.phrases import one_line
from shapadapter.core.statistics import Interval
from shapadapter.evaluation import CostPoint
from shapadapter.visual import (
    alt_text,
    draw_class_means,
    draw_contrast,
    draw_cost_curve,
    draw_curves,
    draw_explanation,
    draw_history,
    draw_scatter,
    gallery,
    mean_maps,
    overlay,
    signed_colors,
    symmetric_limit,
)
from shapadapter.visual.maps import strongest
from shapadapter.visual.wording import MINUS, columns, number


def one_map(values, side=64, **options):
    """A grey image of one class with these attributions (rows, cols)."""
    values = torch.tensor(values, dtype=torch.float32)[None, :, :, None]
    logits = values.sum(dim=(1, 2))
    images = torch.full((1, side, side, 3), 128, dtype=torch.uint8)
    return replace(
        make()[:1],
        attributions=values,
        classes=torch.zeros(1, 1, dtype=torch.int64),
        logits=logits,
        null_values=torch.zeros(1, 1),
        probabilities=torch.ones(1, 1),
        labels=("only",),
        images=images,
        **options,
    )


def pixels(figure):
    """What the figure looks like, (height, width, 3) in 0..255."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"), float)


def patch(drawn, figure, place, shape, number=1):
    """The pixels of one patch of a map."""
    height, width = drawn.shape[:2]
    box = figure.axes[number].get_position()
    (row, col), (rows, cols) = place, shape
    x = [round(width * (box.x0 + box.width * (col + more) / cols)) for more in (0.1, 0.9)]
    y = [round(height * (1 - box.y1 + box.height * (row + more) / rows)) for more in (0.1, 0.9)]
    return drawn[y[0] : y[1], x[0] : x[1]]


def lines_in(axes):
    """Middles of the lines drawn over a map."""
    found = [line for lines in axes.collections for line in lines.get_segments()]
    return np.array([np.mean(line, axis=0) for line in found]).reshape(-1, 2)


# -- seeing the sign ----------------------------------------------------------------------------------------------------


def test_sign_can_be_read_from_a_print_in_grey():
    figure = draw_explanation(one_map([[2.0, -2.0], [0.1, -0.1]]))
    grey = pixels(figure) @ [0.299, 0.587, 0.114]
    plus, minus, _, weak = (patch(grey, figure, place, (2, 2)) for place in ((0, 0), (0, 1), (1, 0), (1, 1)))
    assert abs(np.median(plus) - np.median(minus)) < 40  # the colours alone hardly tell
    assert np.ptp(plus) < 2
    assert minus.min() < np.median(minus) - 40  # the dash does
    assert np.ptp(weak) < 2


# Machado, Oliveira and Fernandes 2009, of full severity; on linear RGB.
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLIND)
def test_signs_differ_for_those_who_see_two_colours(kind):
    image = np.full((1, 2, 3), 128, np.uint8)
    for strength in (0.3, 1.0):
        shown = overlay(image, np.array([[strength, -strength]]), 1.0) / 255
        linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
        seen = np.clip(linear @ np.array(BLIND[kind]).T, 0, 1) ** (1 / 2.2)
        assert np.abs(seen[0, 0] - seen[0, 1]).max() > 0.4 * strength


# -- what is drawn over maps --------------------------------------------------------------------------------------------


def test_strongest_patches_are_chosen_by_size_and_never_nothing():
    values = np.array([[3.0, -4.0], [0.5, 0.0]])
    assert strongest(values, 0.5).tolist() == [[True, True], [False, False]]
    assert strongest(values, 0.26).sum() == 2  # rounded up
    assert strongest(np.zeros((2, 2)), 0.5).sum() == 0
    for wrong in (0, 1, 10, -0.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            draw_explanation(make(), contour=wrong)


def test_contour_goes_round_the_strongest_patches():
    figure = draw_explanation(one_map([[5.0, 4.0], [1.0, 1.0]]), contour=0.5)
    middles = {tuple(middle) for middle in (lines_in(figure.axes[1]) + 0.5) / 32}
    # Round the two upper patches, not between them.
    assert middles == {(0.5, 0), (1.5, 0), (0.5, 1), (1.5, 1), (0, 0.5), (2, 0.5)}
    assert any("outlined: strongest 50 % of patches" in text for text in texts(figure))


def test_numbers_are_those_of_the_map_or_refused():
    figure = draw_explanation(one_map([[0.25, -1.5], [0.0, 1e-9]]), numbers=True)
    assert [text.get_text() for text in figure.axes[1].texts] == ["+0.25", f"{MINUS}1.50", "0", "0"]
    small = draw_explanation(one_map([[2.5e-7, -1e-7], [0.0, 0.0]]), numbers=True)
    assert [text.get_text() for text in small.axes[1].texts][:2] == ["+2.50", f"{MINUS}1.00"]
    assert any("10⁻⁷" in text for text in texts(small))
    with pytest.raises(ValueError, match="32 x 32 patches would be too small"):
        draw_explanation(make(side=64, rows=32), numbers=True)


@pytest.mark.parametrize("rows", [4, 8, 14])
def test_numbers_stay_in_their_patches(rows):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_explanation(make(side=56, rows=rows, scale=9.0), numbers=True, max_classes=2)
    check_places(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    side = figure.axes[1].get_window_extent(renderer).width / rows
    assert max(text.get_window_extent(renderer).width for text in figure.axes[1].texts) < side


def refined(values, errors):
    return one_map(values, standard_errors=torch.tensor(errors, dtype=torch.float32)[None, :, :, None])


def test_errors_hatch_what_may_be_zero_and_fade_to_what_is_sure():
    explanation = refined([[2.0, -2.0], [1.0, 1.0]], [[0.5, 0.5], [0.6, 0.0]])
    hatched = draw_explanation(explanation, errors="hatch")
    places = {(int(y // 32), int(x // 32)) for x, y in lines_in(hatched.axes[1])}
    assert places == {(1, 0), (0, 1)}  # (1, 0) may be zero; (0, 1) has the dash of its sign
    sure = draw_explanation(explanation, errors="opacity").axes[1].images[0].get_array()
    expected = [[2 - 0.98, -2 + 0.98], [0, 1]]
    heat = np.array(expected).repeat(32, axis=0).repeat(32, axis=1)
    assert np.abs(sure.astype(int) - overlay(explanation.images[0].numpy(), heat, 2.0)).max() <= 1
    for errors in ("hatch", "opacity"):
        with pytest.raises(ValueError, match="refine=256"):
            draw_explanation(make(), errors=errors)
    with pytest.raises(ValueError, match='"opacity", "hatch" or None'):
        draw_explanation(explanation, errors="bars")


# -- contrast -----------------------------------------------------------------------------------------------------------


def test_contrast_is_one_map_minus_the_other_and_sums_to_the_gap_of_the_logits():
    explanation = make()
    figure = draw_contrast(explanation, 1, "zero", 3)
    rest = explanation.for_label("zero")[1] - explanation.for_label("seven")[1]
    heat = rest.numpy().repeat(8, axis=0).repeat(8, axis=1)
    parts = [explanation.for_label(name)[1].numpy() for name in ("zero", "seven")]
    expected = overlay(explanation.images[1].numpy(), heat, symmetric_limit([*parts, rest.numpy()]))
    assert np.array_equal(figure.axes[3].images[0].get_array(), expected)
    gap = float(explanation.logits[1, 0] - explanation.logits[1, 3])
    (check,) = (text for text in texts(figure) if "logits differ by" in text)
    assert f"= {number(gap)}\n(logits differ by {number(gap)}, gap" in check
    assert any(text.startswith(f"zero {MINUS} seven\n") for text in texts(figure))
    with pytest.raises(ValueError, match="two different classes"):
        draw_contrast(explanation, 0, "zero", 0)
    with pytest.raises(ClassNotFoundError):
        draw_contrast(explanation, 0, "zero", "nought")


# -- many images and classes --------------------------------------------------------------------------------------------


def test_gallery_of_many_images_is_compact_and_may_share_a_scale():
    explanation = make(batch=9, labels=HOSTILE)
    figure = gallery(explanation, max_classes=2)
    assert len(figure.axes) == 9 * 3 + 1  # one scale for all
    check_places(figure)
    assert sum(text.startswith("scale ±") for text in texts(figure)) == 9
    shared = gallery(explanation, max_classes=2, shared_scale=True)
    shown = [columns(explanation, index, max_classes=2) for index in range(9)]
    limit = symmetric_limit([c.values.numpy() for one in shown for c in one])
    assert number(limit, sign=True) in texts(shared)
    heat = explanation.heatmap(shown[0][0].index)
    assert np.array_equal(shared.axes[1].images[0].get_array(), overlay(explanation.images[0].numpy(), heat, limit))


def test_many_classes_take_several_lines():
    values = torch.randn(1, 4, 4, 10)
    explanation = replace(
        make()[:1],
        attributions=values,
        classes=torch.arange(10)[None],
        logits=values.sum(dim=(1, 2)),
        null_values=torch.zeros(1, 10),
        probabilities=torch.full((1, 10), 0.1),
        labels=tuple(f"{place} {name}" for place, name in enumerate((*HOSTILE, *HOSTILE))),
    )
    figure = draw_explanation(explanation, max_classes=10)
    check_places(figure)
    assert len(figure.axes) == 12
    assert figure.get_size_inches()[0] < 17


def test_hostile_names_are_shown_as_text():
    assert one_line("a\x00b\nc\u202egpj.exe") == "a b cgpj.exe"
    explanation = make(labels=("$x_1$", "\\frac{", "_", "שלום", "#%&~"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pixels(draw_contrast(explanation, 0, 3, 1))
    assert any("שלום" in text for text in texts(draw_contrast(explanation, 0, 3, 1)))


# -- class means --------------------------------------------------------------------------------------------------------


def test_mean_maps_are_mean_and_deviation_of_each_class():
    explanation = make(batch=7)
    labels = ["seven", "one", 3, "seven", "zero", "one", "seven"]
    names = ["seven" if label == 3 else label for label in labels]
    means = mean_maps((explanation[i : i + 2] for i in range(0, 7, 2)), iter(labels))
    assert means.by == "labelled"
    assert means.sums_to_logits
    assert means.classes.tolist() == [0, 1, 3]
    assert means.counts.tolist() == [1, 2, 4]
    for place, name in enumerate(("zero", "one", "seven")):
        chosen = [index for index, other in enumerate(names) if other == name]
        maps = explanation.for_label(name)[chosen].double()
        torch.testing.assert_close(means.for_label(name), maps.mean(0))
        if len(chosen) > 1:
            torch.testing.assert_close(means.deviations[place], maps.std(0))
        picture = explanation.images[chosen].double().mean(0)
        assert (means.pictures[place].double() - picture).abs().max() <= 0.51
    assert means.deviations[0].isnan().all()
    predicted = mean_maps(explanation)
    assert predicted.by == "predicted"
    assert predicted.counts.tolist() == torch.unique(explanation.logits.argmax(1), return_counts=True)[1].tolist()


def test_mean_maps_hold_one_explanation_at_a_time():
    import weakref

    known = []

    def stream():
        for _ in range(4):
            part = replace(make(), attributions=make().attributions)
            known.append(weakref.ref(part))
            yield part
            del part
            assert sum(ref() is not None for ref in known) <= 2  # the first, whose names are compared, and this one

    assert mean_maps(stream()).counts.sum() == 8


def test_mean_maps_refuse_what_does_not_fit():
    explanation = make()
    for labels, words in ((["one"], "only 1"), (["one"] * 3, "got more"), (["two"] * 2, "not among the columns")):
        with pytest.raises(ValueError, match=words):
            mean_maps(explanation, labels)
    with pytest.raises(ClassNotFoundError):
        mean_maps(explanation, ["nought", "one"])
    with pytest.raises(ValueError, match="no image"):
        mean_maps([])
    with pytest.raises(ValueError, match="players differ"):
        mean_maps([explanation, make(rows=8)])
    with pytest.raises(ValueError, match="no mean map"):
        mean_maps(explanation, ["one", "one"]).for_label("zero")
    with pytest.raises(ValueError, match="NaN"):
        mean_maps(replace(explanation, attributions=torch.full((2, 4, 4, 3), torch.nan)))


def test_large_pictures_are_averaged_small():
    means = mean_maps(make(side=224, rows=16))
    assert means.pictures.shape[1:3] == (128, 128)
    assert mean_maps(make(side=160, rows=160)).pictures.shape[1:3] == (160, 160)


def test_class_means_say_of_how_many_images_and_hatch_what_is_unsure():
    plus, minus = ([[sign, 1.0], [1.0, 1.0]] for sign in (1.0, -1.0))
    parts = [one_map(plus), one_map(minus), one_map(plus)]
    means = mean_maps(parts)
    figure = draw_class_means(means)
    check_places(figure)
    assert any("(3 images predicted)" in text for text in texts(figure))
    middles = lines_in(figure.axes[1])
    assert len(middles)
    assert {(int(y // 32), int(x // 32)) for x, y in middles} == {(0, 0)}
    alone = draw_class_means(mean_maps(parts[0]))
    assert any("(1 image predicted)" in text for text in texts(alone))
    assert "spread unknown" in texts(alone)
    assert len(lines_in(alone.axes[1])) == 0
    for options in ({"labels": []}, {"max_classes": 0}):
        with pytest.raises(ValueError, match="no class to draw"):
            draw_class_means(means, **options)
    several = mean_maps(make(batch=8, labels=HOSTILE), [0, 1, 3, 0, 1, 3, 0, 1])
    check_places(draw_class_means(several))


# -- scatter, history, curves -------------------------------------------------------------------------------------------


def test_scatter_says_how_well_they_agree():
    true = torch.tensor([[1.0, 2.0, 3.0], [30.0, 10.0, 20.0]])
    title = draw_scatter(true, true).axes[0].get_title()
    assert "2 images, 6 patches, Pearson r = 1.00" in title
    assert "relative error 0.00" in title
    offset = torch.tensor([[0.0], [50.0]])
    pooled = draw_scatter(offset - true, offset + true).axes[0].get_title()
    assert "within an image r = -1.00" in pooled
    assert "Pearson r = 0." in pooled  # knowing the images alone
    assert "undefined" in draw_scatter(torch.zeros(2, 3), true).axes[0].get_title()
    pixels(draw_scatter(torch.randn(20, 200), torch.randn(20, 200)))
    for predicted, other in ((true[:1], true), (torch.zeros(1), torch.zeros(1))):
        with pytest.raises(ValueError, match="of one shape"):
            draw_scatter(predicted, other)
    with pytest.raises(ValueError, match="finite"):
        draw_scatter(true / 0, true)


def test_history_draws_what_was_logged():
    log = [
        {"step": 10, "loss": 9.0, "task_loss": 2.0, "shapley_loss": 5.0, "coalition_fit": -3.0},
        {"step": 20, "eval_accuracy": 0.5, "eval_task_loss": 1.0},
        {"step": 20, "loss": 1.0, "task_loss": 1.0, "shapley_loss": float("nan"), "coalition_fit": 0.5},
        {"step": 20, "train_runtime": 3.0},
    ]
    figure = draw_history(log)
    assert [axes.get_title() for axes in figure.axes] == ["Task loss", "Shapley loss", "Coalition fit", "Accuracy"]
    way, held_out = figure.axes[0].lines
    assert np.array_equal(way.get_xydata(), [[10, 2], [20, 1]])
    assert np.array_equal(held_out.get_xydata(), [[20, 1]])
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[10, 5]]
    assert [axes.get_title() for axes in draw_history(log[1:2]).axes] == ["Task loss", "Accuracy"]
    pixels(figure)
    with pytest.raises(ValueError, match="logging_steps"):
        draw_history(log[3:])


def test_curves_of_nothing_are_refused_and_others_described():
    line = [Interval(value, value - 0.1, value + 0.1, 9) for value in (0.0, 0.5, 1.0)]
    figure = draw_curves({"shapadapter": {"insertion": line}, "random": {"insertion": line[:1] * 3}})
    assert (
        "Insertion: most relevant first, mean height of the curve: shapadapter 0.50, random 0.00." in figure.alt_text
    )
    with pytest.raises(ValueError, match="insertion"):
        draw_curves({})


# -- words --------------------------------------------------------------------------------------------------------------


def test_alt_text_says_where_the_strongest_patches_are():
    explanation = one_map([[0.0, 0.0, 3.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    found = alt_text(explanation)
    assert found.startswith("Image predicted as only, with maps of 3 by 3 patches (one forward pass). only, p=1.00")
    assert "attributions sum to +2.00: strongest for it at the top right, row 1, column 3 (+3.00)" in found
    assert f"strongest against it at the bottom left, row 3, column 1 ({MINUS}1.00)" in found
    assert "all patches are zero" in alt_text(one_map([[0.0]]))
    assert "sum" not in alt_text(replace(make(), attributions=make().attributions.abs(), method="grad_cam"))
    assert "\n" not in alt_text(make(labels=HOSTILE))


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_description_goes_into_the_file(kind, tmp_path):
    figure = draw_explanation(make(), 1)
    assert figure.alt_text == alt_text(make(), 1)
    figure.savefig(tmp_path / f"why.{kind}")
    content = (tmp_path / f"why.{kind}").read_bytes()
    if kind == "png":
        assert Image.open(tmp_path / "why.png").text["Description"] == figure.alt_text
        figure.savefig(tmp_path / "mine.png", metadata={"Description": "mine"})
        assert Image.open(tmp_path / "mine.png").text["Description"] == "mine"
    else:
        assert (b"Image predicted as" if kind == "svg" else b"/Subject") in content
    figure.savefig(tmp_path / "why.jpg")  # which has no place for it


def test_every_figure_is_described_and_none_belongs_to_a_window():
    import matplotlib.pyplot as plt

    figures = [
        gallery(make()),
        gallery(make(batch=8)),
        draw_contrast(make(), 0, 0, 1),
        draw_class_means(mean_maps(make())),
        draw_scatter([[1.0, 2.0]], [[1.0, 2.0]]),
    ]
    assert all(figure.alt_text.endswith(".") for figure in figures)
    assert plt.get_fignums() == []


def test_colours_of_the_scale_are_those_of_the_maps():
    figure = draw_explanation(make())
    assert np.array_equal(figure.axes[-1].images[0].get_array(), signed_colors(np.linspace(-1, 1, 255)[None], 1.0))


# -- error against cost -------------------------------------------------------------------------------------------------


def cost_point(method, budget, passes, error):
    return CostPoint(method, budget, passes, (error,), Interval(error, 0.8 * error, 1.2 * error, 9))


def at_cost(*points, truth=0.05):
    return SimpleNamespace(cost_curve=points, about={"truth_error": truth})


def test_names_of_lines_that_end_at_one_place_do_not_overlap():
    ends = [
        cost_point(name, 512, 500, 0.1 + i / 1000) for i, name in enumerate(("refined", "kernel_shap", "permutation"))
    ]
    starts = [cost_point(point.method, 128, 130, 0.5) for point in ends]
    figure = draw_cost_curve(at_cost(*starts, *ends))
    figure.canvas.draw()
    boxes = [
        text.get_window_extent() for text in figure.axes[0].texts if text.get_text() != "error of the truth itself"
    ]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(box.x1 < figure.bbox.width for box in boxes)
    assert "refined: 0.5 at 130, 0.1 at 500." in figure.alt_text


def test_what_is_exact_or_hopeless_does_not_stretch_the_axis():
    points = [cost_point("kernel_shap", 64, 60, 300.0), cost_point("kernel_shap", 512, 500, 0.2)]
    figure = draw_cost_curve(at_cost(*points, cost_point("kernel_shap", 1024, 1000, 1e-8), truth=0.0))
    low, high = figure.axes[0].get_ylim()
    assert low > 1e-3
    assert high == 2
    assert not figure.axes[0].texts[0].get_text().startswith("error of the truth")
    with pytest.raises(ValueError, match="cost_curve=True"):
        draw_cost_curve(at_cost())
