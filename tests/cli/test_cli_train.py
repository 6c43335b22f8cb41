"""`shapadapter train`: what is checked before anything starts, and a training that is stopped and goes on."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("datasets")

import datasets
from commands import error_of, run
from huggingface_hub import constants
from small import NAMES, pictures

from shapadapter.cli import train
from shapadapter.core.errors import ShapleyError
from shapadapter.training import script as finetune


@pytest.fixture
def launched(monkeypatch):
    """The words that accelerate would have been given."""
    calls = []
    monkeypatch.setattr(train, "launch", lambda *arguments, **_: calls.append(arguments) or 0)
    return calls


USUAL = ("train", "--model", "base", "--data", "photos", "--output", "trained")


def test_training_arguments_come_from_file_and_command_line(launched, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(
        "model: base\ndata: photos\noutput: trained\nnum-train-epochs: 3\nbf16: true\nclass_weights: [1, 2]\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nlora_rank: 4\nlearning_rate: 1e-4\nreport_to: null\n"
    )
    run("train", "--config", config, "--num-train-epochs", 5, "--use-cpu")
    module, words, launcher = launched[0]
    assert (module, launcher) == ("shapadapter.training.script", None)
    args, training = finetune.parser().parse_args_into_dataclasses(words, look_for_args_file=False)
    assert (args.model_name_or_path, args.image_folder, args.lora_rank) == ("base", "photos", 4)
    assert (training.num_train_epochs, training.bf16, training.learning_rate) == (5, True, 1e-4)
    assert training.class_weights == [1.0, 2.0]
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    run("train", "--model", "base", "--data", "ada/beans", "--output", "o", "--launch", config)
    assert launched[1][1][2:4] == ["--dataset_name", "ada/beans"]
    assert launched[1][2] == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-train-epoch", "3"], "Did you mean 'num-train-epochs'?"),
        (["--num-train-epochs", "three"], "invalid float value: 'three'"),
        (["--output_dir", "x"], "--output_dir is --output here."),
        (["--prediction", "votes"], "votes"),
        (["-x"], "unknown option 'x'"),
        (["stray"], "Unexpected argument 'stray'"),
    ],
)
def test_wrong_training_arguments_never_start(launched, words, said):
    assert said in error_of(*USUAL, *words, code=2)
    assert launched == []


def test_a_failed_training_is_an_error(monkeypatch):
    monkeypatch.setattr(train, "launch", lambda *_, **__: 1)
    assert "the training failed" in error_of(*USUAL)
    assert "no file nowhere.yaml" in error_of(*USUAL, "--launch", "nowhere.yaml")


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("base", "photos/ant", "Expected photos/ant to hold a subfolder of images for each class"),
        ("base", "../shapez", "There is no folder ../shapez."),
        ("./bose", "photos", "There is no folder ./bose."),
        ("a/b/c", "photos", "There is no folder a/b/c."),
        ("out", "photos", "out is an adapter, not a model to start from: pass its base model, "),
    ],
)
def test_what_a_training_cannot_start_from_is_said_before_it_starts(launched, folder, model, data, said):
    told = error_of("train", "--model", model, "--data", data, "--output", "trained")
    assert said in told
    assert model != "out" or f"{folder / 'base'}." in told
    assert launched == []


def test_a_name_beside_folders_here_is_perhaps_a_path(launched):
    told = run("train", "--model", "photos/bose", "--data", "ada/beans", "--output", "trained").stderr
    assert "photos/bose is not a folder here: looking for it on the Hub. There is a folder photos here: check" in told
    assert "ada/beans is not a folder here: looking for it on the Hub.\n" in told
    assert len(launched) == 1


def test_the_script_says_what_is_missing(many, tmp_path, monkeypatch):
    def started(model, *data):
        words = ["--model_name_or_path", model, *data, "--output_dir", tmp_path / "new", "--use_cpu"]
        finetune.main(*finetune.parser().parse_args_into_dataclasses(list(map(str, words)), look_for_args_file=False))

    shutil.copytree(many / "ant", tmp_path / "one" / "ant")
    for folder in (many / "ant", tmp_path / "one"):
        with pytest.raises(ShapleyError, match="to hold a subfolder of images for each class"):
            started("base", "--image_folder", folder)
    with pytest.raises(ShapleyError, match=r"a column 'color' of classes .* got \['image', 'label'\]"):
        finetune.columns(datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(2)), "color", "x/y", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ShapleyError, match=r"photos/bose is no folder here\. .* folder photos here: check the path"
    ) as caught:
        started("photos/bose", "--image_folder", many)
    assert "\n" not in str(caught.value)


TINY = [
    "--per-device-train-batch-size",
    "4",
    "--save-steps",
    "1",
    "--use-cpu",
    "--report-to",
    "none",
    "--lora-rank",
    "4",
    "--card-images",
    "0",
]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough images for a fifth of them to be held out."""
    root = tmp_path_factory.mktemp("many")
    for place, picture in enumerate(pictures(20)):
        home = root / NAMES[place % 4]
        home.mkdir(exist_ok=True)
        picture.save(home / f"{place}.png")
    return root


@pytest.mark.slow
def test_a_training_through_accelerate(many, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--output", tmp_path / "new", *TINY, "--max-steps", 2, "--explained-images", 2]
    found = json.loads(run("train", "--model", folder / "base", "--data", many, *words, "--json").stdout)
    assert found["metrics"]["eval_accuracy"] >= 0
    assert (tmp_path / "new" / "explanations.html").is_file()
    assert run("explain", tmp_path / "new", many / "ant", "--json").exit_code == 0


def test_the_card_says_what_the_end_of_the_training_measured(many, folder, tmp_path):
    words = ["--model_name_or_path", folder / "base", "--image_folder", many, "--output_dir", tmp_path, *TINY]
    words += ["--max_steps", 1, "--explained_images", 0]
    finetune.main(*finetune.parser().parse_args_into_dataclasses(list(map(str, words)), look_for_args_file=False))
    accuracy = json.loads((tmp_path / "eval_results.json").read_text())["eval_accuracy"]
    assert f"| Accuracy ↑ | {accuracy:.3f} |" in (tmp_path / "README.md").read_text()


def test_weights_are_saved_before_they_are_measured(many, folder, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise OSError("the held-out images are gone")

    monkeypatch.setattr(finetune.ShapleyTrainer, "evaluate", failing)
    words = ["--model_name_or_path", folder / "base", "--image_folder", many, "--output_dir", tmp_path, *TINY]
    words += ["--max_steps", 1, "--explained_images", 0, "--save_strategy", "no"]
    with pytest.raises(OSError, match="gone"):
        finetune.main(*finetune.parser().parse_args_into_dataclasses(list(map(str, words)), look_for_args_file=False))
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_last_goes_on_where_a_run_stopped_or_starts_it(many, folder, tmp_path):
    def trained(steps):
        words = ["--model_name_or_path", folder / "base", "--image_folder", many, "--output_dir", tmp_path, *TINY]
        words += ["--max_steps", steps, "--resume_from_checkpoint", "last", "--explained_images", 0]
        finetune.main(*finetune.parser().parse_args_into_dataclasses(list(map(str, words)), look_for_args_file=False))
        return json.loads((tmp_path / f"checkpoint-{steps}" / "trainer_state.json").read_text())["global_step"]

    assert trained(1) == 1
    begun = (tmp_path / "checkpoint-1" / "adapter_model.safetensors").stat().st_mtime_ns
    assert trained(2) == 2
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").stat().st_mtime_ns == begun


@pytest.mark.slow
def test_whoever_interrupts_the_command_leaves_no_training_behind(tmp_path, monkeypatch):
    """Also by a signal to this process alone, of which the others would never hear."""
    said = tmp_path / "said"
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        "    pathlib.Path(sys.argv[1] + '-end').write_text('ended in order')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def interrupt():
        while not said.exists() or not said.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    usual = train.launch
    monkeypatch.setattr(train, "launch", lambda *_, **how: usual("sleeper", [str(said)], None, **how))
    threading.Thread(target=interrupt, daemon=True).start()
    found = run(*USUAL, code=130)
    assert "Go on with the same command and --resume-from-checkpoint last." in found.stderr
    assert Path(f"{said}-end").read_text() == "ended in order"
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
