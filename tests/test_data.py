"""Data that does not fit, or is damaged, or changes with every look: streams, shards, corrupt images, augmentations."""

import errno
import io
import itertools
import json
import random
import shutil
import tarfile
import warnings
from functools import partial
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import zoo
from families import wrap
from PIL import Image
from test_trainer import (
    CLASSES,
    StopAt,
    arguments,
    assert_same,
    fixed_batch,
    gap,
    gradients,
    history,
    images,
    matcher_of,
    trained,
    trainer_of,
    wrapped,
)
from transformers import ViTImageProcessorPil as Processor

from shapadapter import Augmented, ImageError, ShapleyError, ShapleyTrainer
from shapadapter.core.errors import UnreadableImageError
from shapadapter.data.images import open_image
from shapadapter.data.rows import in_place, readable_rows
from shapadapter.evaluation.dataset import Rows
from shapadapter.training import ImageCollator
from shapadapter.training import script as example
from shapadapter.training.validation import mean_color

datasets = pytest.importorskip("datasets")


def processor():
    return Processor(size={"height": 32, "width": 32})


def file_of(picture, kind="PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def files(count=12, broken=(), kind="PNG") -> list[dict]:
    """Rows as `datasets` keeps them; the broken ones are cut off."""
    rows = []
    for index, row in enumerate(images(count)):
        content = file_of(row["image"], kind)
        content = content[: len(content) // 2] if index in broken else content
        rows.append({"image": {"bytes": content, "path": f"picture-{index}.png"}, "label": row["label"]})
    return rows


def table(rows):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def write_shards(folder, shards=2, broken=(), label="cls"):
    """Webdataset shards of 12 images, PNG and JPEG by turns."""
    rows = files(12)
    for number in range(shards):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as tar:
            for index in range(number * 12 // shards, (number + 1) * 12 // shards):
                content = rows[index]["image"]["bytes"]
                content = content[:60] if index in broken else content
                add_file(tar, f"{index:04d}.png", content)
                number_of = rows[index]["label"]
                text = json.dumps({"label": number_of}) if label == "json" else str(number_of)
                add_file(tar, f"{index:04d}.{label}", text.encode())
    return str(folder / "shard-*.tar")


def add_file(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shards(pattern, folder):
    options = {"data_files": pattern, "split": "train", "streaming": True, "cache_dir": str(folder / "cache")}
    return datasets.load_dataset("webdataset", **options)


class Numbers(torch.utils.data.IterableDataset):
    """A stream of torch, of prepared images that are their label."""

    def __init__(self, count=12):
        self.count = count

    def __iter__(self):
        for index in range(self.count):
            yield {"pixel_values": torch.full((3, 32, 32), index / self.count), "labels": index % CLASSES}


def accuracy(evaluation):
    right = evaluation.predictions.argmax(-1) == evaluation.label_ids
    return {"accuracy": float(right.mean()), "count": len(right)}


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_trains_and_is_evaluated_like_the_rows_themselves(tmp_path):
    rows = table(files())
    stream = rows.to_iterable_dataset(num_shards=2)
    trainer = trainer_of(tmp_path, train=stream, held_out=stream, max_steps=5, compute_metrics=accuracy)
    before = trained(trainer.model)
    trainer.train()  # 3 batches are a pass, then the stream begins again
    assert len(history(trainer)) == 5
    assert gap(before, trained(trainer.model)) > 0
    streamed, listed = trainer.evaluate(), trainer.evaluate(rows)
    for name in ("eval_loss", "eval_task_loss", "eval_shapley_loss", "eval_accuracy", "eval_count"):
        assert streamed[name] == pytest.approx(listed[name], rel=1e-5)
    assert streamed["eval_count"] == 12


def test_a_stream_of_unknown_length_asks_for_the_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        trainer_of(tmp_path, train=images().to_iterable_dataset(), max_steps=-1).train()


def test_classes_of_a_stream_are_found_by_name(tmp_path):
    base = wrapped()
    base.config.id2label = {0: "blue", 1: "green", 2: "red"}
    trainer = trainer_of(tmp_path, base, train=table(files(6)).to_iterable_dataset(), max_steps=1)
    (batch,) = itertools.islice(trainer.get_train_dataloader(), 1)
    assert batch["labels"].tolist() == [2, 1, 0, 2]
    nameless = images(6).to_iterable_dataset().map(lambda row: {"label": row["label"]})
    assert nameless.features is None
    trainer = trainer_of(tmp_path, base, train=nameless, max_steps=1)
    (batch,) = itertools.islice(trainer.get_train_dataloader(), 1)
    assert batch["labels"].tolist() == [0, 1, 2, 0]


def test_a_stream_of_torch_trains(tmp_path):
    trainer = trainer_of(tmp_path, train=Numbers(), held_out=Numbers(5), compute_metrics=accuracy)
    trainer.train()
    assert trainer.evaluate()["eval_count"] == 5


@pytest.mark.filterwarnings("error:The collator does not use")
def test_shards_of_webdataset_train(tmp_path):
    stream = shards(write_shards(tmp_path), tmp_path).shuffle(seed=0, buffer_size=6)
    trainer = trainer_of(tmp_path, train=stream, held_out=stream, max_steps=20, compute_metrics=accuracy)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1
    assert trainer.evaluate()["eval_count"] == 12


def test_labels_of_shards_in_json(tmp_path):
    stream = shards(write_shards(tmp_path, label="json", broken=[2]), tmp_path)
    stream = stream.cast_column("png", datasets.Image(decode=False))
    stream = stream.map(lambda row: {"label": row["json"]["label"]}, remove_columns="json")
    trainer = trainer_of(tmp_path, train=stream, corrupt_images="skip")
    with pytest.warns(UserWarning, match="0002.png"):
        batches = list(trainer.get_train_dataloader())
    assert [batch["labels"][batch["readable"]].tolist() for batch in batches] == [
        [0, 1, 0],
        [1, 2, 0, 1],
        [2, 0, 1, 2],
    ]


def test_rows_of_shards_by_their_columns():
    rows = [
        {"jpg": None, "png": file_of(row["image"]), "cls": row["label"], "__key__": "a", "__url__": "b"}
        for row in images(2)
    ]
    rows[0] |= {"jpg": rows[0]["png"], "png": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = ImageCollator(processor())(rows)
    assert torch.equal(batch["pixel_values"], ImageCollator(processor())(list(images(2)))["pixel_values"])
    assert batch["labels"].tolist() == [0, 1]


def test_workers_share_the_shards_of_a_stream(tmp_path):
    rows = [{**row, "label": index} for index, row in enumerate(files())]
    stream = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_iterable_dataset(num_shards=2)
    trainer = trainer_of(tmp_path, wrapped(12), train=stream, dataloader_num_workers=2)
    labels = [batch["labels"].tolist() for batch in trainer.get_train_dataloader()]
    assert sorted(itertools.chain(*labels)) == list(range(12))


def test_a_damaged_file_in_a_stream_is_named_or_left_out(tmp_path):
    stream = shards(write_shards(tmp_path, broken=[4]), tmp_path)
    with pytest.raises(
        UnreadableImageError, match=r"'0004.png'.*\(key 0004, class 'LABEL_1'\).*corrupt_images='skip'"
    ):
        trainer_of(tmp_path, train=stream).train()
    trainer = trainer_of(tmp_path, train=stream, held_out=stream, corrupt_images="skip", compute_metrics=accuracy)
    with pytest.warns(UserWarning, match=r"0004.png.* left out and counted as skipped_images"):
        trainer.train()
    assert sum(logs["skipped_images"] for logs in history(trainer)) == 1
    metrics = trainer.evaluate()
    assert (metrics["eval_skipped_images"], metrics["eval_count"]) == (1, 11)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_example_takes_any_split_and_explains_what_can_be_read(tmp_path, streaming):
    for index, row in enumerate(images(18)):
        split = ("train", "validation", "test")[index // 6]
        home = tmp_path / "photos" / split / ("red", "green", "blue")[row["label"]]
        home.mkdir(parents=True, exist_ok=True)
        row["image"].resize((8 + index // 6, 8)).save(home / f"{index}.png")
    (tmp_path / "photos" / "test" / "green" / "13.png").write_bytes(b"no image")
    args = example.ScriptArguments("unused", image_folder=str(tmp_path / "photos"), streaming=streaming)
    args.train_split = "validation"
    splits = example.load_images(args, seed=0)
    assert {image.width for image in example.readable(splits["train"])} == {9}
    assert [image.width for image in example.readable(splits["test"])] == [10] * 5


def test_a_small_folder_without_splits_keeps_one_of_each_class_for_testing(tmp_path):
    for index, row in enumerate(images(9)):
        home = tmp_path / ("red", "green", "blue")[row["label"]]
        home.mkdir(exist_ok=True)
        row["image"].save(home / f"{index}.png")
    splits = example.load_images(example.ScriptArguments("unused", image_folder=str(tmp_path)), seed=0)
    assert (len(splits["train"]), sorted(splits["test"]["label"])) == (6, [0, 1, 2])


def test_the_example_streams(tmp_path):
    for index, row in enumerate(images(12)):
        home = tmp_path / "photos" / ("train" if index < 9 else "test") / ("red", "green", "blue")[row["label"]]
        home.mkdir(parents=True, exist_ok=True)
        row["image"].save(home / f"{index}.png")
    args = {"model_name_or_path": "unused", "image_folder": str(tmp_path / "photos"), "streaming": True}
    (tmp_path / "photos" / "train" / "green" / "1.png").write_bytes(b"")
    splits = example.load_images(example.ScriptArguments(**args), seed=0)
    assert splits["train"].features["label"].names == ["blue", "green", "red"]
    assert (len(list(splits["train"])), len(list(splits["test"]))) == (9, 3)
    with pytest.warns(UserWarning, match="1.png.* left out"):
        trainer_of(tmp_path, train=splits["train"], corrupt_images="skip").train()
    shutil.rmtree(tmp_path / "photos" / "test")
    (tmp_path / "photos" / "train" / "green" / "1.png").unlink()
    splits = example.load_images(example.ScriptArguments(**args), seed=0)  # a fifth of each class is held out
    assert (len(list(splits["train"])), sorted(row["label"] for row in splits["test"])) == (5, [0, 1, 2])
    with pytest.raises(ShapleyError, match="no split 'test'; there are train"):
        example.load_images(example.ScriptArguments(**args, test_split="test"), seed=0)


# -- corrupt images --------------------------------------------------------------------------------------------------


def as_paths(rows, folder):
    for row in rows:
        (folder / row["image"]["path"]).write_bytes(row["image"]["bytes"])
    return [{**row, "image": folder / row["image"]["path"]} for row in rows]


def as_open_files(rows, folder):
    """PIL images that have read no pixel yet."""
    return [{**row, "image": Image.open(row["image"])} for row in as_paths(rows, folder)]


def through_a_transform(rows, folder):
    prepare = processor()
    return table(rows).with_transform(
        lambda some: {**some, "pixel_values": list(prepare(some["image"], return_tensors="pt")["pixel_values"])}
    )


SOURCES = {
    "content": lambda rows, folder: rows,
    "paths": as_paths,
    "open": as_open_files,
    "table": lambda rows, folder: table(rows),
    "transform": through_a_transform,
    "augmented": lambda rows, folder: Augmented(table(rows), lambda image: image),
    "augmented paths": lambda rows, folder: Augmented(as_paths(rows, folder), ready),
}


def ready(image):
    return torch.from_numpy(np.asarray(image)).permute(2, 0, 1).float() / 127.5 - 1  # (H, W, 3) -> (3, H, W)


@pytest.mark.filterwarnings("ignore:The collator does not use")
@pytest.mark.parametrize("source", SOURCES)
def test_a_corrupt_image_is_named_with_row_file_and_class(tmp_path, source):
    rows = SOURCES[source](files(6, broken=[4]), tmp_path)
    base = wrapped()
    base.config.id2label = {0: "red", 1: "green", 2: "blue"}
    loader = trainer_of(tmp_path, base, train=rows).get_train_dataloader()
    said = r"picture-4.png'.*truncated.*\(row 4, class 'green'\)\. .*corrupt_images='skip' .* --corrupt-images skip"
    with pytest.raises(UnreadableImageError, match=said):
        list(loader)


@pytest.mark.filterwarnings("ignore:The collator does not use")
@pytest.mark.parametrize("source", SOURCES)
def test_skipped_images_leave_the_others_as_they_are(tmp_path, source):
    rows = SOURCES[source](files(6, broken=[1, 4]), tmp_path)
    trainer = trainer_of(tmp_path, held_out=rows, corrupt_images="skip", per_device_eval_batch_size=2)
    trainer.compute_metrics = None
    with pytest.warns(UserWarning, match=r"picture-1.png.*row 1"):
        output = trainer.predict(rows)
    whole = trainer_of(tmp_path, trainer.model).predict(images(6))
    broken = np.isin(np.arange(6), [1, 4])
    assert np.isnan(output.predictions[broken]).all()
    assert output.label_ids[broken].tolist() == [-100, -100]
    np.testing.assert_allclose(output.predictions[~broken], whole.predictions[~broken], atol=1e-5)
    assert output.label_ids[~broken].tolist() == whole.label_ids[~broken].tolist()
    assert output.metrics["test_skipped_images"] == 2


def test_a_transform_sees_whole_batches_even_of_guarded_rows(tmp_path):
    counts = []

    def note(rows):
        counts.append(len(rows["image"]))
        return rows

    plain = trainer_of(tmp_path, train=table(files(8)).with_transform(note))
    assert [len(batch["labels"]) for batch in plain.get_train_dataloader()] == counts == [4, 4]
    damaged = table(files(8, broken=[5])).with_transform(note)
    counts.clear()
    trainer = trainer_of(tmp_path, train=damaged, corrupt_images="skip")
    with pytest.warns(UserWarning, match="picture-5.png"):
        batches = list(trainer.get_train_dataloader())
    assert sorted(int(batch["readable"].sum()) for batch in batches) == [3, 4]
    assert 4 in counts  # the rows beside the damaged one come one by one


def test_metrics_are_of_the_readable_images(tmp_path):
    readable = [row for index, row in enumerate(files(9)) if index not in (0, 2, 3, 7)]
    options = {"per_device_eval_batch_size": 2, "compute_metrics": accuracy, "shapley_weight": 0.0}
    trainer = trainer_of(tmp_path, held_out=table(files(9, broken=[0, 2, 3, 7])), corrupt_images="skip", **options)
    with pytest.warns(UserWarning, match="left out"):
        skipped = trainer.evaluate()
    plain = trainer_of(tmp_path, trainer.model, held_out=table(readable), **options).evaluate()
    assert skipped["eval_count"] == 5
    assert skipped["eval_accuracy"] == plain["eval_accuracy"]
    for name in ("eval_task_loss", "eval_loss"):
        assert skipped[name] == pytest.approx(plain["eval_task_loss"], rel=1e-5)


def classes_alone(scores, labels):
    return scores.argmax(dim=-1)


def classes_beside(scores, labels):
    return scores, scores.argmax(dim=-1)


@pytest.mark.parametrize("preprocess", [None, classes_alone, classes_beside])
@pytest.mark.parametrize("option", [None, "batch_eval_metrics", "eval_do_concat_batches"])
def test_metrics_of_every_form_are_of_the_readable_images(tmp_path, preprocess, option):
    seen = []

    def metrics(evaluation, compute_result=True):
        found = [evaluation.predictions, evaluation.label_ids, evaluation.inputs]
        seen.extend(zip(*found, strict=True) if isinstance(found[1], list) else [found])
        return {"count": sum(len(labels) for _, labels, _ in seen)} if compute_result else {}

    trainer = ShapleyTrainer(
        wrapped(),
        arguments(
            tmp_path,
            corrupt_images="skip",
            per_device_eval_batch_size=2,
            include_for_metrics=["inputs"],
            **({} if option is None else {option: option == "batch_eval_metrics"}),
        ),
        eval_dataset=table(files(9, broken=[0, 2, 3, 7])),
        processing_class=processor(),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=preprocess,
    )
    with pytest.warns(UserWarning, match="left out"):
        assert trainer.evaluate()["eval_count"] == 5
    for scores, labels, inputs in seen:
        parts = scores if isinstance(scores, tuple) else (scores,)
        pixels = inputs["pixel_values"] if isinstance(inputs, dict) else inputs
        assert {len(part) for part in (*parts, pixels)} == {len(labels)}
        assert (labels >= 0).all()


def test_a_damaged_image_that_only_fills_up_a_batch_is_not_counted(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, corrupt_images="skip")
    monkeypatch.setattr("shapadapter.training.trainer.without_repeats", lambda inputs, accelerator: (inputs, False))
    with pytest.warns(UserWarning, match="left out"):
        assert trainer.evaluate(table(files(2, broken=[0])))["eval_skipped_images"] == 0


def test_the_readable_images_of_a_batch_teach_what_they_teach_alone(tmp_path):
    trainer = trainer_of(tmp_path, shapley_warmup=0.0, coalition_task_weight=0.5, corrupt_images="skip")
    batch = fixed_batch(trainer)
    readable = torch.tensor([True, False, True, True, True, False, True, True])
    few = gradients(trainer, {**batch, "readable": readable})
    sizes = {"coalition_sizes": (6, 10)}
    alone = gradients(trainer, {name: value[readable] for name, value in batch.items()} | sizes)
    assert_same({name: 6 / 8 * value for name, value in alone.items()}, few, atol=1e-6, rtol=1e-4)
    # So a batch of 8 is the mean of two of 4, however the damaged ones fall.
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(4), slice(4, 8))]
    parts = [gradients(trainer, {**half, "readable": readable[i * 4 :][:4]}) for i, half in enumerate(halves)]
    assert_same(few, {name: (value + parts[1][name]) / 2 for name, value in parts[0].items()}, atol=1e-6, rtol=1e-4)


def test_a_batch_without_a_readable_image_takes_part_and_has_no_say(tmp_path):
    trainer = trainer_of(tmp_path, shapley_warmup=0.0, corrupt_images="skip")
    batch = {**fixed_batch(trainer), "readable": torch.zeros(8, dtype=torch.bool)}
    found = gradients(trainer, batch)
    assert found.keys() == trained(trainer.model).keys()  # as the other processes wait for
    assert all(not gradient.any() for gradient in found.values())
    assert "task_loss" not in {name for name, sums in trainer.monitor.sums["train"].items() if sums.any()}
    with pytest.raises(ImageError, match=r"None of 8 images could be read"):
        trainer.monitor.means("train")


def test_the_stand_in_has_the_shape_of_the_others():
    collate = ImageCollator(processor(), corrupt_images="skip")
    with pytest.warns(UserWarning, match="left out"):
        batch = collate(files(2, broken=[0, 1]))
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["readable"].tolist() == [False, False]
    batch = collate(files(3, broken=[0]))
    assert batch["readable"].tolist() == [False, True, True]
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    inputs, read, count = readable_rows(batch)
    assert (inputs.keys(), read, count) == ({"pixel_values", "labels"}, 2, 3)
    assert inputs["labels"].tolist() == [1, 2]


def test_predictions_return_to_their_places():
    readable = torch.tensor([False, True, True])
    logits, labels = in_place(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5], [1.0], [2.0]]), readable)
    assert logits[1:].tolist() == [[1, 2], [3, 4]]
    assert logits[0].isnan().all()
    assert labels[0].isnan().all()
    assert labels[1:].tolist() == [[1], [2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_skip_count_and_warn_once(tmp_path, workers):
    def note(message, *_):
        with Path(tmp_path, "said").open("a") as said:  # workers, too, write there
            said.write(str(message))

    rows = table(files(12, broken=[1, 5, 8]))
    trainer = trainer_of(tmp_path, train=rows, corrupt_images="skip", dataloader_num_workers=workers, logging_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        trainer.train()
        trainer.evaluate(rows)
    assert history(trainer)[0]["skipped_images"] == 3
    assert Path(tmp_path, "said").read_text().count("left out and counted") == 1


def test_a_worker_names_the_row(tmp_path):
    rows = table(files(4, broken=[2]))
    trainer = trainer_of(tmp_path, train=rows, dataloader_num_workers=1)
    with pytest.raises(UnreadableImageError, match=r"picture-2.png'.*row 2, class 'blue'"):
        list(trainer.get_train_dataloader())


def test_nothing_is_skipped_where_nothing_can_be_read(tmp_path):
    trainer = trainer_of(tmp_path, train=table(files(4, broken=range(4))), corrupt_images="skip")
    with pytest.raises(ImageError, match="None of the 4 images"):
        trainer.train()
    stream = table(files(4, broken=range(4))).to_iterable_dataset()
    trainer = trainer_of(tmp_path, train=stream, corrupt_images="skip")
    with pytest.raises(ImageError, match="None of 4 images"), pytest.warns(UserWarning, match="left out"):
        trainer.train()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_fault_of_the_machine_is_no_fault_of_the_image(tmp_path, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, "trouble")

    rows = as_paths(files(2), tmp_path)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match="trouble") as caught:
        ImageCollator(processor(), corrupt_images="skip")(rows)
    assert not isinstance(caught.value, UnreadableImageError)


def test_an_evaluator_looks_at_the_next_image_instead(tmp_path):
    found = []

    def evaluator(model, dataset, collator):
        found.extend(Rows(dataset, collator).batch([index]).inputs["pixel_values"] for index in (3, 4, 5))
        return {}

    for rows in (table(files(6, broken=[4])), as_paths(files(6, broken=[4]), tmp_path)):
        trainer = trainer_of(tmp_path, held_out=rows, corrupt_images="skip")
        trainer.evaluator = evaluator
        with pytest.warns(UserWarning, match="left out"):
            trainer.evaluate()
    for three in (found[:3], found[3:]):
        assert torch.equal(three[1], three[2])
        assert not torch.equal(three[0], three[1])


def test_the_mean_colour_is_that_of_the_readable_images(tmp_path):
    model = wrap(zoo.base("resnet"), trained=False)
    rows = [{"image": file_of(Image.new("RGB", (64, 64), (255, 0, 51))), "label": 0}] * 3 + [
        {"image": b"", "label": 0}
    ]
    prepare = Processor(size={"height": 64, "width": 64})
    with pytest.warns(UserWarning, match="left out"):
        color = mean_color(rows, ImageCollator(prepare, corrupt_images="skip"))
    assert color == pytest.approx([1, -1, -0.6], abs=1e-5)
    rows = table(files(4, broken=[0])).cast_column("label", datasets.Value("int64"))
    trainer = trainer_of(tmp_path, model, rows, corrupt_images="skip", max_steps=1)
    trainer.data_collator.processor = prepare
    with pytest.warns(UserWarning, match="left out"):
        trainer.train()
    assert np.isfinite(model.peft_config["default"].fill_color).all()


def test_pairs_of_images_and_texts_are_skipped_together(tmp_path):
    rows = [{"image": row["image"], "text": f"{index} one"} for index, row in enumerate(files(6, broken=[2]))]
    trainer = matcher_of(tmp_path, train=rows, held_out=rows, corrupt_images="skip", shapley_warmup=0.0)
    with pytest.warns(UserWarning, match="left out"):
        trainer.train()
    with_fault = trainer.evaluate()
    rows.pop(2)
    assert with_fault["eval_task_loss"] == pytest.approx(trainer.evaluate(rows)["eval_task_loss"], rel=1e-5)


def test_skipping_needs_our_collator(tmp_path):
    for collator in (ImageCollator(processor()), lambda rows: {}):
        with pytest.raises(ShapleyError, match="corrupt_images='skip' needs"):
            trainer_of(tmp_path, data_collator=collator, corrupt_images="skip")


# -- augmentations ---------------------------------------------------------------------------------------------------


def jitter(image):
    """A transform that draws from all three generators."""
    noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
    return ready(image) + noise


def seen(dataset, epochs=2, **options) -> torch.Tensor:
    """What a loader shows in each epoch, (epochs, rows)."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=ImageCollator(), **options)
    looks = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        looks.append(torch.cat([batch["pixel_values"].mean(dim=(1, 2, 3)) for batch in loader]))
    return torch.stack(looks)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_row_looks_the_same_whoever_loads_it():
    rows = images(6)
    alone = seen(Augmented(rows, jitter, seed=1))
    assert torch.equal(alone, seen(Augmented(rows, jitter, seed=1), num_workers=2))
    lasting = {"num_workers": 2, "persistent_workers": True}
    assert torch.equal(alone, seen(Augmented(rows, jitter, seed=1), **lasting))
    others = seen(Augmented(rows, jitter, seed=2))
    plain = torch.stack([ready(row["image"]).mean() for row in rows])
    added = torch.stack([*alone, *others]) - plain  # (4, rows)
    assert len(added.flatten().round(decimals=4).unique()) == 24  # seed, epoch and row each have a say


def test_the_generators_are_left_as_they_were():
    rows = Augmented([{"image": Image.new("RGB", (4, 4)), "label": 3}], jitter)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    assert rows[0].keys() == {"pixel_values", "label"}
    assert torch.equal(rows[0]["pixel_values"], rows[0]["pixel_values"])
    failing = Augmented(rows.dataset, lambda image: 1 / (random.random() * 0))
    with pytest.raises(ZeroDivisionError):
        failing[0]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(np.array_equal(*two) for two in zip(np.random.get_state(), before[2], strict=True))  # noqa: NPY002


def test_what_a_transform_may_return():
    rows, collate = list(images(2)), ImageCollator(processor())
    plain = collate(rows)["pixel_values"]

    def batch(transform):
        augmented = Augmented(rows, transform)
        return collate([augmented[index] for index in range(2)])

    kinds = {
        "image": lambda image: image,
        "array": np.asarray,
        "uint8": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
        "ready": ready,
    }
    for name, transform in kinds.items():
        assert batch(transform)["labels"].tolist() == [0, 1]
        torch.testing.assert_close(batch(transform)["pixel_values"], plain, msg=name, atol=1e-6, rtol=0)
    tensors = images(2).with_format("torch")
    torch.testing.assert_close(collate([tensors[0], tensors[1]])["pixel_values"], plain)


@pytest.mark.parametrize("scale", [lambda image: ready(image).numpy(), lambda image: np.asarray(image) / 255])
def test_scaled_floats_in_an_image_column_are_refused(scale):
    rows = [{"image": scale(row["image"])} for row in images(1)]
    with pytest.raises(ImageError, match=r"divide by 255.*pixel_values.*uint8"):
        ImageCollator(processor())(rows)
    ImageCollator(processor())([{"image": np.asarray(row["image"]).astype(float)} for row in images(1)])


def test_a_transform_of_the_data_set_makes_tensors(tmp_path):
    def prepare(rows):
        return {"pixel_values": [ready(image) for image in rows["image"]], "label": rows["label"]}

    for rows in (images(8).with_transform(prepare), images(8).to_iterable_dataset().map(prepare, batched=True)):
        rows = rows.remove_columns("image") if not hasattr(rows, "__len__") else rows
        trainer = trainer_of(tmp_path, train=rows)
        trainer.train()
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["pixel_values"].shape == (4, 3, 32, 32)


def test_resuming_repeats_the_augmentations(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "shapley_warmup": 0.0}

    def run(folder, **more):
        return trainer_of(tmp_path / folder, train=Augmented(images(), jitter), **options, **more)

    whole = run("whole")
    whole.train()  # 3 steps are an epoch
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[StopAt(5)]).train()
    again = run("broken", dataloader_num_workers=1)
    again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert again.train_dataset._epoch == 1
    assert_same(trained(whole.model), trained(again.model), atol=0, rtol=0)


def test_augmented_rows_tell_the_names_of_classes(tmp_path):
    base = wrapped()
    base.config.id2label = {0: "blue", 1: "green", 2: "red"}
    trainer = trainer_of(tmp_path, base, train=Augmented(table(files(3)), jitter))
    assert [trainer.train_dataset[index]["label"] for index in range(3)] == [2, 1, 0]


# -- two processes ---------------------------------------------------------------------------------------------------


def on_two_processes(folder):
    """What each of two processes sees; the test compares."""
    rows = [{**row, "label": index} for index, row in enumerate(files(20))]
    numbered = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    found = {}
    streams = {"dispatched": (numbered, None), "sharded": (numbered, False)}
    for name, (data, dispatch) in streams.items():
        options = {"accelerator_config": {"dispatch_batches": dispatch}, "per_device_train_batch_size": 3}
        trainer = trainer_of(folder, wrapped(20), train=data.to_iterable_dataset(num_shards=4), **options)
        found[name] = [label for batch in trainer.get_train_dataloader() for label in batch["labels"].tolist()]

    held_out = table(files(11, broken=[3]))
    for name, data in {"stream": held_out.to_iterable_dataset(), "rows": held_out}.items():
        options = {"corrupt_images": "skip", "per_device_eval_batch_size": 2, "compute_metrics": accuracy}
        output = trainer_of(folder, **options).predict(data)
        found[name] = output.predictions.tolist()
        found[f"{name} count"] = output.metrics["test_count"]
        found[f"{name} skipped"] = output.metrics["test_skipped_images"]

    # The second process finds no readable image in its first batch.
    stream = table(files(12, broken=[2, 3])).to_iterable_dataset()
    options = {"corrupt_images": "skip", "per_device_train_batch_size": 2, "shapley_warmup": 0.0}
    trainer = trainer_of(folder, train=stream, **options)
    trainer.train()
    found["skipped"] = [logs["skipped_images"] for logs in history(trainer)]
    found["weights"] = sum(value.double().sum().item() for value in trained(trainer.model).values())

    pairs = [{"image": row["image"], "text": f"{index} one"} for index, row in enumerate(files(8))]
    stream = datasets.Dataset.from_list(pairs).cast_column("image", datasets.Image()).to_iterable_dataset()
    trainer = matcher_of(folder, train=stream, max_steps=1, per_device_train_batch_size=2)
    trainer.train()
    found["pairs"] = history(trainer)[0]["task_loss"]
    Path(folder, f"found-{trainer.args.process_index}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes(tmp_path):
    forks.run_together(partial(on_two_processes, str(tmp_path)))
    one, other = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))

    assert sorted(one["sharded"] + other["sharded"]) == list(range(20))
    dispatched = one["dispatched"] + other["dispatched"]
    assert len(one["dispatched"]) == len(other["dispatched"]) == 10
    assert sorted(dispatched) == list(range(20))

    alone = trainer_of(tmp_path, corrupt_images="skip")
    with pytest.warns(UserWarning, match="left out"):
        expected = alone.predict(table(files(11, broken=[3]))).predictions
    for found in (one, other):
        for name in ("stream", "rows"):
            np.testing.assert_allclose(np.array(found[name], dtype=float), expected, atol=1e-5)
            assert (found[f"{name} count"], found[f"{name} skipped"]) == (10, 1)
        assert found["skipped"][0] == 2
        assert sum(found["skipped"]) == 2
    assert one["weights"] == other["weights"]
    assert np.isfinite(one["weights"])
    assert one["pairs"] == other["pairs"] > 0


def test_content_of_files_is_opened():
    picture = images(1)[0]["image"]
    content = file_of(picture)
    for given in (content, {"bytes": content, "path": None}, {"bytes": content, "path": "a.png"}):
        assert np.array_equal(np.asarray(open_image(given)), np.asarray(picture))
    with pytest.raises(UnreadableImageError, match="of 5 bytes"):
        open_image(b"12345")
    with pytest.raises(UnreadableImageError, match="no image"):
        open_image({"bytes": None, "path": None})
