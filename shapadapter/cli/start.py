"""`shapadapter demo` and `inspect`: what a newcomer types first."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shapadapter.cli.messages import quiet, reporting
from shapadapter.cli.options import Base, Config, Device, Json, Revision, Subfolder, TrustRemoteCode
from shapadapter.core.phrases import one_line

if TYPE_CHECKING:
    from shapadapter.hub.inspection import Inspection

_SHOWN = 4
"""Modules that are named; json has all."""


def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, pictures and the report.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data, training and estimates.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run under a minute; its numbers mean little.")
    ] = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Run the main job on real digits: train, wrap, fine-tune, save, load, explain, compare with the truth."""
    hint = "What is in the output folder is complete; run the command again to start over."
    with reporting(context, json, hint) as say:
        for name in ("datasets", "mlxtend"):
            if find_spec(name) is None:
                raise ImportError(f'The demo needs {name}: pip install "shapadapter[demo]"')
        from shapadapter.demo import run

        rows = run(output, seed, quick)
        if json:
            say({"output": str(output), "rows": {name.strip(): value for name, value in rows}}, "")


def inspect(
    context: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(help="Adapter, or base model: a folder, or a name on the Hub.", show_default=False)
    ],
    subfolder: Subfolder = None,
    base: Base = None,
    revision: Revision = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Say what an adapter offers, or what wrapping a base model would give, and run the self-test again.

    The exit code is 1 for a model that is not supported.
    """
    with reporting(context, json) as say:
        from shapadapter.hub import inspection

        quiet()
        place: dict[str, Any] = {"subfolder": subfolder, "base": base, "revision": revision}
        found = inspection.inspect(checkpoint, device=device, trust_remote_code=trust_remote_code, **place)
        say(found.to_dict(), as_text(found))
    if not found.supported:
        raise typer.Exit(1)


def as_text(found: Inspection) -> str:
    """The facts as lines for people."""
    told = "passed" if found.supported else f"NOT SUPPORTED: {found.trouble}"
    rows = {
        "adapter" if found.adapter else "base model": found.name,
        "self-test": told,
        "family": f"{found.family} ({found.model_class})" if found.family else None,
        "players": f"{_by(found.players)} on images of {_by(found.image)} pixels" if found.players else None,
        "mechanism": f"{found.mechanism}, features of {found.features}" if found.mechanism else None,
        "removal": found.removal,
        **{f"  {name}": told for name, told in found.removals.items()},
        "prediction": found.prediction,
        "trained": _trained(found),
        "adapter size": _size(found),
        "classes": _classes(found),
        "base": _base(found),
        "written by": found.adapter and f"shapadapter {found.versions['written_by']}",
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items() if name != "written_by"),
        "record of": _record(found),
    }
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{one_line(str(value))}" for name, value in rows.items() if value)


def _by(numbers: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, numbers or ()))


def _trained(found: Inspection) -> str | None:
    if found.tune is None:
        return None
    hidden = len(found.lora_targets) - _SHOWN
    more = f" and {hidden} more" if hidden > 0 else ""
    words = {
        "lora": f"token, head, LoRA on {', '.join(found.lora_targets[:_SHOWN])}{more}",
        "frozen": "token and head",
        "full": "token, head and the whole backbone",
    }
    return words[found.tune]


def _size(found: Inspection) -> str | None:
    if found.adapter_bytes is None or found.adapter_parameters is None or not found.parameters:
        return None
    share = found.adapter_parameters / found.parameters
    return f"{found.adapter_parameters:,} parameters ({share:.1%} of the base), {found.adapter_bytes / 1e6:.1f} MB"


def _classes(found: Inspection) -> str | None:
    if found.kind == "matching":
        return "texts, given with the images"
    if found.classes is None:
        return None
    more = ", ..." if found.classes > len(found.class_names) else ""
    return f"{found.classes}: {', '.join(found.class_names)}{more}"


def _base(found: Inspection) -> str | None:
    return f"{found.base}, revision {found.base_revision or 'not recorded'}" if found.adapter else None


def _record(found: Inspection) -> str | None:
    """What the adapter knows of its making, by name; json has all of it."""
    return ", ".join(found.record) if found.adapter and found.record else None
