"""Weighted classes and mixed images: what the task loss is then, and that the game is the mixed picture's."""

import math

import matching
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from families import wrap
from peft import PeftModel
from test_trainer import (
    CLASSES,
    CoalitionCollator,
    StopAt,
    arguments,
    assert_same,
    fixed_batch,
    gap,
    gradients,
    images,
    trained,
    trainer_of,
    wrapped,
)
from transformers import HfArgumentParser
from transformers import ViTImageProcessorPil as Processor
from transformers.trainer_pt_utils import LabelSmoother

from shapadapter import Augmented, ShapleyError, ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.backbone import Tiling
from shapadapter.core.shapley import sample_pairs
from shapadapter.data.augmentation import Mix, draw_mix, mix_labels, mix_pictures
from shapadapter.data.classes import as_model_counts
from shapadapter.training.validation import SoftTask, class_weights

datasets = pytest.importorskip("datasets")

UNEVEN = [0, 0, 0, 0, 0, 1, 1, 2]


def logits(count=6, seed=0):
    return torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(seed))


# -- the loss --------------------------------------------------------------------------------------------------------


def test_without_weights_it_is_cross_entropy_and_transformers_smoothing():
    scores, labels = logits(), torch.tensor([0, 1, 2, 2, -100, 0])
    torch.testing.assert_close(SoftTask()(scores, labels), F.cross_entropy(scores, labels))
    smoothed = LabelSmoother(0.3)({"logits": scores}, labels)
    torch.testing.assert_close(SoftTask(smoothing=0.3)(scores, labels), smoothed)
    assert SoftTask()(scores, torch.full((6,), -100)) == 0


def test_weights_multiply_each_image_and_the_mean_is_over_images():
    scores, labels, weights = logits(), torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([3.0, 1.0, 0.0])
    each = F.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(SoftTask(weights)(scores, labels), (weights[labels] * each).mean())
    halves = [SoftTask(weights)(part, own) for part, own in zip(scores.split(3), labels.split(3), strict=True)]
    torch.testing.assert_close(SoftTask(weights)(scores, labels), torch.stack(halves).mean())
    soft = F.one_hot(labels, CLASSES) * 0.7 + 0.1
    expected = F.cross_entropy(scores, soft, weight=weights)  # which divides soft labels by the images, too
    torch.testing.assert_close(SoftTask(weights, smoothing=0.3)(scores, labels), expected)


def test_half_precision_is_summed_in_full():
    scores, labels = 20 * logits(), torch.tensor([0, 1, 2, 2, 1, 0])
    assert SoftTask()(scores.bfloat16(), labels).dtype == torch.float32


# -- class weights ---------------------------------------------------------------------------------------------------


def test_balanced_weights_make_up_for_the_counts():
    weights = class_weights("balanced", images(8, UNEVEN), CLASSES, None)
    assert weights.tolist() == pytest.approx([8 / 15, 8 / 6, 8 / 3])
    assert weights[UNEVEN].mean() == pytest.approx(1)
    rows = [{"image": None, "label": label} for label in UNEVEN]
    opened = Augmented(images(8, UNEVEN).with_transform(lambda rows: 1 / 0), lambda image: 1 / 0)
    for same in (rows, opened):  # nobody opens an image to count labels
        assert torch.equal(class_weights("balanced", same, CLASSES, None), weights)


def test_balanced_weights_go_with_the_names_of_classes():
    names = ["wolf", "ant", "bee"]
    rows = images(8, UNEVEN).cast_column("label", datasets.ClassLabel(names=names))
    counted = as_model_counts(rows, dict(enumerate(["ant", "bee", "wolf"])), "")
    weights = class_weights("balanced", counted, CLASSES, None)
    assert weights.tolist() == pytest.approx([8 / 6, 8 / 3, 8 / 15])


def test_classes_that_cannot_be_counted_are_refused(tmp_path):
    with pytest.raises(ShapleyError, match=r"1 of 3 classes have none in the training data: cat"):
        class_weights("balanced", images(4, [0, 2, 0, 2]), CLASSES, {0: "ant", 1: "cat", 2: "dog"})
    with pytest.raises(ShapleyError, match="got IterableDataset"):
        trainer_of(tmp_path, train=images().to_iterable_dataset(), class_weights="balanced")
    with pytest.raises(ShapleyError, match="got NoneType"):
        class_weights("balanced", None, CLASSES, None)
    with pytest.raises(ShapleyError, match="2 numbers; the model has 3 classes"):
        trainer_of(tmp_path, class_weights=[1.0, 2.0])


@pytest.mark.parametrize("wrong", ["often", "1,x", [1.0, -1.0], [math.nan, 1.0], [0.0, 0.0], 3])
def test_weights_of_another_kind(tmp_path, wrong):
    with pytest.raises(ValueError, match="class_weights is a number for each class"):
        arguments(tmp_path, class_weights=wrong)


def test_the_command_line(tmp_path):
    parser = HfArgumentParser(ShapleyTrainingArguments)

    def parsed(*words):
        return parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *words])[0]

    assert parsed("--class_weights", "1,0.5,2").class_weights == [1, 0.5, 2]
    assert parsed("--class_weights", "balanced", "--mixup_alpha", "0.8").class_weights == "balanced"
    assert (parsed().class_weights, parsed().corrupt_images, parsed().cutmix_alpha) == (None, "fail", 0)
    with pytest.raises(ValueError, match="must not be negative"):
        arguments(tmp_path, mixup_alpha=-1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_trainer_weighs_training_and_evaluation(tmp_path, smoothing):
    trainer = trainer_of(tmp_path, class_weights=[3.0, 1.0, 0.0], label_smoothing_factor=smoothing)
    batch = fixed_batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        scores = trainer.model(batch["pixel_values"]).logits
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    shares = F.one_hot(batch["labels"], CLASSES) * (1 - smoothing) + smoothing / CLASSES
    expected = F.cross_entropy(scores, shares, weight=torch.tensor([3.0, 1.0, 0.0])).item()
    assert trainer.monitor.means("eval")["task_loss"] == pytest.approx(expected, rel=1e-5)
    assert outputs.loss is None
    plain = trainer_of(tmp_path, model=trainer.model)
    assert plain.evaluate()["eval_task_loss"] != pytest.approx(trainer.evaluate()["eval_task_loss"], rel=1e-2)


def test_images_of_a_class_without_weight_teach_nothing(tmp_path):
    options = {"shapley_weight": 0.0, "shapley_warmup": 0.0, "coalition_task_weight": 0.5, "class_weights": [0, 1, 0]}
    trainer = trainer_of(tmp_path, train=images(8, [0, 2] * 4), **options)
    assert all(not gradient.any() for gradient in gradients(trainer, fixed_batch(trainer)).values())
    trainer = trainer_of(tmp_path, train=images(8, [0, 1] * 4), **options)
    assert any(gradient.any() for gradient in gradients(trainer, fixed_batch(trainer)).values())


def test_eight_images_equal_four_times_two_with_weights(tmp_path):
    pairs = sample_pairs(8, 16, 1, torch.Generator().manual_seed(3), sizes=torch.tensor([5]))
    rows = images(8, UNEVEN, coalitions=pairs.tolist())
    ends = []
    for batch, accumulated in ((8, 1), (2, 4)):
        trainer = trainer_of(
            tmp_path,
            train=rows,
            data_collator=CoalitionCollator(Processor(size={"height": 32, "width": 32})),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            max_steps=2,
            shapley_warmup=0.0,
            coalition_task_weight=0.5,
            class_weights="balanced",
            label_smoothing_factor=0.1,
        )
        start = trained(trainer.model)
        trainer.train()
        ends.append(trained(trainer.model))
        assert gap(start, ends[-1]) > 1e-3
    assert_same(*ends, atol=1e-6, rtol=0)


# -- mixing ----------------------------------------------------------------------------------------------------------

GRID = Tiling((4, 4), (4, 4), (32, 32))


def numbered(count=4, side=32):
    """Images that hold their own number in every pixel."""
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()


def test_mixup_blends_pictures_and_labels_alike():
    mix = Mix(torch.tensor([1, 0, 3, 2]), 0.75, None)
    assert mix_pictures(numbered(), mix, GRID)[:, 0, 0, 0].tolist() == [0.25, 0.75, 2.25, 2.75]
    shares = mix_labels(torch.tensor([0, 1, 2, 2]), mix, CLASSES)
    assert shares.tolist() == [[0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0, 1], [0, 0, 1]]
    unknown = mix_labels(torch.tensor([-100, 1, 2, -100]), mix, CLASSES)
    assert unknown.sum(dim=1).tolist() == [0.25, 0.75, 0.75, 0.25]


@pytest.mark.parametrize("seen", [(32, 32), (28, 32), (30, 30)])
def test_a_player_of_a_cutmix_belongs_to_one_image_and_the_label_to_the_players(seen):
    tiling = Tiling((4, 4), (4, 4), seen)
    rows, cols = ([round(part * length / 4) for part in range(5)] for length in seen)
    shares = set()
    for step in range(40):
        mix = draw_mix(4, (4, 4), (0.0, 1.0), (0, step))
        mixed = mix_pictures(numbered(), mix, tiling)
        owners = torch.zeros(4, 16)
        for player in range(16):
            row, col = divmod(player, 4)
            tile = mixed[:, :, rows[row] : rows[row + 1], cols[col] : cols[col + 1]].flatten(1)
            assert (tile == tile[:, :1]).all()
            owners[:, player] = tile[:, 0]
        own = (owners == torch.arange(4)[:, None]).float().mean(dim=1)
        expected = torch.where(mix.partners == torch.arange(4), 1.0, mix.share)
        torch.testing.assert_close(own, expected.float())
        assert (mixed[:, :, seen[0] :] == numbered()[:, :, seen[0] :]).all()  # what no player covers stays
        shares.add(mix.share)
    assert {1 - (length / 4) ** 2 for length in range(1, 5)} <= shares


def test_mixes_depend_on_their_key_alone_and_both_kinds_occur():
    def draw(*key, alphas=(0.8, 1.0)):
        return draw_mix(8, (4, 4), alphas, key)

    one, same, other = draw(0, 2, 5, 0, 0), draw(0, 2, 5, 0, 0), draw(0, 2, 5, 0, 1)
    assert (one.share, one.box) == (same.share, same.box)
    assert torch.equal(one.partners, same.partners)
    assert not torch.equal(one.partners, other.partners)
    assert {draw(0, step).box is None for step in range(20)} == {True, False}
    assert all(draw(0, step, alphas=(0.8, 0.0)).box is None for step in range(20))
    assert all(draw(0, step, alphas=(0.0, 0.8)).box is not None for step in range(20))
    shares = np.array([draw(0, step, alphas=(0.4, 0.0)).share for step in range(500)])
    assert shares.mean() == pytest.approx(0.5, abs=0.05)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.1)  # of Beta(alpha, alpha)


class Spy(ShapleyTrainer):
    """Remembers what the loss was taken of."""

    seen = None

    def _loss_terms(self, outputs, inputs):
        type(self).seen = outputs, inputs
        return super()._loss_terms(outputs, inputs)


def spied(folder, model=None, **options):
    processor = Processor(size={"height": 32, "width": 32})
    args = arguments(folder, **options)
    rows = images()
    return Spy(model or wrapped(), args, train_dataset=rows, eval_dataset=rows, processing_class=processor)


@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_the_game_is_that_of_the_mixed_picture(tmp_path, alphas):
    trainer = spied(tmp_path, seed=3, shapley_warmup=0.0, coalition_task_weight=0.5, shapley_weight=2.0, **alphas)
    batch = fixed_batch(trainer)
    trainer.model.train()
    trainer.state.global_step = trainer.state.max_steps = 1
    loss = trainer.compute_loss(trainer.model, batch).detach()
    outputs, inputs = trainer.seen
    mixed, shares = inputs["pixel_values"], inputs["labels"]
    assert not torch.equal(mixed, batch["pixel_values"])
    assert shares.shape == (8, CLASSES)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(8))
    assert ((shares > 0).sum(dim=1) > 1).any()
    trainer.model.eval()
    with torch.no_grad():
        again = trainer.model(mixed, coalitions=batch["coalitions"])
    torch.testing.assert_close(outputs.coalition_values, again.coalition_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.logits, again.logits, atol=1e-5, rtol=0)
    means = trainer.monitor.means("train")
    assert means["task_loss"] == pytest.approx(F.cross_entropy(again.logits, shares).item(), rel=1e-4)
    flat, repeated = again.coalition_values.flatten(0, 1), shares.repeat_interleave(2, dim=0)
    assert means["coalition_task_loss"] == pytest.approx(F.cross_entropy(flat, repeated).item(), rel=1e-4)
    together = means["task_loss"] + 0.5 * means["coalition_task_loss"] + 2 * means["shapley_loss"]
    assert loss.item() == pytest.approx(together, rel=1e-4)


def test_evaluation_is_not_mixed_and_the_model_does_not_think_of_several_labels(tmp_path):
    trainer = spied(tmp_path, mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing_factor=0.1, class_weights="balanced")
    trainer.train()
    assert trainer.model.config.problem_type is None
    batch = fixed_batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    assert trainer.seen[1]["pixel_values"] is batch["pixel_values"]
    assert trainer.seen[1]["labels"] is batch["labels"]


def test_images_without_labels_are_mixed(tmp_path):
    rows = images(8, labels=False)
    model = wrapped(prediction="classifier")
    trainer = trainer_of(tmp_path, model, train=rows, held_out=rows, cutmix_alpha=1.0, shapley_warmup=0.0)
    before = trained(trainer.model)
    trainer.train()
    assert gap(before, trained(trainer.model)) > 0


@pytest.mark.parametrize("drawn", [True, False])  # or brought by the rows
def test_each_micro_batch_has_a_mix_of_its_own(tmp_path, drawn):
    trainer = spied(tmp_path, mixup_alpha=0.8)
    batch = {name: value for name, value in fixed_batch(trainer, 4).items() if name != "coalitions" or not drawn}
    trainer.model.train()

    def mixed(step):
        trainer.state.global_step = step
        trainer.compute_loss(trainer.model, batch)
        return trainer.seen[1]["pixel_values"]

    first, second, third = mixed(0), mixed(0), mixed(1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    trainer.args.distributed_state.process_index = 1
    try:
        other = mixed(2)
    finally:
        trainer.args.distributed_state.process_index = 0
    assert torch.equal(first, mixed(0))  # which begins anew, as a resumed step does
    assert not torch.equal(other, mixed(2))


def test_resuming_with_mixed_images_equals_an_uninterrupted_run(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    options |= {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "class_weights": [1.0, 2.0, 0.5], "shapley_warmup": 0.0}

    def run(folder, **more):
        return trainer_of(tmp_path / folder, **options, **more)

    whole = run("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run("broken", callbacks=[StopAt(3)]).train()
    again = run("broken")
    again.train(resume_from_checkpoint=True)
    assert_same(trained(whole.model), trained(again.model), atol=0, rtol=0)
    plain = trainer_of(tmp_path / "plain", **{**options, "mixup_alpha": 0.0, "cutmix_alpha": 0.0})
    plain.train()
    assert gap(trained(whole.model), trained(plain.model)) > 1e-5


# -- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [{"class_weights": [1.0]}, {"mixup_alpha": 0.5}, {"cutmix_alpha": 1.0}, {"label_smoothing_factor": 0.1}]
)
def test_models_of_other_tasks_are_refused(tmp_path, asked):
    with pytest.raises(ShapleyError, match=r"_(weights|alpha|factor): only for one class .* not for regression"):
        trainer_of(tmp_path, wrapped(1), **asked)
    model = matching.wrapped("clip", trained=False)
    with pytest.raises(ShapleyError, match="not for a model that matches images with texts"):
        ShapleyTrainer(model, arguments(tmp_path, **asked))
    several = wrapped()
    several.config.problem_type = "multi_label_classification"
    with pytest.raises(ShapleyError, match="not for several labels"):
        trainer_of(tmp_path, several, **asked)


def test_several_labels_that_show_only_in_the_data(tmp_path):
    rows = images(8, [[1.0, 0.0, 1.0]] * 8)
    for asked in ({"mixup_alpha": 0.5}, {"class_weights": [1.0, 1.0, 1.0]}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(ShapleyError, match=r"the number of a class.*torch.float32 of shape \(4, 3\)"):
            trainer_of(tmp_path, train=rows, **asked).train()


def test_patches_are_not_mixed(tmp_path):
    model = wrap(zoo.base("siglip2"), trained=False)
    assert isinstance(model, PeftModel)
    with pytest.raises(ShapleyError, match=r"cutmix_alpha: .*patches, which are not mixed"):
        ShapleyTrainer(model, arguments(tmp_path, cutmix_alpha=1.0))


def test_a_loss_of_the_users_own_is_not_overruled(tmp_path):
    processor, rows = Processor(size={"height": 32, "width": 32}), images()
    options = {"train_dataset": rows, "processing_class": processor, "compute_loss_func": lambda *a, **k: None}
    with pytest.raises(ShapleyError, match="mixup_alpha and compute_loss_func both say"):
        ShapleyTrainer(wrapped(), arguments(tmp_path, mixup_alpha=0.1), **options)
