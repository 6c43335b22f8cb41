"""README, the first pages and the shorter how-to pages: every Python block runs, in order, on tiny models.

The folder is laid out as `shapadapter demo` leaves it. Pages of their own kind have tests of their own; `test_every_block.py`
says which.
"""

import json
import re
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pages
import pytest
import torch
from datasets import ClassLabel, Dataset, config
from peft import PeftModel
from PIL import Image

from shapadapter import Evaluation, ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.core.statistics import Interval
from shapadapter.evaluation import CostPoint

sys.path.insert(0, str(Path(__file__).parent / "evaluation"))

from small import bare, pictures, processor, rows_of, wrapped

pytestmark = pytest.mark.usefixtures("quick_evaluation")
ROWS = 4
QUICK = 'max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True'
CLASSES = ["eight", "nine", "one", "two"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A demo's output in small: base, adapter, test images, masks; and photos and an adapter of one's own."""
    root = tmp_path_factory.mktemp("pages")
    names = dict(enumerate(CLASSES))
    base, home = bare(ROWS), root / "demo-output"
    base.config.id2label, base.config.label2id = names, {name: index for index, name in names.items()}
    base.save_pretrained(home / "pretrained")
    processor(ROWS).save_pretrained(home / "pretrained")
    model = wrapped(ROWS)
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path, adapter.id2label = str(home / "pretrained"), names
    model.save_pretrained(home / "adapter")
    for number, picture in enumerate(pictures(12, side=64)):
        for kind in ("demo-output/test", "photos"):
            folder = root / kind / CLASSES[number % 4]
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{ {0: 18, 4: 8, 8: 38}.get(number, number) }.png")
    return root


@pytest.fixture(autouse=True)
def _here(place, tmp_path, monkeypatch):
    for part in place.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_readme(monkeypatch):
    pushed = []
    monkeypatch.setattr(ShapleyTrainer, "push_to_hub", lambda self: pushed.append(self))
    listed = [{"image": row["image"], "label": row["label"]} for row in rows_of(8)]
    rows = Dataset.from_list(listed).cast_column("label", ClassLabel(names=CLASSES))
    names = {
        "name": "demo-output/pretrained",
        "dataset": {"train": rows, "test": rows},
        "images": pictures(2),
        "pixels": torch.zeros(2, 3, 8 * ROWS, 8 * ROWS),
    }
    here = {"num_train_epochs=5": QUICK, '"you/out"': '"out"'}
    pages.run("README.md", names, here)
    assert isinstance(names["model"], PeftModel)
    assert names["refined"].standard_errors.shape == (2, ROWS, ROWS, 3)
    assert names["explanation"].sums_to_logits
    assert len(pushed) == 1
    assert Path("why.png").is_file()


def test_first_page():
    names = pages.run("docs/index.md", {})
    assert names["explanation"].attributions.shape == (1, ROWS, ROWS, 3)
    assert Path("why.png").is_file()


def test_get_started(capsys):
    here = {"facebook/dinov2-small": "demo-output/pretrained", "num_train_epochs=5": QUICK}
    names = pages.run("docs/get-started.md", {}, here)
    assert names["explanation"].attributions.shape == (2, ROWS, ROWS, 3)
    assert (names["low"] < names["high"]).all()
    assert set(names["names"]) == set(CLASSES)
    assert "trainable params" in capsys.readouterr().out
    assert Path("why.html").is_file()


def test_vote_or_classifier():
    here = {"num_train_epochs=3": QUICK}
    names = pages.run("docs/vote-or-classifier.md", {}, here)
    assert (names["after"] - names["before"]).abs().max() < 1e-6
    trained = [name for name, parameter in names["model"].named_parameters() if parameter.requires_grad]
    assert trained
    assert all("shapley" in name for name in trained)


def test_read_attributions():
    names = pages.run("docs/read-attributions.md", {}, {"refine=256": "refine=16"})
    assert torch.isclose(names["null"] + names["values"].sum(), names["explanation"].logits.max())
    first, second = names["first"], names["second"]
    index = [names["explanation"].class_index(each.label) for each in (first, second)]
    null = names["explanation"].null_values[0, index]
    assert abs(first.logit - second.logit - float(names["contrast"].sum() + null[0] - null[1])) < 1e-4
    assert names["certain"].dtype == torch.bool


def test_page():
    pages.run("docs/page.md", {})
    assert '"true": "eight"' in Path("why.html").read_text()
    assert "Images from 0" in Path("why-0.html").read_text()


def test_questions():
    names = pages.run("docs/faq.md", {})
    assert (names["total"] - names["explanation"].logits).abs().max() < 1e-5
    assert (names["again"].attributions - names["once"].attributions).abs().max() < 1e-5
    assert names["few"].attributions.shape[-1] == 3
    assert names["pictures"][0].shape == (8 * ROWS, 8 * ROWS, 3)


def test_add_a_metric(capsys):
    here = {'"shapadapter", "kernel_shap", "random"': '"shapadapter", "random"'}
    names = pages.run("docs/add-a-metric.md", {}, here)
    assert names["half_mass"](names["maps"]).tolist()[:2] == [0.25, 0.5]
    assert names["half_mass"](names["maps"])[2].isnan()
    rows = Dataset.from_list([{"place": place} for place in range(8)])
    found = names["evaluator"](names["model"], rows, lambda kept: {"pixel_values": torch.zeros(len(kept), 3, 32, 32)})
    assert 0 < found["half_mass"] <= 1
    assert "random" in capsys.readouterr().out


def test_add_a_figure():
    names = pages.run("docs/add-a-figure.md", {})
    explanation = names["explanation"]
    figure = names["draw_order"](explanation)
    (line,) = (line for line in figure.axes[0].lines if len(line.get_xdata()) > 2)
    assert abs(line.get_ydata()[-1] - float(explanation.logits.max())) < 1e-4
    assert Path("order.png").is_file()


def test_figures(capsys):
    several = tuple(Interval(1 - step / 16, 0.9 - step / 16, 1, 8) for step in range(17))
    curves = {name: {"insertion": several, "deletion": several} for name in ("shapadapter", "random")}
    Path("evaluation").mkdir()
    saved = Evaluation({"curves_read": "probability"}, {}, {}, {}, {}, curves)
    saved.save("evaluation/evaluation.json")
    points = tuple(CostPoint(name, 0, 2.0, (0.5,), several[0]) for name in ("shapadapter", "gradient"))
    replace(saved, cost_curve=points).save("at-cost/evaluation.json")
    here = {
        "files[32]": "files[3]",
        "(32)": "(3)",
        "(32,": "(3,",
        ", 32": ", 3",
        "=32": "=3",
        "images[32]": "images[3]",
        ".top(2)[32]": ".top(2)[3]",
        "range(0, 36, 3)": "range(0, 12, 3)",
        "refine=512": "refine=16",
        "2048": "16",
        "num_train_epochs=15": "max_steps=3, use_cpu=True, disable_tqdm=True",
    }
    names = pages.run("docs/figures.md", {}, here)
    assert names["means"].counts.sum() == 12
    assert names["pixels"].shape == (8 * ROWS, 8 * ROWS, 3)
    assert len(capsys.readouterr().out) > 20
    drawn = set(re.findall(r"figures/(\w+)\.png", (pages.DOCS / "figures.md").read_text(encoding="utf-8")))
    assert all(Path(f"{name}.png").is_file() for name in drawn)


def test_removal_operators():
    names = pages.run("docs/concepts/removal-operators.md", {})
    kept = names["pixels_of"](names["present"], (8, 8), (64, 64))[0]
    for title, shown in names["shown"].items():
        assert torch.equal(shown[0][:, kept], names["pixels"][0][:, kept]), title
    with Image.open("removal.png") as picture:
        assert picture.width > 1000


def test_reference():
    model = wrapped(ROWS)
    model.train()
    names = {"model": model, "pixels": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}
    names["generator"] = torch.Generator().manual_seed(0)
    pages.run("docs/reference.md", names)
    assert names["loss"].isfinite()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_train_at_scale():
    """What needs no other package; `test_every_block.py` lists the rest."""
    with tarfile.open(shards() / "0.tar", "w") as shard:
        for number, picture in enumerate(pictures(4)):
            picture.save(f"{number}.jpg")
            Path(f"{number}.json").write_text(json.dumps({"label": number}))
            for kind in ("jpg", "json"):
                shard.add(f"{number}.{kind}")
    model, rows = wrapped(ROWS), rows_of(8)
    model.config.id2label = dict(enumerate(CLASSES))
    args = ShapleyTrainingArguments("run", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    names = {
        "model": model,
        "processor": processor(ROWS),
        "args": args,
        "dataset": {"train": rows},
        "views": lambda image: image.rotate(90),
        "trainer": ShapleyTrainer(model, args, train_dataset=rows, processing_class=processor(ROWS)),
    }
    here = {'ShapleyTrainingArguments("out", max_steps=1000)': "args", 'report_to="tensorboard"': "use_cpu=True"}
    pages.run("docs/train-at-scale.md", names, here, skip=("BitsAndBytesConfig", "torchvision", "albumentations"))
    assert names["trainer"].train_dataset is not rows
    row = next(iter(names["stream"]))
    assert row["label"] == 0
    assert "bytes" in row["jpg"]
    assert names["arguments"].metric_for_best_model == "eval_error"
    assert not names["arguments"].greater_is_better


def shards():
    folder = Path("shards")
    folder.mkdir()
    return folder
