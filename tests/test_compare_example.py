"""The benchmark as its reader runs it, at a size at which the numbers mean nothing."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from families import build
from PIL import Image

pytest.importorskip("mlxtend")
pytest.importorskip("captum")

# At the end: two scripts there have the names of modules here.
sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import compare
import rivals
import trainings

import shapadapter.demo.models
from shapadapter.demo.models import Scale
from shapadapter.explanation.methods import METHODS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_evaluation")]

TINY = Scale(50, 1, 1, 1, truth_images=1, truth_evaluations=64, budgets=(16, 32))
# Of each kind one: of the adapter, of attention, of gradients, of perturbations.
RIVALS = (rivals.DUO,)
FEW = ("shapadapter", "attention", "gradient_x_input", "leave_one_out")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


def run(output, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SCALES", {"demo, quick": TINY, "objects, quick": TINY})
        patch.setattr(compare, "methods", lambda: FEW)
        patch.setattr(compare, "RIVALS", RIVALS)
        compare.main(["--quick", "--output", str(output), *more])
    return (output / "report.md").read_text(), json.loads((output / "results.json").read_text())


def test_every_method_is_compared():
    assert set(compare.methods()) == set(METHODS) - {"exact"}
    assert compare.RIVALS == rivals.RIVALS


def test_everything_stands_in_the_report(output, monkeypatch):
    settings = []
    own = shapadapter.demo.models.ShapleyTrainingArguments

    def noted(*args, **kwargs):
        settings.append(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(shapadapter.demo.models, "ShapleyTrainingArguments", noted)
    report, results = run(output)
    for method in FEW:
        assert f"| {method} |" in report
    for objective in RIVALS:
        assert f"| {objective.name}, equal evaluations |" in report
    (found,) = results["runs"]
    assert set(found["accuracy"]) == {"ours", "plain"}
    ours, *others = found["rivals"]
    assert ours["error"] == found["refinement"]["error"]
    assert max(ours["efficiency_gap"]) < 1e-5
    for other in others:
        assert np.isfinite([*other["error"], *other["kernel_shap_error"], other["evaluations"]]).all()
        assert other["parameters"] > ours["parameters"]
    for budget in ("16", "32"):
        assert 0 <= min(found["refinement"]["coverage"][budget]) <= max(found["refinement"]["coverage"][budget]) <= 1
    for picture in ("curves.png", "evaluations.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    # The plain baseline and the rivals are trained as `tune` trains ours.
    recipe = trainings.RECIPE["demo"]
    for kwargs in settings:
        assert kwargs["per_device_train_batch_size"] == trainings.BATCH
        assert {**recipe["training"], **recipe["shapley"]}.items() <= kwargs.items()
    adapter = json.loads((output / "seed-0" / "ours" / "adapter_config.json").read_text())
    assert {name: adapter[name] for name in ("r", "lora_alpha")}.items() <= recipe["adapter"].items()


def test_nothing_is_done_twice(output, monkeypatch):
    before, _ = run(output)

    def never(*args, **kwargs):
        raise AssertionError("trained or measured again")

    for place, name in ((trainings, "fit"), (rivals, "fit"), (trainings, "tune"), (compare, "evaluate")):
        monkeypatch.setattr(place, name, never)
    after, _ = run(output)
    assert after == before


def test_other_settings_need_another_folder(output, monkeypatch):
    monkeypatch.setitem(trainings.RECIPE["demo"], "training", {"learning_rate": 1.0})
    with pytest.raises(SystemExit, match="other settings"):
        run(output)


def test_a_reader_brings_a_model_of_their_own(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys.modules[__name__], "FEW", ("shapadapter",))
    from objects import FOLDERS

    draw = np.random.default_rng(0)
    for place in {place for places in FOLDERS.values() for place in places}:
        for number in range(4):
            stamp = draw.integers(0, 255, (30, 40, 4), dtype=np.uint8)
            stamp[..., 3] = 255 * (draw.random((30, 40)) < 0.7)
            (tmp_path / "stamps" / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(stamp).save(tmp_path / "stamps" / place / f"{number}.png")
    build("dinov2", image_size=112, patch_size=14).save_pretrained(tmp_path / "base")
    given = ["--setting", "objects", "--base", str(tmp_path / "base"), "--stamps", str(tmp_path / "stamps"), "--bf16"]
    report, results = run(tmp_path / "out", *given, "--rivals", "none", "--seeds", "0", "1")
    assert "bfloat16" in report
    assert len(results["runs"]) == 2
    assert " ± " in report
    assert results["runs"][0]["evaluation"]["methods"]["shapadapter"]["energy_inside"]["mean"] > 0


@pytest.mark.parametrize("given", [["--setting", "objects"], ["--setting", "demo", "--bf16"]])
def test_settings_that_do_not_fit_are_refused(tmp_path, given, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, *given)
    assert "--base" in capsys.readouterr().err
