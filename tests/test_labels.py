"""Several labels for an image, and quantities: the right loss, the right probabilities, and nothing lost by saving."""

import re

import numpy as np
import pytest
import torch
import zoo
from families import build, coalitions, images, wrap
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from torch.utils.data import Dataset

from shapadapter import Explanation, ShapleyConfig, ShapleyError, ShapleyTrainer, ShapleyTrainingArguments, explain
from shapadapter.training import ImageCollator

SEVERAL = "multi_label_classification"
KINDS = ["multi_label", "regression"]
each_prediction = pytest.mark.parametrize("prediction", ["vote", "classifier"])
each_kind = pytest.mark.parametrize("kind", KINDS)


class Rows(Dataset):
    """Images whose red, green and blue shine or not; their labels are which, or how much red there is."""

    def __init__(self, kind, count=24, form=float):
        generator = torch.Generator().manual_seed(0)
        on = torch.rand(count, 3, generator=generator) < 0.5
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        self.pixels = 0.3 * noise + 2.0 * on[:, :, None, None]
        self.labels = [[form(x) for x in row] for row in on] if kind == "multi_label" else [form(row[0]) for row in on]

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "label": self.labels[index]}


def bare(kind, problem_type=None):
    plain = build("vit", num_labels=3 if kind == "multi_label" else 1)
    plain.config.problem_type = problem_type
    return plain


def wrapped(kind, prediction="vote", problem_type=None, **config):
    if prediction == "classifier":
        config = {"modules_to_save": ["classifier"], **config}
    return get_peft_model(bare(kind, problem_type), ShapleyConfig(r=4, prediction=prediction, **config))


def trainer_of(folder, model, rows, **options):
    usual = {"max_steps": 30, "per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none"}
    usual |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-2}
    arguments = ShapleyTrainingArguments(str(folder), **{**usual, "logging_steps": 1, **options})
    return ShapleyTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def logged(trainer, name):
    return [logs[name] for logs in trainer.state.log_history if name in logs]


# -- the collator ----------------------------------------------------------------------------------------------------


def collate(labels):
    rows = [{"pixel_values": torch.zeros(3, 4, 4), "label": label} for label in labels]
    return ImageCollator()(rows)["labels"]


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 0, 1], [0, 0, 1]],
        [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]],
        [[True, False, True], [False, False, True]],
        [np.array([1, 0, 1]), np.array([0, 0, 1])],
        [torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1])],
    ],
    ids=["ints", "floats", "bools", "arrays", "tensors"],
)
def test_rows_of_zeros_and_ones_become_floats(rows):
    labels = collate(rows)
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[1, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("one", [int, np.uint8, np.int32, torch.tensor, bool])
def test_whole_numbers_are_indices(one):
    labels = collate([one(1), one(0)])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0]


def test_other_numbers_stay_what_they_are():
    labels = collate([0.25, -1.5])
    assert labels.dtype == torch.float32
    assert labels.tolist() == [0.25, -1.5]


@pytest.mark.parametrize("ragged", [[[1, 0], [1, 0, 1]], [[2], [0, 1]], [[1, 0, 1], 2]])
def test_labels_of_several_shapes_are_refused(ragged):
    with pytest.raises(ShapleyError, match=r"one shape, got.*zeros and ones"):
        collate(ragged)


# -- the loss --------------------------------------------------------------------------------------------------------


def loss_of(model, labels, **more):
    with torch.no_grad():
        return model.eval()(images(3), labels=labels, **more)


@each_prediction
@pytest.mark.parametrize("form", [torch.float32, torch.int64])
def test_each_problem_has_its_loss(prediction, form):
    hot = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 1]])
    output = loss_of(wrapped("multi_label", prediction, SEVERAL), hot.to(form))
    assert output.logits.shape == (3, 3)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, hot.float()))
    amounts = torch.tensor([3, 0, -2])
    for given in (amounts, amounts[:, None]):
        output = loss_of(wrapped("regression", prediction), given.to(form))
        assert output.logits.shape == (3, 1)
        torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], amounts.float()))


@each_prediction
def test_several_quantities(prediction):
    amounts = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    output = loss_of(wrapped("multi_label", prediction, "regression"), amounts)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits, amounts))


def test_other_families_have_the_same_losses():
    hot = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 1, 1, 0]])
    for name in ("resnet", "swin", "siglip2", "dinov3"):
        plain = zoo.base(name)
        plain.config.problem_type = SEVERAL
        with torch.no_grad():
            output = wrap(plain)(**zoo.inputs(name), labels=hot)
        torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, hot))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "prediction"), [("multi_label", "vote"), ("regression", "classifier")])
def test_training_lowers_the_loss_and_finds_what_matters(tmp_path, kind, prediction):
    rows, model = Rows(kind), wrapped(kind, prediction)
    trainer = trainer_of(tmp_path, model, rows, max_steps=40)
    before = trainer.evaluate()["eval_task_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_task_loss"]
    assert after < 0.5 * before
    assert np.isfinite(logged(trainer, "shapley_loss")).all()
    logits = explain(model, rows.pixels).logits
    if kind == "multi_label":
        assert ((logits > 0) == torch.tensor(rows.labels).bool()).float().mean() > 0.9
    else:
        assert np.corrcoef(logits[:, 0], rows.labels)[0, 1] > 0.8


@pytest.mark.parametrize(
    ("kind", "prediction", "form"),
    [("multi_label", "vote", int), ("multi_label", "classifier", float), ("regression", "vote", float)],
)
def test_the_task_loss_of_coalitions_is_the_problems_own(tmp_path, kind, prediction, form):
    rows = Rows(kind, count=8, form=form)
    options = {"max_steps": 2, "coalition_task_weight": 0.5, "shapley_weight": 1.0}
    trainer = trainer_of(tmp_path, wrapped(kind, prediction), rows, **options)
    batch = trainer.data_collator([rows[index] for index in range(4)])
    batch["coalitions"] = coalitions(4)
    trainer.model.eval()
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        terms = trainer._loss_terms(outputs, batch)
    repeated = batch["labels"].float().repeat_interleave(5, dim=0)
    values = outputs.coalition_values.flatten(0, 1)
    several = kind == "multi_label"
    rule = F.binary_cross_entropy_with_logits if several else F.mse_loss
    torch.testing.assert_close(terms["coalition_task_loss"], rule(values if several else values[:, 0], repeated))
    torch.testing.assert_close(loss, terms["task_loss"] + terms["shapley_loss"] + 0.5 * terms["coalition_task_loss"])
    trainer.train()  # with gradients, too
    assert np.isfinite(logged(trainer, "coalition_task_loss")).all()


def test_a_model_without_a_head_has_a_task_loss_on_coalitions_too(tmp_path):
    model, entry = wrap(zoo.base("dinov3")), zoo.ZOO["dinov3"]
    pixels = zoo.inputs(entry, batch=4)["pixel_values"]
    rows = [{"pixel_values": image, "label": index} for index, image in enumerate(pixels)]
    trainer = trainer_of(tmp_path, model, rows, max_steps=1, coalition_task_weight=0.5)
    batch = {**trainer.data_collator(rows), "coalitions": coalitions(4)}
    with torch.no_grad():
        outputs = model(**batch, return_attributions=False)
        terms = trainer._loss_terms(outputs, batch)
    repeated = batch["labels"].repeat_interleave(5)
    torch.testing.assert_close(
        terms["coalition_task_loss"], F.cross_entropy(outputs.coalition_values.flatten(0, 1), repeated)
    )


# -- explanations ----------------------------------------------------------------------------------------------------


@each_prediction
def test_several_labels_have_probabilities_of_their_own(prediction):
    shown = explain(wrapped("multi_label", prediction, SEVERAL), images())
    assert torch.equal(shown.probabilities, shown.logits.sigmoid())


@each_prediction
@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_quantities_have_no_probabilities(tmp_path, prediction, problem_type):
    model = wrapped("regression", prediction, problem_type)
    shown = explain(model, images())
    assert shown.probabilities.isnan().all()
    assert shown.logits.shape == (2, 1)
    assert (shown.efficiency_gap < 1e-5).all()
    assert explain(model, images(), top_k=1).classes.tolist() == [[0], [0]]
    assert shown.top(1)[0][0].logit == pytest.approx(shown.logits[0, 0].item())
    shown.save(tmp_path)
    again = Explanation.load(tmp_path)
    for field in ("attributions", "classes", "logits", "null_values", "images"):
        assert torch.equal(getattr(again, field), getattr(shown, field))
    assert torch.equal(again.probabilities.view(torch.int32), shown.probabilities.view(torch.int32))
    assert again.labels == shown.labels


def test_pictures_and_pages_show_the_quantity(tmp_path):
    shown = explain(wrap(bare("regression")), images())
    value = f"{shown.logits[0, 0]:.2f}".replace("-", "\N{MINUS SIGN}")
    words = [text.get_text() for text in shown.figure(0).findobj(lambda part: hasattr(part, "get_text"))]
    assert f"= {value}" in " ".join(words)
    page = shown.save_html(tmp_path / "page.html").read_text()
    assert f"= {value}" in page
    for text in (" ".join(words), page):
        assert not re.search(r"\bnan\b", text, re.IGNORECASE)
        assert "p=" not in text


# -- saving ----------------------------------------------------------------------------------------------------------


@each_prediction
def test_the_problem_comes_back_on_a_base_without_it(tmp_path, prediction):
    model = wrapped("multi_label", prediction, SEVERAL).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bare("multi_label"), tmp_path)
    assert again.config.problem_type == SEVERAL
    one, other = (explain(each, images()) for each in (model, again))
    assert torch.equal(one.probabilities, other.probabilities)
    hot = torch.ones(3, 3)
    assert torch.equal(loss_of(model, hot).loss, loss_of(again, hot).loss)


@each_kind
def test_a_problem_that_the_labels_settled_comes_back_too(tmp_path, kind):
    model = wrapped(kind)
    trainer = trainer_of(tmp_path, model, Rows(kind), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    shown = explain(model, images())
    for folder in ("saved", "checkpoint-2"):
        again = PeftModel.from_pretrained(bare(kind), tmp_path / folder)
        assert again.config.problem_type == (SEVERAL if kind == "multi_label" else "regression")
        restored = explain(again, images())
        assert torch.equal(restored.logits, shown.logits)
        assert torch.equal(restored.probabilities.isnan(), shown.probabilities.isnan())
        assert torch.equal(restored.probabilities.nan_to_num(), shown.probabilities.nan_to_num())


def test_the_usual_problem_comes_back_as_it_was(tmp_path):
    model = wrap("vit")
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].problem_type is None
    with torch.no_grad():
        model(images(), labels=torch.tensor([0, 1]))
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].problem_type == "single_label_classification"
