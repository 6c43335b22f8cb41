"""Errors at equal cost, and the smoothness of a game."""

import json
import math
from dataclasses import replace

import pytest
from small import SMALL, processor, rows_of, wrapped

from shapadapter import Evaluation, PatchGame, attribute, evaluate
from shapadapter.core.errors import CheckpointError
from shapadapter.evaluation.dataset import choose
from shapadapter.evaluation.equal_cost import ways
from shapadapter.visual import draw_cost_curve

pytestmark = pytest.mark.usefixtures("quick_evaluation")


@pytest.fixture(scope="module")
def result():
    methods = ("gradient", "presence_gradient")
    return evaluate(wrapped(), rows_of(), processor(), methods=methods, cost_curve=True, **SMALL)


def test_permutation_sampling_needs_a_pair_of_orders():
    found = ways((64, 126, 256), 64)
    assert [budget for method, budget in found if method == "permutation"] == [126, 256]
    assert [budget for method, budget in found if method == "refined"] == [64, 126, 256]
    assert found[:3] == [("shapadapter", 0), ("presence_gradient", 0), ("gradient", 0)]
    assert ("permutation", 14) in ways((14,), 4)  # all coalitions


def test_every_way_has_its_error_and_its_cost(result):
    points = {(point.method, point.budget): point for point in result.cost_curve}
    assert list(points) == ways((16, 64), 9)
    assert all(point.passes > 0 and len(point.errors) == 2 for point in points.values())
    for point in points.values():
        assert point.error.mean == pytest.approx(sum(point.errors) / 2)
        assert point.error.low <= point.error.mean <= point.error.high
    assert points["refined", 64].passes > points["refined", 16].passes > points["shapadapter", 0].passes
    for name in ("shapadapter", "gradient", "presence_gradient"):
        assert points[name, 0].error.mean == pytest.approx(result.methods[name]["error"].mean, rel=1e-4)


def test_smoothness_is_the_error_of_the_untrained_gradient(result):
    model, errors = wrapped(), []
    for index in choose(8, 2, 0):
        picture = rows_of()[index]["image"]
        found = attribute(model, picture, processor(), method="presence_gradient", top_k=1)
        truth = PatchGame(model, processor()(picture, return_tensors="pt")["pixel_values"]).exact()
        truth = truth[:, int(found.classes[0, 0])]
        errors.append(((found.attributions.flatten().double() - truth).norm() / truth.norm()).item())
    assert result.smoothness.mean == pytest.approx(sum(errors) / 2, rel=1e-4)
    sentence = f"Error of the untrained gradient: {result.smoothness.mean:.2f} (0 is a perfectly smooth game"
    assert sentence in result.markdown()


def test_smoothness_is_measured_without_a_cost_curve_and_for_every_kind_of_game():
    found = evaluate(wrapped(prediction="classifier", removal="pixels"), rows_of(), processor(), methods=(), **SMALL)
    assert 0 < found.smoothness.mean < math.inf
    assert found.cost_curve == ()


def test_the_table_lists_every_point(result):
    lines = result.table().splitlines()
    start = lines.index("Error at equal cost")
    names = [line[2:].split("  ")[0] for line in lines[start + 2 : start + 2 + len(result.cost_curve)]]
    assert names == [
        *("one pass", "untrained gradient", "gradient", "refined 16", "refined 64"),
        *("KernelSHAP 16", "KernelSHAP 64", "permutation sampling 16", "permutation sampling 64"),
    ]
    assert max(map(len, lines)) <= 120
    assert "| forward passes ↓ | relative L2 ↓ |" in result.markdown()


def test_saved_and_loaded(result, tmp_path):
    path = result.save(tmp_path / "evaluation.json")
    again = Evaluation.load(path)
    assert again.cost_curve == result.cost_curve
    assert again.smoothness == result.smoothness
    assert again.table() == result.table()
    content = json.loads(path.read_text())
    damaged = {**content, "cost_curve": [{**content["cost_curve"][0], "passes": "many"}]}
    path.write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match="passes"):
        Evaluation.load(path)


def test_an_evaluation_saved_before_there_were_cost_curves(result, tmp_path):
    path = result.save(tmp_path / "evaluation.json")
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: part for name, part in content.items() if name not in ("cost_curve", "smoothness")})
    )
    old = Evaluation.load(path)
    assert old.cost_curve == ()
    assert old.smoothness is None
    assert "untrained" not in old.table()
    with pytest.raises(ValueError, match="cost_curve=True"):
        draw_cost_curve(old)


def test_a_second_run_measures_no_error_again(tmp_path):
    model = wrapped()
    options = {**SMALL, "images": 1, "methods": (), "cache": tmp_path}
    plain = evaluate(model, rows_of(), processor(), **options)
    first, second = (evaluate(model, rows_of(), processor(), cost_curve=True, **options) for _ in range(2))
    assert plain.cost_curve == ()
    assert plain.smoothness.mean == first.smoothness.mean
    assert [point.errors for point in first.cost_curve] == [point.errors for point in second.cost_curve]
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 2


def test_a_model_without_a_gradient_by_presence_has_the_other_points(monkeypatch):
    from shapadapter.core.errors import UnsupportedModelError
    from shapadapter.evaluation import equal_cost

    def refusing(model, images, *, method, **given):
        if method in ("gradient", "presence_gradient"):
            raise UnsupportedModelError("None here.")
        return attribute(model, images, method=method, **given)

    monkeypatch.setattr(equal_cost, "attribute", refusing)
    found = evaluate(wrapped(), rows_of(), processor(), methods=(), cost_curve=True, **{**SMALL, "images": 1})
    assert found.smoothness is None
    assert {point.method for point in found.cost_curve} == {"shapadapter", "refined", "kernel_shap", "permutation"}


def test_the_figure_has_a_line_or_a_point_for_each_method(result):
    figure = draw_cost_curve(result)
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    drawn = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in drawn] == [1, 1, 1, 2, 2, 2]
    assert {text.get_text() for text in axes.texts} == {point.label for point in result.cost_curve}
    assert "KernelSHAP: " in figure.alt_text
    exact = [replace(point, error=replace(point.error, mean=0.0)) for point in result.cost_curve]
    with pytest.raises(ValueError, match="exact values"):
        draw_cost_curve(replace(result, cost_curve=tuple(exact)))
    assert all(math.isfinite(value) for line in drawn for value in line.get_ydata())
