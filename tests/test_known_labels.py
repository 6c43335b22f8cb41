"""What a label may be: those that are not known have no say, and what is no label is one sentence, in good time."""

import json
import math

import numpy as np
import pytest
import torch
from test_trainer import CLASSES, arguments, assert_same, history, images, tiny_vit, trained, trainer_of, wrapped
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers import ViTImageProcessorPil as Processor

from shapadapter import Augmented, ClassNotFoundError, ImageError, ShapleyError, ShapleyTrainer, evaluate, explain

datasets = pytest.importorskip("datasets")

NAN = math.nan


def rows(labels, column="label"):
    return [{"image": row["image"], column: label} for row, label in zip(images(len(labels)), labels, strict=True)]


def prepared(labels):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(labels), 3, 32, 32, generator=generator)
    return [{"pixel_values": one, "label": label} for one, label in zip(pixels, labels, strict=True)]


class Torch(Dataset):
    def __init__(self, listed):
        self.listed = listed

    def __len__(self):
        return len(self.listed)

    def __getitem__(self, index):
        return self.listed[index]


class Folder(Torch):
    """As torchvision has it: pairs, names of classes and all labels."""

    def __init__(self, labels, classes=("red", "green", "blue"), transform=lambda image: image):
        super().__init__(
            [(transform(row["image"]), label) for row, label in zip(images(len(labels)), labels, strict=True)]
        )
        self.classes, self.targets = list(classes), labels


class Stream(IterableDataset):
    def __init__(self, listed):
        self.listed = listed

    def __iter__(self):
        return iter(self.listed)


# -- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_labels_that_are_not_known_are_not_in_the_loss(several):
    base = tiny_vit(problem_type="multi_label_classification" if several else None)
    model = wrapped(base=base).eval()
    pixels = torch.randn(3, 3, 32, 32)
    labels = torch.tensor([[1, NAN, 0], [-1, -100, 1], [NAN, NAN, NAN]] if several else [2, -1, -100])
    output = model(pixel_values=pixels, labels=labels)
    if several:
        losses = F.binary_cross_entropy_with_logits(output.logits, labels.clamp(0, 1).nan_to_num(), reduction="none")
        expected = (losses[0, 0] + losses[0, 2] + losses[1, 2]) / 3
    else:
        expected = F.cross_entropy(output.logits[:1], labels[:1])
    torch.testing.assert_close(output.loss, expected)
    nothing = model(pixel_values=pixels, labels=torch.full_like(labels, -1)).loss
    assert nothing.item() == 0
    nothing.backward()
    assert all(not value.grad.any() for value in model.parameters() if value.grad is not None)


def test_quantities_below_zero_are_known():
    model = wrapped(1).eval()
    output = model(pixel_values=torch.randn(3, 3, 32, 32), labels=torch.tensor([-1.0, -100.0, NAN]))
    expected = F.mse_loss(output.logits[:2, 0], torch.tensor([-1.0, -100.0]))
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("label", [3, -2])
def test_the_model_itself_refuses_what_is_no_class(label):
    with pytest.raises(ShapleyError, match=rf"class from 0 to 2.*got {label}.*row of the batch 1"):
        wrapped()(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, label]))


# -- training --------------------------------------------------------------------------------------------------------


def stepped(folder, labels, batch, model=None, **options):
    """What one step over all rows makes of the weights."""
    usual = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "shapley_weight": 0.0, "max_steps": 1}
    usual |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": len(labels) // batch}
    usual |= {"head_learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = trainer_of(folder, model or wrapped(), train=prepared(labels), **{**usual, **options})
    trainer.train()
    return trainer


SEVERAL = [[1, 0, NAN], [NAN] * 3, [1, 1, 0], [-1, 0, 1], [0, -100, 1], [NAN] * 3, [NAN] * 3, [0, 1, 1]]


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2, "class_weights": [1.0, 2.0, 0.5]}])
def test_micro_batches_add_up_where_labels_are_not_known(tmp_path, options):
    labels = [0, -1, 2, 1, None, -100, NAN, 0]
    whole, parts = (stepped(tmp_path, labels, batch, **options) for batch in (8, 2))
    assert_same(trained(whole.model), trained(parts.model), atol=2e-6, rtol=0)
    assert history(whole)[0]["task_loss"] == pytest.approx(history(parts)[0]["task_loss"], rel=1e-5)


def test_micro_batches_of_several_labels_add_up(tmp_path):
    whole, parts = (stepped(tmp_path, SEVERAL, batch) for batch in (8, 2))
    assert_same(trained(whole.model), trained(parts.model), atol=2e-6, rtol=0)
    assert all(value.isfinite().all() for value in trained(whole.model).values())
    assert whole.model.config.problem_type == "multi_label_classification"


def test_rows_without_a_label_change_nothing_in_the_task(tmp_path):
    """Without the Shapley loss: the known rows alone give the same weights."""
    labels = [0, 1, 2, 0]
    known = prepared(labels)
    more = [{**row, "label": None} for row in prepared([0] * 8)[4:]]
    fits = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "head_learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "shapley_weight": 0.0,
    }
    fits |= {"max_steps": 1, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "warmup_steps": 0}
    one, other = (trainer_of(tmp_path, wrapped(), train=data, **fits) for data in (known, known + more))
    for trainer in (one, other):
        trainer.train()
    assert_same(trained(one.model), trained(other.model), atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"coalition_task_weight": 0.5}])
def test_mixed_pictures_and_coalitions_know_it_too(tmp_path, options):
    trainer = stepped(tmp_path, [0, -1, 2, 1, None, -100, NAN, 0], 4, max_steps=3, shapley_weight=1.0, **options)
    assert all(math.isfinite(logs["task_loss"]) and logs["task_loss"] > 0 for logs in history(trainer))


def test_a_csv_with_holes(tmp_path):
    floats = [0.0, NAN, 2.0, 1.0]
    one, other = (stepped(tmp_path, labels, 4) for labels in (floats, [0, -1, 2, 1]))
    assert_same(trained(one.model), trained(other.model), atol=0, rtol=0)


# -- what is no label ------------------------------------------------------------------------------------------------


NO_LABELS = {
    "text": (["red", "green", "blue", "red"], "got 'red'.*row 0.*class_encode_column"),
    "list": ([0, [1], 2, 0], r"got 0 \(row 0, column 'label'\)"),
    "lists": ([[0], [1], [2], [0]], r"got \[0\].*row 0.*number, not a list"),
    "half": ([0, 1.5, 2, 0], r"class from 0 to 2.*got 1\.5 \(row 1, column 'label'\)"),
    "beyond": ([0, 1, 2, 3], r"class from 0 to 2.*got 3 \(row 3, column 'label'\)"),
    "below": ([0, 1, -2, 0], r"got -2 \(row 2, column 'label'\)"),
    "not hot": ([[0, 1, 0], [0, 2, 0]], r"zeros and ones.*got \[0, 2, 0\] \(row 1"),
    "short": ([[0, 1], [0, 1]], r"each of 3 classes.*got \[0, 1\] \(row 0"),
    "huge": ([0, 10**400, 1, 2], r"got 1000.*\(row 1"),
    "infinite": ([0, math.inf, 1, 2], r"got inf \(row 1"),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_what_is_no_label_is_said_before_the_first_step(tmp_path, kind):
    labels, said = NO_LABELS[kind]
    trainer = trainer_of(tmp_path, train=rows(labels))
    with pytest.raises(ShapleyError, match=said) as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    assert "\n" not in str(caught.value)


def test_several_data_sets_are_evaluated_by_name(tmp_path):
    parts = {"seen": images(4), "unseen": images(4)}
    trainer = trainer_of(tmp_path, held_out=parts)
    found = trainer.evaluate()
    assert {"eval_seen_loss", "eval_unseen_loss"} <= set(found)
    trainer.eval_dataset["unseen"] = rows([0, 1, 2, 7])
    with pytest.raises(ShapleyError, match=r"got 7 \(row 3"):
        trainer.evaluate()


def test_columns_of_data_sets_subsets_and_folders_are_read(tmp_path):
    beyond = [0, 1, 2, 3]
    table = images(4, beyond)
    for data in (
        table,
        table.select([3, 2]).map(lambda row: row),
        Augmented(table, lambda image: image),
        Subset(table, [1, 3]),
        Folder(beyond),
    ):
        with pytest.raises(ShapleyError, match=r"got 3 \(row \d, column 'label'\)"):
            trainer_of(tmp_path, train=data).train()


def test_streams_and_data_sets_of_torch_are_refused_at_the_row(tmp_path):
    listed = rows([0, 1, 2, 3])
    with pytest.raises(ShapleyError, match=r"got 3 \(row 3, column 'label'\)"):
        trainer_of(tmp_path, train=Torch(listed), per_device_train_batch_size=1, max_steps=8).train()
    with pytest.raises(ShapleyError, match=r"got 3 \(column 'label'\)"):
        trainer_of(tmp_path, train=Stream(listed)).train()


def test_labels_of_another_collator_are_looked_at_too(tmp_path):
    def collate(listed):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in listed]),
            "labels": torch.tensor([int(row["label"]) for row in listed]),
        }

    with pytest.raises(ShapleyError, match="got 7"):
        trainer_of(tmp_path, train=prepared(["7", "0"]), data_collator=collate).train()
    trainer_of(tmp_path, train=prepared(["-1", "0"]), data_collator=collate).train()


@pytest.mark.parametrize("label", [-1, -100, None, NAN])
def test_rows_without_a_label_are_predicted_and_evaluated(tmp_path, label):
    def share(evaluation):
        return {
            "right": float((evaluation.predictions.argmax(-1) == evaluation.label_ids).mean()),
            "of": len(evaluation.label_ids),
        }

    trainer = trainer_of(tmp_path, compute_metrics=share)
    output = trainer.predict(rows([label] * 5))
    assert output.predictions.shape == (5, CLASSES)
    assert output.label_ids.tolist() == [-100] * 5
    assert not {"test_task_loss", "test_right"} & output.metrics.keys()
    half, known = (
        trainer.evaluate(rows([0, label, 2, label])),
        trainer.evaluate([rows([0, 1, 2])[index] for index in (0, 2)]),
    )
    assert half["eval_of"] == 2
    assert half["eval_right"] == known["eval_right"]
    assert half["eval_task_loss"] == pytest.approx(known["eval_task_loss"], rel=1e-5)
    assert half["eval_loss"] == pytest.approx(half["eval_task_loss"] + 10 * half["eval_shapley_loss"], rel=1e-5)


SMALL = {"images": 2, "truth_evaluations": 256, "budgets": (16,), "methods": (), "progress": False}


@pytest.mark.usefixtures("quick_evaluation")
def test_evaluate_counts_what_is_known():
    model, processor = wrapped(), Processor(size={"height": 32, "width": 32})
    known, some = rows([0, 1, 2]), rows([0, 1, 2])
    found = evaluate(model, [*some, {**some[0], "label": None}], processor, **SMALL).task
    expected = evaluate(model, known, processor, **SMALL).task
    assert found["accuracy"].count == 3
    assert found["cross_entropy"].mean == pytest.approx(expected["cross_entropy"].mean)
    assert found["efficiency_gap"].count == 4
    assert "accuracy" not in evaluate(model, rows([-1, -1]), processor, **SMALL).task
    with pytest.raises(ShapleyError, match=r"got 3 \(row 1, column 'label'\)"):
        evaluate(model, rows([0, 3]), processor, **SMALL)


# -- a vote without labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list, Torch])
def test_a_vote_without_labels_is_not_trained(tmp_path, form):
    data = form(rows([0, 1, 2], "fine_label"))
    said = r"'labels' or 'label' or 'cls', got \['fine_label', 'image'\].*rename_column\('fine_label', 'label'\)"
    trainer = trainer_of(tmp_path, train=data)
    with pytest.raises(ShapleyError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer_of(tmp_path, wrapped(prediction="classifier"), train=data).train()


def test_streams_and_other_collators_without_labels(tmp_path):
    stream = Stream(rows([0, 1, 2], "target"))
    with pytest.raises(ShapleyError, match="vote' learns the classes from labels"):
        trainer_of(tmp_path, train=stream).train()
    with pytest.raises(ShapleyError, match="none of the 3 labels in the column 'label' is known"):
        trainer_of(tmp_path, train=rows([None, -1, NAN])).train()


def test_label_names_say_which_column(tmp_path):
    listed = rows([0, 1, 2], "fine_label")
    trainer = trainer_of(tmp_path, train=listed, held_out=listed, label_names=["fine_label"])
    trainer.train()
    assert "task_loss" in history(trainer)[0]
    assert "eval_task_loss" in trainer.evaluate()
    plain = trainer_of(tmp_path, train=rows([0, 1, 2]))
    plain.train()
    assert_same(trained(trainer.model), trained(plain.model), atol=0, rtol=0)


# -- a loss that is not finite ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    data = prepared([0, 1, 2, 0])
    data[2]["pixel_values"][0, 0, 0] = NAN
    trainer = trainer_of(tmp_path, train=data, per_device_train_batch_size=4)
    before = trained(trainer.model)
    with pytest.raises(ShapleyError, match=r"loss of step 1 is not finite, because pixel_values hold NaN"):
        trainer.train()
    assert_same(before, trained(trainer.model), atol=0, rtol=0)
    trainer = trainer_of(tmp_path, train=prepared([0, 1, 2, 0]))
    with torch.no_grad():
        next(value for value in trainer.model.parameters() if value.requires_grad).fill_(NAN)
    with pytest.raises(ShapleyError, match="because weights are not"):
        trainer.train()


# -- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [{1: "ant", 2: "bee", 3: "cat"}, {0: "ant", 2: "bee", 5: "cat"}, {0: "a", 1: "b", 2: "c", 3: "d"}, {"x": "a"}],
)
def test_names_of_other_classes_are_refused_at_wrapping(names):
    base = tiny_vit()
    base.config.__dict__["id2label"] = names
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ShapleyError, match=r"id2label to name the 3 classes of the model by the indices 0 to 2, got"):
        wrapped(base=base)
    assert [name for name, _ in base.named_modules()] == before


def test_names_by_indices_in_letters():
    base = tiny_vit()
    base.config.id2label = {"2": "cat", "0": "ant", "1": "bee"}
    model = wrapped(base=base)
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    model.config.id2label = {"0": "x", "1": "y", "2": "z"}  # afterwards
    assert explain(model, torch.randn(1, 3, 32, 32)).labels == ("x", "y", "z")
    model.config.id2label = {0: "x", 5: "y"}
    with pytest.raises(ShapleyError, match="0 to 2, got those of 0, 5"):
        explain(model, torch.randn(1, 3, 32, 32))


def test_other_numbers_of_classes_are_said_at_once(tmp_path):
    names = ["ant", "bee", "cat", "dog"]
    table = images(4, [0, 1, 2, 3]).cast_column("label", datasets.ClassLabel(names=names))
    with pytest.raises(ShapleyError, match=r"'label' has 4 classes, the model 10 without names.*id2label="):
        trainer_of(tmp_path, wrapped(10), train=table)
    with pytest.raises(ShapleyError, match="'label' has 3 classes, the model 10"):
        trainer_of(tmp_path, wrapped(10), train=Folder([0, 1, 2]))
    trainer = trainer_of(tmp_path, wrapped(4), train=table)
    trainer.save_model()
    assert list(trainer.model.config.id2label.values()) == names
    assert json.loads((tmp_path / "adapter_config.json").read_text())["id2label"]["3"] == "dog"


# -- pairs, splits and targets ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_evaluation")
def test_pairs_are_rows(tmp_path):
    folder, listed = Folder([0, 1, 2, 0, 1, 2]), rows([0, 1, 2, 0, 1, 2])
    one, other = (trainer_of(tmp_path, train=data, held_out=data) for data in (folder, listed))
    for trainer in (one, other):
        trainer.train()
    assert_same(trained(one.model), trained(other.model), atol=0, rtol=0)
    assert list(one.model.config.id2label.values()) == ["red", "green", "blue"]
    assert one.evaluate()["eval_task_loss"] == pytest.approx(other.evaluate()["eval_task_loss"])
    found, expected = (evaluate(one.model, data, one.processing_class, **SMALL) for data in (folder, listed))
    assert repr(found.task) == repr(expected.task)  # NaN is not itself
    assert Augmented(folder, lambda image: image.rotate(90))[1]["label"] == 1


def test_pairs_in_another_order_than_the_model(tmp_path):
    base = wrapped()
    base.config.id2label = {0: "blue", 1: "green", 2: "red"}
    for data in (Folder([0, 1, 2]), Subset(Folder([2, 0, 1, 2]), [1, 2, 3])):
        trainer = trainer_of(tmp_path, base, train=data)
        (batch,) = trainer.get_train_dataloader()
        assert sorted(batch["labels"].tolist()) == [0, 1, 2]
        assert [trainer.train_dataset[index]["label"] for index in range(3)] == [2, 1, 0]


def test_floats_of_a_transform_are_ready(tmp_path):
    def ready(image):
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.5

    one, other = (trainer_of(tmp_path, train=data) for data in (Folder([0, 1, 2], transform=ready), rows([0, 1, 2])))
    for trainer in (one, other):
        trainer.train()
    assert_same(trained(one.model), trained(other.model), atol=1e-4, rtol=0)
    halves = Folder([0, 1, 2], transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    with pytest.raises(ImageError, match=r"from 0 to 1: end the transform with Normalize\(\[0\.5, "):
        trainer_of(tmp_path, train=halves).train()


def test_other_rows_are_refused(tmp_path):
    with pytest.raises(ShapleyError, match=r"dicts .* or as pairs \(image, label\), got a tuple of 3"):
        trainer_of(tmp_path, train=Torch([(1, 2, 3)] * 4)).train()


def test_splits_are_not_a_data_set(tmp_path):
    splits = datasets.DatasetDict({"train": images(4), "test": images(4)})
    said = r"got the splits \['train', 'test'\]: choose one, e\.g\. dataset\['train'\]"
    with pytest.raises(ShapleyError, match=said):
        trainer_of(tmp_path, train=splits)
    with pytest.raises(ShapleyError, match=said):
        trainer_of(tmp_path).predict(splits)
    assert "eval_test_loss" in trainer_of(tmp_path).evaluate(splits)


@pytest.mark.parametrize(
    "one", [np.int64(2), torch.tensor(2), np.array([2]), torch.tensor([2]), (np.int32(2),), "LABEL_2"]
)
def test_targets_of_numpy_and_torch(one):
    model = wrapped()
    assert explain(model, torch.randn(2, 3, 32, 32), targets=one).classes.tolist() == [[2], [2]]
    for wrong in (np.int64(3), 1.5, np.array([0.5])):
        with pytest.raises(ClassNotFoundError, match=r"the classes are 0\.\.2"):
            explain(model, torch.randn(1, 3, 32, 32), targets=wrong)


# -- models made by a function ---------------------------------------------------------------------------------------


def test_model_init(tmp_path):
    names = ["ant", "bee", "cat"]
    table = images(6).cast_column("label", datasets.ClassLabel(names=names))
    made = []

    def make(trial):
        made.append(wrapped())
        return made[-1]

    trainer = ShapleyTrainer(
        None,
        arguments(tmp_path),
        model_init=make,
        train_dataset=table,
        eval_dataset=table,
        processing_class=Processor(size={"height": 32, "width": 32}),
    )
    assert len(made) == 1
    trainer.train()
    assert len(made) == 2
    assert trainer.layer is made[1].get_base_model().shapley
    assert list(made[1].config.id2label.values()) == names
    assert trainer.model is made[1]
    assert len(history(trainer)) == 3
    assert "eval_task_loss" in trainer.evaluate()
    with pytest.raises(ShapleyError, match="active Shapley adapter"):
        ShapleyTrainer(None, arguments(tmp_path), model_init=lambda: tiny_vit(), train_dataset=table)


# -- images that cannot be used --------------------------------------------------------------------------------------


def test_files_are_looked_at_before_the_first_step(tmp_path):
    listed = rows([0, 1, 2, 0] * 4)
    for index, row in enumerate(listed):
        row["image"].save(tmp_path / f"{index}.png")
        row["image"] = str(tmp_path / f"{index}.png")
    (tmp_path / "14.png").write_bytes(b"no image")
    table = datasets.Dataset.from_list(listed).cast_column("image", datasets.Image())
    for data in (listed, table, Subset(table, range(16))):
        trainer = trainer_of(tmp_path, train=data, max_steps=1, seed=3)
        with pytest.raises(ImageError, match=r"14\.png.*\(row 14, class 'LABEL_2'\).*corrupt_images='skip'"):
            trainer.train()
        assert trainer.state.global_step == 0
    skipping = trainer_of(tmp_path, train=table, max_steps=4, corrupt_images="skip")
    with pytest.warns(UserWarning, match=r"14\.png.*left out"):
        skipping.train()
    assert sum(logs["skipped_images"] for logs in history(skipping)) == 1


def test_an_array_that_is_no_image_is_named_and_left_out(tmp_path):
    listed = [{"image": np.asarray(row["image"]), "label": row["label"]} for row in rows([0, 1, 2, 0])]
    listed[2]["image"] = np.zeros((32, 32, 7), dtype=np.uint8)
    with pytest.raises(ImageError, match=r"shape \(32, 32, 7\).*\(row 2, class 'LABEL_2'\)"):
        trainer_of(tmp_path, train=listed).train()
    trainer = trainer_of(tmp_path, train=listed, max_steps=1, corrupt_images="skip")
    with pytest.warns(UserWarning, match="row 2"):
        trainer.train()
    assert history(trainer)[0]["skipped_images"] == 1
