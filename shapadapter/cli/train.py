"""`shapadapter train`: checks what was asked, and hands over to accelerate."""

from __future__ import annotations

import json as json_format
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from shapadapter.cli.options import MORE, Say, command, unknown, warn

PATIENCE = 15.0  # seconds that the processes have to end after an interruption


def launch(module: str, arguments: list[str], config: Path | None, *, quiet_output: bool) -> int:
    """Run `python -m module` in as many processes as accelerate is configured for; returns the exit code.

    They are a process group of their own: whoever interrupts this command, by Ctrl-C or by a signal to it alone, interrupts
    all of them, and no training is left behind.
    """
    chosen = [] if config is None else ["--config_file", str(config)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *chosen, "-m", module, *arguments]
    # What a cluster or a closed terminal sends counts as a Ctrl-C; what is ignored (`nohup`) stays so.
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ends = [number for number in ends if signal.getsignal(number) == signal.SIG_DFL]
    for number in ends:
        signal.signal(number, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=sys.__stderr__ if quiet_output else None, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt all processes; those that do not end within `PATIENCE`, or before a second Ctrl-C, are killed."""
    deadline = time.monotonic() + PATIENCE
    try:
        there = _signal(process, signal.SIGINT)
        while there and time.monotonic() < deadline:
            time.sleep(0.1)
            process.poll()
            there = _signal(process, 0)
    except KeyboardInterrupt:
        pass
    _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to all processes, 0 for none; returns whether there was one to take it."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)  # it leads its group
        elif number:
            process.terminate()
    except (ProcessLookupError, PermissionError):
        return False
    return hasattr(os, "killpg") or process.poll() is None


MODULE = "shapadapter.training.script"

# Arguments of the script that have another name here.
OWN = {"model_name_or_path": "--model", "output_dir": "--output", "image_folder": "--data", "dataset_name": "--data"}


@command("Go on with the same command and --resume-from-checkpoint last.")
def train(
    say: Say,
    model: Annotated[str, typer.Option(help="Vision model to start from: on the Hub, or a folder.")],
    data: Annotated[
        str, typer.Option(help="Folder with a subfolder of images for each class, or a data set on the Hub.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for adapter, checkpoints and explanations.")],
    launch_config: Annotated[
        Path | None,
        typer.Option(
            "--launch", help="File of `accelerate config`: which GPUs, FSDP, DeepSpeed; by default all GPUs."
        ),
    ] = None,
) -> None:
    """Fine-tune a vision model that explains itself, on one CPU or many GPUs, through accelerate.

    Every argument of ShapleyTrainingArguments is an option, too: --num-train-epochs 3, --bf16, --shapley-weight 10,
    --push-to-hub; so are --prediction, --tune, --lora-rank, --streaming, --label-column, --train-split, --test-split and
    --explained-images. --resume-from-checkpoint last goes on where a run stopped, --overwrite starts again in its folder.
    """
    if find_spec("datasets") is None:
        raise ImportError('Training needs datasets: pip install "shapadapter[train]"')
    from shapadapter.training.script import beside, check_data, check_model, check_output, parser

    script = parser()
    given = [*as_arguments(say.context.meta.get(MORE, {}), script), *say.context.args]
    check_model(model)
    check_data(data)
    for name in (model, data):
        doubt = beside(name)
        if not Path(name).is_dir() and (name == data or doubt):
            warn(f"{name} is not a folder here: looking for it on the Hub.{doubt}")
    where = "--image_folder" if Path(data).is_dir() else "--dataset_name"
    arguments = ["--model_name_or_path", model, where, data, "--output_dir", str(output), *given]
    asked = check(arguments, given, script)
    check_output(Path(asked.output_dir), asked.resume_from_checkpoint, asked.overwrite)
    if launch_config is not None and not launch_config.is_file():
        raise FileNotFoundError(f"There is no file {launch_config}.")
    if launch(MODULE, arguments, launch_config, quiet_output=say.as_json):
        typer.echo("Error: the training failed; see the output above.", err=True)
        raise typer.Exit(1)
    results = output / "all_results.json"
    metrics = json_format.loads(results.read_text("utf-8")) if results.is_file() else {}
    say({"output": str(output), "metrics": metrics}, f"Done: {output}. Next: shapadapter explain {output} IMAGES")


def as_arguments(values: dict[str, Any], script: Any) -> list[str]:
    """Values of a yaml file as words of a command line, for a parser."""
    words: list[str] = []
    for name, value in values.items():
        action = script._option_string_actions.get(f"--{name}")
        if value is None:
            continue
        if isinstance(value, list) and getattr(action, "nargs", None) != "+":
            value = ",".join(map(str, value))
        listed = value if isinstance(value, list) else [json_format.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, listed)]
    return words


def check(arguments: list[str], given: list[str], script: Any) -> Any:
    """Refuse, before anything starts, arguments that nobody knows or whose values make no sense; else their values."""
    known = {option.lstrip("-").replace("-", "_") for option in script._option_string_actions} - {"h", "help"}
    for word in given:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if not word.startswith("--") and (not word.startswith("-") or re.fullmatch(r"-[\d.]+([eE][+-]?\d+)?", word)):
            continue
        if name in OWN:
            raise typer.BadParameter(f"{word} is {OWN[name]} here.")
        if name not in known or not word.startswith("--"):
            raise typer.BadParameter(unknown(name.replace("_", "-"), known | {"launch", "json"}))

    def refuse(message: str) -> None:
        """Say as typer does what argparse has to object."""
        raise typer.BadParameter(message)

    script.error = refuse
    asked, rest = script.parse_known_args(arguments)
    if rest:
        raise typer.BadParameter(f"Unexpected argument {rest[0]!r}.")
    return asked
