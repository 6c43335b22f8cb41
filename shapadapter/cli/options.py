"""What all commands share: options, also from a yaml file; results on the standard output, and errors in one line."""

from __future__ import annotations

import inspect
import json as json_format
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import date
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from shapadapter.core.phrases import as_options, did_you_mean, one_line

MORE = "shapadapter.more"
"""Where a command finds, in `context.meta`, the keys of the yaml file that are none of its own options."""

_SCALARS = (bool, int, float, str, date)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a yaml file as the defaults of the command's options."""
    if path is None or context.resilient_parsing:
        return path
    names = {
        option.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for option in parameter.opts
    }
    given = _load(path)
    more = {key: value for key, value in given.items() if key not in names or key in ("config", "help")}
    if more and not context.ignore_unknown_options:
        raise typer.BadParameter(f"{unknown(next(iter(more)), names)} (in {path})")
    context.meta[MORE] = more
    context.default_map = {
        names[key].name: _as_words(key, value, names[key]) for key, value in given.items() if key not in more
    }
    return path


def unknown(name: str, known: Iterable[str]) -> str:
    """Say that an option is unknown, and which one may be meant."""
    options = [option.replace("_", "-") for option in known if option not in ("config", "help")]
    return f"unknown option {name!r}. {did_you_mean(name.replace('_', '-'), options) or 'See --help.'}"


def _load(path: Path) -> dict[str, Any]:
    import yaml

    from shapadapter.core.documents import read_yaml
    from shapadapter.core.errors import CheckpointError

    try:
        found = read_yaml(path)
    except yaml.constructor.ConstructorError as error:
        raise typer.BadParameter(
            f"{path} asks for more than plain yaml ({error.problem}), which could run code. Write plain names and values."
        ) from error
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from error
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise typer.BadParameter(f"Expected options in {path}, one on a line, such as 'top-k: 3'.")
    return {key.replace("-", "_"): value for key, value in found.items()}


def _as_words(key: str, value: Any, parameter: Any) -> Any:
    """A value as it would be typed on the command line, which then checks it."""
    several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    flag = getattr(parameter, "is_flag", False)
    if value is None or (isinstance(value, bool) and flag):
        return value
    if isinstance(value, list) and all(isinstance(part, _SCALARS) for part in value):
        return [str(part) for part in value] if several else ",".join(map(str, value))
    if not isinstance(value, _SCALARS) or flag:
        wanted = "true or false" if flag else "a value or a list of values"
        raise typer.BadParameter(f"Expected {wanted} for {key!r}, got {type(value).__name__}.")
    return [str(value)] if several else str(value)


# The groups of options in `--help`, beside a command's own.
LOADING: dict[str, Any] = {"rich_help_panel": "Loading"}
OUTPUT: dict[str, Any] = {"rich_help_panel": "Output"}
GENERAL: dict[str, Any] = {"rich_help_panel": "General"}

Checkpoint = Annotated[str, typer.Argument(help="Folder of the adapter, or its name on the Hub.")]
Folder = Annotated[Path, typer.Argument(help="Folder of the adapter.")]
Texts = Annotated[
    list[str] | None, typer.Option(help="A text, for a model that matches images with texts; may be repeated.")
]

_LEVELS = ("gradient", "until")


def _level(word: str | int | None) -> str | int | None:
    """What `explain` takes as `refine`, from a word; None for the default."""
    if word is None or word in _LEVELS:
        return word
    try:
        number = int(word)
    except ValueError:
        number = -1
    if number < 0:
        raise typer.BadParameter(
            f"Expected {', '.join(_LEVELS)}, or a number of evaluations, such as 0; got {word!r}."
        )
    return number


Refine = Annotated[
    str | None,
    typer.Option(
        help="Level of the maps: 0 for one forward pass; gradient for a backward pass of each shown class, too, by default "
        "where the model supports it and at most 10 classes are shown; a number of further evaluations, or until for as "
        "many as an error of 10 % takes.",
        metavar="gradient|until|N|0",
        callback=_level,
    ),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the base model. Read it first.", **LOADING),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter on the Hub.", **LOADING)]

# Options that several commands take together, each with its default.
PLACE: dict[str, tuple[Any, Any]] = {
    name: (Annotated[str | None, typer.Option(help=words, **LOADING)], None)
    for name, words in {
        "subfolder": "Where in that folder or repository the adapter is; by default at the top.",
        "base": "Base model, if it is not where the adapter says: a folder or name.",
        "revision": "Branch, tag or commit of the adapter on the Hub.",
        "device": "cpu, cuda, cuda:1, ...; by default a GPU if there is one.",
        "dtype": "float32, bfloat16 or float16; by default as the base was saved.",
    }.items()
} | {"trust_remote_code": (TrustRemoteCode, False)}
_GENERAL: dict[str, tuple[Any, Any]] = {
    "json": (
        Annotated[bool, typer.Option("--json", help="Print json and nothing else on the standard output.", **GENERAL)],
        False,
    ),
    "config": (
        Annotated[
            Path | None,
            typer.Option(
                help="Options from a yaml file; those of the command line win.",
                callback=read_config,
                is_eager=True,
                **GENERAL,
            ),
        ],
        None,
    ),
}


def without(group: Mapping[str, tuple[Any, Any]], *names: str) -> dict[str, tuple[Any, Any]]:
    """A group of options but for some."""
    return {name: option for name, option in group.items() if name not in names}


def command(
    hint: str = "Run the command again to start over.", **groups: Mapping[str, tuple[Any, Any]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes `say`; it gets --json and --config, and each group of options as a dict."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        """The function that typer calls."""

        @wraps(function)
        def run(*, context: typer.Context, json: bool, config: Path | None, **given: Any) -> None:
            """Put the options of each group together."""
            together = {name: {option: given.pop(option) for option in group} for name, group in groups.items()}
            with reporting(context, json, hint) as say:
                function(say, **given, **together)

        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
        for own in list(inspect.signature(function, eval_str=True).parameters.values())[1:]:
            expanded = groups.get(own.name, {own.name: (own.annotation, own.default)})
            parameters += [inspect.Parameter(n, kind, default=d, annotation=a) for n, (a, d) in expanded.items()]
        parameters += [inspect.Parameter(n, kind, default=d, annotation=a) for n, (a, d) in _GENERAL.items()]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


# -- what is said -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Say:
    """Prints results on the standard output, `stream`: json, if that is wanted, or text."""

    stream: TextIO
    as_json: bool
    context: typer.Context

    def __call__(self, data: Any, text: str) -> None:
        """Print a result: what json takes, or the text for people."""
        # It may name files, and classes called as folders.
        readable = text.encode("utf-8", "backslashreplace").decode()
        typer.echo(json_format.dumps(data, allow_nan=False) if self.as_json else readable, file=self.stream)


@contextmanager
def reporting(context: typer.Context, as_json: bool, hint: str) -> Iterator[Say]:
    """Run a command: what goes wrong is said in one line, with exit code 1; an interruption has 130."""
    say = Say(sys.stdout, as_json, context)
    options = {name.lstrip("-").replace("-", "_"): name for one in context.command.params for name in one.opts}
    try:
        with redirect_stdout(sys.stderr if as_json else say.stream), as_options(options):
            yield say
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. {hint}", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        from shapadapter.core.errors import ShapleyError

        # What the Hub's client raises where nobody answers, if it is in use at all.
        client = sys.modules.get("huggingface_hub.utils")
        network = () if client is None else (client.httpx.HTTPError,)
        # These are the user's to mend; others are ours, and keep their traceback.
        if not isinstance(error, (ShapleyError, ImportError, OSError, ValueError, *network)):
            raise
        typer.echo(f"Error: {one_line(error) or type(error).__name__}", err=True)
        raise typer.Exit(1) from None


def warn(text: str) -> None:
    """Say something beside the result."""
    typer.echo(one_line(text), err=True)


def quiet() -> None:
    """Leave out what other libraries tell each other: bars of loading weights, and what will be renamed one day."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft)")
