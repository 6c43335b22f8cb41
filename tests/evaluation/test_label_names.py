"""Classes are the same if their names are: a data set may number them in another order than the model."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from small import NAMES, SMALL, processor, rows_of, wrapped

from shapadapter import Evaluator, ShapleyError, ShapleyTrainer, ShapleyTrainingArguments, evaluate
from shapadapter.data.classes import as_model_counts

pytestmark = pytest.mark.usefixtures("quick_evaluation")

datasets = pytest.importorskip("datasets")
ORDER = ["dog", "ant", "cat", "bee"]


def dataset(names=ORDER, labels=None):
    """The rows of the other tests, in which the classes are numbered by their place among `names`."""
    rows = [{**row, "label": names.index(NAMES[row["label"]]) if labels is None else labels} for row in rows_of()]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list(rows, features=features)


def trainer(folder, data, evaluator=None, model=None):
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}
    return ShapleyTrainer(
        wrapped() if model is None else model,
        ShapleyTrainingArguments(str(folder), **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor(),
        evaluator=evaluator,
    )


def test_evaluate_maps_by_name():
    model = wrapped()
    expected = evaluate(model, rows_of(), processor(), methods=(), **SMALL)
    for names in (ORDER, [*ORDER[1:], "dog"], list(NAMES.values())):
        found = evaluate(model, dataset(names), processor(), methods=(), **SMALL)
        assert found.task["cross_entropy"] == expected.task["cross_entropy"]
        assert found.task["accuracy"] == expected.task["accuracy"]


def test_the_trainer_and_its_evaluator_map_by_name(tmp_path):
    evaluator = Evaluator(images=2, truth_evaluations=256, budgets=(16, 64))
    seen = {}

    def spy(model, data, collator):
        seen["labels"] = [row["label"] for row in data]
        return evaluator(model, data, collator)

    known = [row["label"] for row in rows_of()]
    found, expected = (trainer(tmp_path, data, spy) for data in (dataset(), rows_of()))
    for one in (found, expected):
        assert [row["label"] for row in one.train_dataset] == known
    metrics, right = found.evaluate(), expected.evaluate()
    assert metrics["eval_task_loss"] == pytest.approx(right["eval_task_loss"])
    assert metrics["eval_error"] == pytest.approx(right["eval_error"])
    assert seen["labels"] == known
    for name in ("evaluate", "predict"):  # sets that come later
        getattr(found, name)(dataset([*ORDER[1:], "dog"]))
        assert seen["labels"] == known, name
    found.evaluate({"one": dataset(), "two": dataset()})
    assert seen["labels"] == known
    found.train()
    assert torch.isfinite(torch.tensor(found.state.log_history[-1]["train_loss"]))


def test_the_evaluator_alone_maps_by_name():
    rows = dataset()
    assert [row["label"] for row in as_model_counts(rows, NAMES, "")] == [row["label"] for row in rows_of()]
    assert Evaluator(images=1, truth_evaluations=256, budgets=(16,))(wrapped(), rows, processor())


def test_a_part_of_the_classes_is_enough():
    part = ["cat", "dog"]
    rows = dataset(part, labels=1)
    assert [row["label"] for row in as_model_counts(rows, NAMES, "")] == [3] * 8


def test_other_classes_are_refused(tmp_path):
    rows = dataset(["ant", "bee", "cat", "wolf"], labels=0)
    with pytest.raises(ShapleyError, match=r"\['wolf'\].*no classes of the model.*cast_column"):
        evaluate(wrapped(), rows, processor(), methods=(), **SMALL)
    with pytest.raises(ShapleyError, match=r"\['wolf'\].*id2label=.*label2id="):
        trainer(tmp_path, rows)


def test_where_one_side_has_no_names_numbers_count(tmp_path):
    model, rows = wrapped(), dataset()
    model.get_base_model().config.id2label = {index: f"LABEL_{index}" for index in range(4)}
    assert trainer(tmp_path, rows, model=model).train_dataset is rows
    digits = dataset(["0", "1", "2", "3"], labels=1)
    assert as_model_counts(digits, NAMES, "") is digits
    unknown = dataset(labels=-1)
    assert as_model_counts(unknown, NAMES, "")[0]["label"] == -100


def test_a_stream_in_another_order_is_counted_as_the_model_counts():
    rows = dataset()
    counted, stream = (as_model_counts(one, NAMES, "") for one in (rows, rows.to_iterable_dataset(num_shards=2)))
    labels = [row["label"] for row in counted]
    assert labels != rows["label"]
    assert [row["label"] for row in stream] == labels
    assert [row["label"] for row in as_model_counts(stream, NAMES, "")] == labels  # and not a second time
    assert stream.num_shards == 2


def test_a_name_that_the_model_has_twice():
    class Rows(list):  # as a data set with named classes
        features: ClassVar = {"label": SimpleNamespace(names=["crane", "ant", "crane", "bee"])}

    rows = Rows({"label": index} for index in range(4))
    found = as_model_counts(rows, {0: "crane", 1: "bee", 2: "crane", 3: "ant"}, "")
    assert [row["label"] for row in found] == [0, 3, 2, 1]
