"""What happens around the steps: batch sizes that do not fit, stopping early, and maps drawn on the way."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from test_trainer import arguments, assert_same, history, images, matcher_of, pairs, trained, trainer_of, wrapped
from transformers import EarlyStoppingCallback, HfArgumentParser
from transformers import ViTImageProcessorPil as Processor
from transformers.integrations import TensorBoardCallback, WandbCallback

from shapadapter import ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.data.rows import some_rows

# -- a batch that does not fit ---------------------------------------------------------------------------------------


class SmallDevice:
    """Has no room for batches of more than `most` images, from call `after` on; remembers what it was given."""

    def __init__(self, model, most=99, error=None, after=0):
        self.coalitions = []
        self.most, self.error, self.after = most, error, after
        model.register_forward_pre_hook(self.take, with_kwargs=True)

    @property
    def sizes(self):
        return [len(coalitions) for coalitions in self.coalitions]

    def take(self, module, args, kwargs):
        self.coalitions.append(kwargs["coalitions"])
        if self.sizes[-1] > self.most and len(self.sizes) > self.after:
            raise self.error


def run(folder, size, *device, after=0, **options):
    model = wrapped()
    small = SmallDevice(model, *device, after=after)
    trainer = trainer_of(folder, model, images(20), per_device_train_batch_size=size, **options)
    trainer.train()
    return trainer, small


def assert_same_run(one, other, steps):
    """The last `steps` logs and the coalitions of both are equal."""
    (trainer, device), (fresh, calm) = one, other
    keys = ("task_loss", "shapley_loss", "shapley_weight", "coalition_fit")
    found, expected = ([[logs[key] for key in keys] for logs in history(each)] for each in (trainer, fresh))
    assert len(expected) == steps
    assert found[-steps:] == expected
    last = device.coalitions[-len(calm.coalitions) :]
    assert all(torch.equal(*pair) for pair in zip(last, calm.coalitions, strict=True))


def test_a_batch_that_does_not_fit_is_made_smaller(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    trainer, device = run(tmp_path / "found", 10, 8, error, auto_find_batch_size=True, shapley_warmup=0.0)
    assert device.sizes == [10, 9, 8, 8, 4]  # accelerate takes a tenth away each time; an epoch of 20 is 8 + 8 + 4
    fresh, calm = run(tmp_path / "fresh", 8, shapley_warmup=0.0)
    assert_same_run((trainer, device), (fresh, calm), steps=3)
    assert_same(trained(fresh.model), trained(trainer.model), atol=0, rtol=0)


def test_memory_that_runs_out_on_the_way_starts_the_run_again(tmp_path):
    # Nothing is learned, so that whatever the first attempt leaves behind shows.
    options = {
        "learning_rate": 0.0,
        "head_learning_rate": 0.0,
        "shapley_warmup": 0.5,
        "gradient_accumulation_steps": 2,
    }
    error = RuntimeError("CUDA out of memory.")
    found = run(tmp_path / "found", 5, 4, error, after=3, auto_find_batch_size=True, **options)
    assert found[1].sizes[:5] == [5, 5, 5, 5, 4]
    assert_same_run(found, run(tmp_path / "fresh", 4, **options), steps=3)


# -- stopping early --------------------------------------------------------------------------------------------------


class Worse:
    """An evaluator whose numbers follow a list."""

    def __init__(self, name, values):
        self.name, self.values = name, iter(values)

    def __call__(self, model, dataset, collator):
        assert len(dataset) == 6
        return {self.name: next(self.values)}


def stopping(folder, evaluator=None, **options):
    usual = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    trainer = ShapleyTrainer(
        wrapped(),
        arguments(folder, load_best_model_at_end=True, **usual, **options),
        train_dataset=images(),
        eval_dataset=images(6),
        processing_class=Processor(size={"height": 32, "width": 32}),
        evaluator=evaluator,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("name", "values", "greater", "best", "end"),
    [
        ("error", [0.5, 0.3, 0.4, 0.6, 0.1, 0.1], None, 2, 4),
        ("error", [0.5, 0.6, 0.7, 0.3, 0.3, 0.1], True, 3, 5),  # what the user says is done
    ],
)
def test_a_run_stops_when_the_evaluators_measure_gets_worse(tmp_path, name, values, greater, best, end):
    trainer = stopping(tmp_path, Worse(name, values), metric_for_best_model=f"eval_{name}", greater_is_better=greater)
    assert trainer.state.global_step == end
    assert trainer.state.best_metric == values[best - 1]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")


@pytest.mark.parametrize(("name", "choose"), [("eval_shapley_loss", min), ("eval_coalition_fit", max)])
def test_a_run_stops_by_its_own_terms(tmp_path, name, choose):
    trainer = stopping(tmp_path, metric_for_best_model=name, shapley_warmup=0.0, learning_rate=0.05)
    seen = [logs[name] for logs in trainer.state.log_history if name in logs]
    assert trainer.state.best_metric == choose(seen)
    assert trainer.state.global_step == min(6, seen.index(choose(seen)) + 3)


@pytest.mark.parametrize(
    ("name", "greater"),
    [
        ("eval_error", False),
        ("eval_night_error", False),
        ("eval_deletion", False),
        ("eval_infidelity", False),
        ("loss", False),
        ("eval_shapley_loss", False),
        ("eval_insertion", True),
        ("eval_spearman", True),
        ("eval_equivalent_evaluations", True),
        ("eval_accuracy", True),
        (None, None),
    ],
)
def test_whether_more_is_better_follows_from_the_measure(tmp_path, name, greater):
    assert arguments(tmp_path, metric_for_best_model=name).greater_is_better is greater


# -- maps on the way -------------------------------------------------------------------------------------------------


class FakeWriter:
    """Takes what TensorBoard's writer takes."""

    def __init__(self):
        self.pictures = []

    def add_image(self, tag, pixels, step, dataformats):
        assert dataformats == "HWC"
        assert pixels.dtype == np.uint8
        self.pictures.append((tag, step, pixels.shape))

    def add_scalar(self, *_): ...

    add_text = add_scalar

    def flush(self): ...

    close = flush


class FakeTensorBoard(TensorBoardCallback):
    """transformers' callback without the package."""

    def __init__(self, writer):
        self.tb_writer, self._SummaryWriter, self.logging_dir = writer, None, "unused"


EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}


def test_maps_are_drawn_to_files_where_nobody_takes_them(tmp_path):
    trainer = trainer_of(tmp_path, log_attributions=3, **EVALUATING)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "attributions").iterdir()) == [
        "eval-000001.png",
        "eval-000002.png",
    ]
    one, other = (np.asarray(Image.open(path)) for path in sorted((tmp_path / "attributions").iterdir()))
    assert one.shape == other.shape
    rows, width, _ = one.shape
    assert width > 900  # a picture and three maps
    assert rows > 800  # of three images
    left = slice(0, width // 5)  # the pictures, which stay; the maps change
    assert np.array_equal(one[60:250, left], other[60:250, left])
    assert not np.array_equal(one[:, width // 3 :], other[:, width // 3 :])


def test_drawing_maps_changes_nothing_in_the_training(tmp_path):
    class Shaky(torch.utils.data.Dataset):
        """Held-out rows that draw random numbers of each kind."""

        def __init__(self):
            self.rows = images(6)

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            torch.rand(3), np.random.rand(2)  # noqa: NPY002
            return self.rows[index]

    ends = []
    for count in (0, 2):
        model = wrapped(lora_dropout=0.3)
        trainer = trainer_of(
            tmp_path / str(count), model, held_out=Shaky(), log_attributions=count, optim="sgd", **EVALUATING
        )
        trainer.train()
        ends.append((trained(model), torch.rand(3), np.random.rand(3).tolist()))  # noqa: NPY002
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
    assert_same(ends[0][0], ends[1][0], atol=0, rtol=0)
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


def test_drawing_maps_leaves_the_generators_of_gpus_alone(tmp_path, monkeypatch):
    seeds = []
    trainer = trainer_of(tmp_path, log_attributions=2, **EVALUATING)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    trainer.evaluate()
    assert len(list((tmp_path / "attributions").iterdir())) == 1
    assert seeds == []
    torch.manual_seed(0)
    assert seeds == [0]  # that it would notice


def test_maps_go_where_the_trainer_reports_to(tmp_path):
    writer = FakeWriter()
    held_out = {"day": images(4), "night": images(6)}
    trainer = trainer_of(
        tmp_path, held_out=held_out, log_attributions=2, callbacks=[FakeTensorBoard(writer)], **EVALUATING
    )
    trainer.train()
    assert [(tag, step) for tag, step, _ in writer.pictures] == [
        (f"attributions/eval_{name}", step) for step in (1, 2) for name in ("day", "night")
    ]
    assert not (tmp_path / "attributions").exists()


def test_maps_go_to_weights_and_biases(tmp_path, monkeypatch):
    logged = []
    fake = types.SimpleNamespace(Image=lambda picture: picture, log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", fake)

    class FakeWandb(WandbCallback):
        def __init__(self):
            self._wandb = None  # as where it is switched off: the scalars are not written

    trainer_of(tmp_path, log_attributions=1, callbacks=[FakeWandb()], **EVALUATING).train()
    assert [(set(entry), entry["train/global_step"]) for entry in logged] == [
        ({"attributions/eval", "train/global_step"}, step) for step in (1, 2)
    ]
    assert isinstance(logged[0]["attributions/eval"], Image.Image)


def test_maps_in_a_real_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tmp_path, log_attributions=2, report_to="tensorboard", **EVALUATING)
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Images("attributions/eval")] == [1, 2]
    assert "eval/shapley_loss" in events.Tags()["scalars"]


def test_maps_of_a_matching_model_are_of_its_captions(tmp_path):
    trainer = matcher_of(tmp_path, held_out=pairs(4), log_attributions=3, **EVALUATING)
    trainer.train()
    assert (tmp_path / "attributions" / "eval-000002.png").exists()


def test_a_run_that_broke_is_not_stopped_by_its_maps(tmp_path):
    trainer = trainer_of(tmp_path, log_attributions=2, **EVALUATING)
    with torch.no_grad():
        trainer.layer.lora_shapley_null["default"].fill_(torch.nan)
        for name, value in trainer.model.named_parameters():
            if "lora_shapley" in name:
                value.fill_(torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        trainer.evaluate()
    assert not (tmp_path / "attributions").exists()


def test_maps_need_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match="eval_strategy"):
        arguments(tmp_path, log_attributions=2)
    with pytest.raises(ValueError, match="negative"):
        arguments(tmp_path, log_attributions=-1, eval_strategy="steps", eval_steps=1)
    parser = HfArgumentParser(ShapleyTrainingArguments)
    line = f"--output_dir {tmp_path} --use_cpu --log_attributions 4 --eval_strategy epoch"
    (parsed,) = parser.parse_args_into_dataclasses(line.split())
    assert parsed.log_attributions == 4


def test_images_that_are_shown_are_not_all_of_one_class_where_classes_take_turns():
    labels = [index % 10 for index in range(1000)]
    assert list(some_rows(labels, 4)) == [0, 3, 6, 9]
    assert list(some_rows(sorted(labels), 4)) == [0, 3, 6, 9]
    assert (list(some_rows(labels, 1)), list(some_rows([7, 8], 4)), list(some_rows([], 4))) == ([0], [7, 8], [])
    assert list(some_rows(iter(labels), 3)) == [0, 1, 2]
