"""The texts of a Space: its README, its program and its requirements."""

from __future__ import annotations

from importlib import metadata

import yaml

import shapadapter
from shapadapter import installing
from shapadapter.card.escaping import words

from .sources import Source

GRADIO = "6.31.0"
"""The release a Space gets where none is installed: the one the app was last tested with."""

APP = '''\
"""A demo app: `python app.py` runs it here, and on the Hub it starts by itself."""

from pathlib import Path

from shapadapter.hub.space.app import build_app, launch

HERE = Path(__file__).parent
app = build_app(
    {arguments},
)

if __name__ == "__main__":
    launch(app)
'''

BODY = """\
# {title}

Upload a picture, see what the model takes it for, and click a class to see which patches speak for it and which against.

{origin}

Run it on your own machine:

```bash
pip install -r requirements.txt
python app.py
```

Written by shapadapter {version}.
"""


def readme(source: Source, title: str, license: str | None) -> str:
    """README.md, whose header is what the Hub reads."""
    header = {
        "title": title,
        "emoji": "🔎",
        "colorFrom": "red",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": _installed("gradio") or GRADIO,
        "python_version": "3.12",
        "app_file": "app.py",
        "pinned": False,
        "models": list(source.models),
        "tags": ["shapadapter", "image-classification", "explainability", "shapley-values"],
    }
    known = {"license": license} if license is not None else {}
    used = {name: value for name, value in {**header, **known}.items() if value != []}
    written = yaml.safe_dump(used, sort_keys=False, allow_unicode=True, width=10_000)
    models = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in source.models)
    origin = f"Made with {models}." if models else "The model is in this repository."
    return f"---\n{written}---\n\n" + BODY.format(title=words(title), origin=origin, version=shapadapter.__version__)


def program(source: Source, title: str, revision: str | None, examples: bool) -> str:
    """app.py; every text in it is a Python literal."""
    arguments = [repr(source.name) if source.adapter is None else 'HERE / "adapter"']
    arguments += ['base=HERE / "base"'] if source.base is not None else []
    arguments += [f"revision={revision!r}"] if revision is not None else []
    arguments += [f"title={title!r}"]
    arguments += ['examples=sorted((HERE / "examples").iterdir())'] if examples else []
    return APP.format(arguments=",\n    ".join(arguments))


def requirements(source: Source) -> str:
    """requirements.txt; gradio is not in it where the header's `sdk_version` brings it."""
    asked = installing.requirements(("app", "timm") if source.timm else ("app",), shapadapter.__version__)
    pinned = {name: f"{name}=={_installed(name)}" for name in ("transformers", "peft")}
    return "\n".join([*(one for one in asked if not one.startswith(tuple(pinned))), *pinned.values()]) + "\n"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
