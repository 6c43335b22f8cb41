"""`evaluate` from rows to the table, on a tiny ViT."""

import json
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from small import CLASSES, SMALL, bare, pictures, processor, rows_of, wrapped

from shapadapter import Evaluation, PatchGame, ShapleyConfig, ShapleyError, attribute, evaluate, explain
from shapadapter.core.errors import CheckpointError, ImageError
from shapadapter.core.statistics import Interval
from shapadapter.evaluation import Equivalent, map_agreement, measure
from shapadapter.evaluation.dataset import choose
from shapadapter.evaluation.tables import column

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("quick_evaluation")


@pytest.fixture(scope="module")
def model():
    return wrapped()


@pytest.fixture(scope="module")
def result(model):
    return evaluate(model, rows_of(), processor(), methods=("leave_one_out", "equal"), **SMALL)


def settings(**changes):
    return {**SMALL, "methods": (), **changes}


def means(evaluation):
    return {
        (method, name): interval.mean
        for method, values in evaluation.methods.items()
        for name, interval in values.items()
        if name not in ("time", "memory")
    }


class Calls:
    """How often the model was asked, and about how many coalitions."""

    def __init__(self, model):
        self.model, self.count, self.coalitions = model, 0, 0

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def _note(self, module, args, kwargs):
        self.count += 1
        if kwargs.get("coalitions") is not None:
            self.coalitions += kwargs["coalitions"].shape[0] * kwargs["coalitions"].shape[1]


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_the_error_is_the_distance_to_the_enumerated_values(model, result):
    errors, gaps = [], []
    for index in choose(8, 2, 0):
        found = explain(model, rows_of()[index]["image"], processor(), top_k=1)
        game = PatchGame(model, processor()(rows_of()[index]["image"], return_tensors="pt")["pixel_values"])
        truth = game.exact()[:, int(found.classes[0, 0])]
        errors.append(((found.attributions.flatten().double() - truth).norm() / truth.norm()).item())
        gaps.append(found.efficiency_gap.item())
    assert result.methods["shapadapter"]["error"].mean == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert result.about["truth"] == "exact"
    assert result.about["truth_error"] == 0
    assert result.task["largest_efficiency_gap"].mean < 1e-4


def test_the_task_is_measured_on_all_images(model, result):
    logits = explain(model, pictures(), processor()).logits
    labels = torch.arange(8) % CLASSES
    assert result.task["accuracy"].mean == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert result.task["cross_entropy"].mean == pytest.approx(expected, rel=1e-5)
    assert result.task["accuracy"].count == 8


def test_every_method_has_every_measure_that_suits_it(result):
    assert list(result.methods) == ["shapadapter", "leave_one_out", "equal", "random", "centre"]
    everywhere = {"insertion", "deletion", "aopc_morf", "aopc_lerf", "aopc_gap", "infidelity", "noise_change"}
    for name, values in result.methods.items():
        assert everywhere | {"road_morf", "road_lerf", "evaluations"} <= set(values)
        assert ("time" in values) == ("memory" in values) == (name not in ("random", "centre"))
    assert "error" not in result.methods["random"], "no unit"
    assert result.methods["equal"]["spearman"].mean == 0, "a constant map says nothing of ranks"
    assert result.methods["random"]["randomised"].mean == pytest.approx(1), "random maps do not depend on the model"
    assert set(result.equivalents) == {"shapadapter", "leave_one_out", "equal"}
    assert list(result.kernel_shap) == [16, 64]


def test_curves_begin_and_end_at_the_same_values_for_every_method(result):
    for kind, end in (("insertion", 0), ("deletion", -1)):
        lines = [result.curves[method][kind] for method in result.methods]
        assert {len(line) for line in lines} == {10}
        assert len({round(line[end].mean, 9) for line in lines}) == 1
        assert len({round(line[-1 - end].mean, 9) for line in lines}) == 1


def test_the_truth_itself_as_a_method_has_no_error(model):
    found = evaluate(model, rows_of(), processor(), **settings(methods=("exact",), images=1))
    assert found.methods["exact"]["error"].mean < 1e-5
    assert found.methods["exact"]["spearman"].mean == pytest.approx(1)
    assert str(found.equivalents["exact"]).startswith("> 64")


def test_own_methods_are_measured_beside_the_others(model):
    methods = {"mine": partial(attribute, method="exact"), "again": "exact"}
    found = evaluate(model, rows_of(), processor(), **settings(methods=methods, images=1))
    for name, interval in found.methods["again"].items():
        if name not in ("time", "memory"):
            assert found.methods["mine"][name].mean == interval.mean


def test_a_method_as_attribute_takes_it_is_taken_here(model):
    def brightness(model, inputs, classes):
        return inputs["pixel_values"].mean(dim=1)[..., None].expand(-1, -1, -1, classes.shape[1])

    methods = {"mine": brightness, "again": partial(attribute, method=brightness)}
    found = evaluate(model, rows_of(), processor(), **settings(methods=methods))
    assert found.methods["mine"]["insertion"] == found.methods["again"]["insertion"]
    assert found.methods["mine"]["error"] == found.methods["again"]["error"]


@pytest.mark.parametrize("config", [{"prediction": "classifier", "removal": "mask"}, {"removal": "pixels"}])
def test_every_kind_of_game(config):
    found = evaluate(wrapped(**config), rows_of(), processor(), **settings())
    assert found.about["removal"] == config.get("removal", "drop")
    assert all(math.isfinite(value) for value in found.metrics().values())
    assert found.task["largest_efficiency_gap"].mean < 1e-4


def test_beyond_sixteen_players_the_truth_has_an_error_of_its_own():
    found = evaluate(wrapped(rows=6), rows_of(), processor(6), **settings(images=1))
    assert found.about["truth"] == "kernel_shap"
    assert 0 < found.about["truth_error"] < 1
    assert "KernelSHAP with 256 evaluations, its own error" in " ".join(found.table().split())


def test_several_labels_and_quantities():
    model = wrapped()
    model.config.problem_type = "multi_label_classification"
    rows = [{**row, "label": [1.0, 0.0, 0.0, 1.0]} for row in rows_of()]
    found = evaluate(model, rows, processor(), **settings(images=1))
    logits = explain(model, pictures(), processor()).logits
    right = ((logits > 0) == torch.tensor([True, False, False, True])).double().mean().item()
    assert found.task["accuracy"].mean == pytest.approx(right)
    model.config.problem_type = "regression"
    found = evaluate(model, rows, processor(), **settings(images=1))
    assert "squared_error" in found.task
    assert "road_morf" not in found.methods["shapadapter"]
    assert found.about["curves_read"] == "value"


def test_without_labels_there_is_no_task(model):
    found = evaluate(model, [{"image": picture} for picture in pictures()], processor(), **settings(images=1))
    assert set(found.task) == {"efficiency_gap", "largest_efficiency_gap"}


# -- the same numbers, whatever the road -----------------------------------------------------------------------------


def test_batches_do_not_matter(model):
    one, many = (
        evaluate(model, rows_of(), processor(), **settings(images=2, batch_size=size, methods=("leave_one_out",)))
        for size in (7, 96)
    )
    assert means(one).keys() == means(many).keys()
    for key, value in means(one).items():
        assert means(many)[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    for budget, error in one.kernel_shap.items():
        assert many.kernel_shap[budget].mean == pytest.approx(error.mean, rel=1e-3)


def test_seeds_decide(model):
    found = [evaluate(model, rows_of(), processor(), **settings(seed=seed)) for seed in (0, 0, 1)]
    assert means(found[0]) == means(found[1])
    assert found[0].kernel_shap == found[1].kernel_shap
    assert found[0].kernel_shap != found[2].kernel_shap


def test_prepared_pixels_and_data_sets_give_the_same(model, result):
    rows = rows_of()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_list(rows, features=features)
    prepared = [
        {"pixel_values": processor()(row["image"], return_tensors="pt")["pixel_values"][0], "label": row["label"]}
        for row in rows
    ]
    for data, using in ((dataset, processor()), (prepared, None)):
        found = evaluate(model, data, using, **settings())
        assert found.task["cross_entropy"] == result.task["cross_entropy"]
        assert found.methods["shapadapter"]["error"] == result.methods["shapadapter"]["error"]


def test_a_collator_takes_the_place_of_the_processor(model, result):
    def collate(rows):
        pixels = processor()([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}

    found = evaluate(model, rows_of(), collate, **settings())
    assert found.methods["shapadapter"]["error"] == result.methods["shapadapter"]["error"]


def test_the_model_is_left_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    evaluate(model, rows_of(), processor(), **settings(images=1))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    model.eval()


def test_the_callers_autocast_is_in_force(model):
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(model, rows_of(), processor(), **settings(images=1))
    assert found.about["precision"] == "float32, autocast to bfloat16"


def test_the_callers_inference_mode_does_not_matter(model):
    expected = evaluate(model, rows_of(), processor(), **settings(images=1, methods=("grad_cam",)))
    with torch.inference_mode():
        found = evaluate(model, rows_of(), processor(), **settings(images=1, methods=("grad_cam",)))
    assert means(found) == means(expected)


def test_unused_columns_bring_no_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, rows_of(animal=list("abababab")), processor(), **settings(images=1), groups="animal")


def test_a_model_that_holds_the_adapter_itself():
    model = bare()
    model.add_adapter(ShapleyConfig(r=4))
    found = evaluate(model.eval(), rows_of(), processor(), **settings(images=1))
    assert found.about["model"] == "ViTForImageClassification"
    assert found.methods["shapadapter"]["time"].mean > 0


def test_options_reach_the_model(model):
    rows = [{"pixel_values": torch.randn(3, 32, 40)} for _ in range(2)]
    found = evaluate(model, rows, **settings(images=1), interpolate_pos_encoding=True)
    assert found.about["players"] == [4, 5]


# -- a cache ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch):
    expected = evaluate(model, rows_of(), processor(), **settings(images=3))
    original, done = measure.Measurer.records, []

    def interrupted(self, indices):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.extend(indices)
        return original(self, indices)

    monkeypatch.setattr(measure.Measurer, "records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, rows_of(), processor(), cache=tmp_path, **settings(images=3))
    monkeypatch.setattr(measure.Measurer, "records", original)
    assert len(list(tmp_path.glob("*/image-*.json"))) == 2
    with Calls(model) as rest:
        found = evaluate(model, rows_of(), processor(), cache=tmp_path, **settings(images=3))
    assert means(found) == means(expected)
    assert found.kernel_shap == expected.kernel_shap
    with Calls(model) as nothing:
        again = evaluate(model, rows_of(), processor(), cache=tmp_path, **settings(images=3))
    assert means(again) == means(expected)
    assert nothing.coalitions == 0 < rest.coalitions


def test_a_cache_of_something_else_is_not_used(tmp_path):
    model, options = wrapped(), settings(images=1, budgets=(16,), truth_evaluations=64)
    turned = [{**row, "image": row["image"].rotate(90)} for row in rows_of()]

    def coalitions(rows=None, **changes):
        with Calls(model) as calls:
            evaluate(model, rows or rows_of(), processor(), cache=tmp_path, **{**options, **changes})
        return calls.coalitions

    assert coalitions() > 0
    assert coalitions() == 0
    assert coalitions(seed=5) > 0
    assert coalitions(methods=("equal",)) > 0
    assert coalitions(rows=turned) > 0
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).add_(1)
    assert coalitions() > 0


# -- what it looks like ----------------------------------------------------------------------------------------------


def test_the_table_fits_a_terminal_and_says_what_must_be_known(result):
    table = result.table()
    assert max(map(len, table.splitlines())) <= 120
    for text in (
        "3 x 3 players",
        "2 of 8 images",
        "relative L2",
        "= KernelSHAP with",
        "baseline KernelSHAP 64",
        "insertion ↑",
    ):
        assert text in table
    assert table.splitlines().count("") == 7
    assert "| shapadapter |" in result.markdown()


def test_a_budget_at_the_peak_of_kernel_shap_is_marked(model):
    table = evaluate(model, rows_of(), processor(), **settings(budgets=(18, 64), images=1)).table()
    assert "baseline KernelSHAP 18*" in table
    assert "as many pairs of coalitions as players" in " ".join(table.split())


def test_a_column_has_one_precision():
    def once(mean):
        return Interval(mean, math.nan, math.nan, 1)

    assert column([once(0.00697), None, once(-0.11912)]) == ["0.007", "", "-0.119"]
    assert column([Interval(0.4118, 0.38, 0.44, 9), once(16.7)]) == ["0.41 ± 0.03", "16.70"]
    assert column([once(0.0), once(64.0), once(1024.0)]) == ["0", "64", "1,024"]
    assert column([once(4e-8)]) == ["4.0e-08"]


def test_a_bound_is_known_by_its_number(result):
    equivalents = {"shapadapter": Equivalent(64, ">")}
    assert replace(result, equivalents=equivalents).metrics()["equivalent_evaluations_is_bound"] == 1.0
    equivalents = {"shapadapter": Equivalent(40, "=")}
    assert replace(result, equivalents=equivalents).metrics()["equivalent_evaluations_is_bound"] == 0.0


def test_a_truth_no_better_than_what_it_judges_brings_a_warning(model, monkeypatch):
    find = measure.find_truth
    monkeypatch.setattr(measure, "find_truth", lambda *given: replace(found := find(*given), errors=found.errors + 2))
    with pytest.warns(UserWarning, match="more than half .* 16 for each player or more: 144"):
        found = evaluate(model, rows_of(), processor(), **settings(images=1))
    assert "16 for each player" in " ".join(found.notes)
    assert "Notes" in found.table()


def test_saved_and_loaded(result, tmp_path):
    path = result.save(tmp_path / "folder" / "evaluation.json")
    assert Evaluation.load(path).table() == result.table()
    assert Evaluation.load(path).metrics() == result.metrics()
    assert json.loads(path.read_text()) == result.to_dict()
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]
    path.write_text(path.read_text()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        Evaluation.load(path)


def test_metrics_are_plain_numbers(result):
    found = result.metrics()
    assert {
        "accuracy",
        "cross_entropy",
        "error",
        "spearman",
        "equivalent_evaluations",
        "equivalent_evaluations_is_bound",
        "insertion",
        "deletion",
    } <= set(found)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_curves_are_drawn_with_a_line_for_each_method(result):
    figure = result.figure()
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert len(axes.lines) == 5
        assert not axes.collections, "no bands of two images"
        assert axes.get_legend() is None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(result.methods)
    mean = [point.mean for point in result.curves["shapadapter"]["insertion"]]
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx(mean)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("shap",)}, "There is no method 'shap'.*methods={'shap': function}"),
        ({"methods": ("kernelshap",)}, "Did you mean 'kernel_shap'"),
        ({"masks": "mask"}, "no column 'mask'"),
        ({"methods": {"mine": lambda model, images, targets: 0}}, r"partial\(attribute, method=function\)"),
        ({"groups": "animal"}, "no column 'animal'"),
        ({"methods": {"colour contrast (no model)": explain}}, "give your method another name"),
    ],
)
def test_what_does_not_exist_is_named(model, changes, words):
    with pytest.raises(ShapleyError, match=words):
        evaluate(model, rows_of(), processor(), **settings(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": (16, 256)},
        {"budgets": (64, 16)},
        {"budgets": (15,)},
        {"budgets": ()},
        {"truth_evaluations": 6},
        {"images": 0},
    ],
)
def test_numbers_that_make_no_sense(model, changes):
    with pytest.raises(ValueError, match=r"budgets|truth_evaluations|image"):
        evaluate(model, rows_of(), processor(), **settings(**changes))


def test_data_without_rows_by_index(model):
    for data in (iter(rows_of()), []):
        with pytest.raises(ShapleyError, match="rows by index"):
            evaluate(model, data, processor(), **settings())
    with pytest.raises(ShapleyError, match=r"choose a split.*data\['valid'\]"):
        evaluate(model, datasets.DatasetDict(valid=datasets.Dataset.from_list([{"label": 0}])), processor())


def test_images_without_a_processor(model):
    with pytest.raises(ImageError, match="pass processor="):
        evaluate(model, rows_of(), **settings())


def test_images_of_several_sizes():
    import families

    rows = [{"pixel_values": torch.randn(3, side, side)} for side in (16, 24)]
    with pytest.raises(ImageError, match="one size"):
        evaluate(families.wrap("dinov2"), rows, **settings(batch_size=1))


def test_maps_that_are_not_finite_are_named(model):
    def broken(model, images, targets):
        found = explain(model, images, targets=targets)
        return replace(found, attributions=found.attributions / 0)

    with pytest.raises(ShapleyError, match=r"\['broken'\] gave attributions that are not finite"):
        evaluate(model, rows_of(), processor(), **settings(methods={"broken": broken}))


def test_a_matching_model_is_sent_elsewhere():
    import matching

    with pytest.raises(ShapleyError, match="retrieval_after_deletion"):
        evaluate(matching.wrapped("clip"), rows_of(), **settings())


# -- maps of two models ----------------------------------------------------------------------------------------------


def test_maps_of_the_same_model_agree_and_those_of_another_do_not(model):
    same = map_agreement(model, model, rows_of(), processor(), images=8)
    assert same.mean == pytest.approx(1)
    assert same.count == 8
    other = wrapped()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(
                parameter.mean() + parameter.std() * torch.randn_like(parameter)
                if parameter.numel() > 1
                else parameter
            )
    assert abs(map_agreement(model, other, rows_of(), processor(), images=8).mean) < 0.6
    with pytest.raises(ShapleyError, match="players"):
        map_agreement(model, wrapped(grid=(1, 3)), rows_of(), processor())


def test_a_misspelt_argument_is_not_taken_for_the_model_s():
    with pytest.raises(TypeError, match="methods"):
        evaluate(wrapped(), [], metods=("attention",))
