"""What a Space is made of: the checkpoint, its base, and the texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

import shapadapter
from shapadapter.adapter.config import check_files
from shapadapter.adapter.registration import NAME
from shapadapter.core import installation as installing
from shapadapter.core.documents import read_json
from shapadapter.core.errors import ShapleyError
from shapadapter.core.links import refuse_links
from shapadapter.hub.card.facts import text, words
from shapadapter.hub.card.render import card_metadata
from shapadapter.hub.load import find_base
from shapadapter.hub.locate import AdapterFiles
from shapadapter.hub.remote import BASE_FILES, PROCESSOR_FILES, is_path
from shapadapter.hub.upload import copy_files, own_code


@dataclass(frozen=True)
class Source:
    """Where a Space finds its model.

    Attributes:
        name: the checkpoint on the Hub, or the name of its folder.
        adapter: its folder here, None if it stays on the Hub.
        base: the folder of its base model here, None if that stays on the Hub or is not known.
        models: names of models on the Hub.
        license: that the checkpoint's card states, if it is here and does.
        timm: whether the base is one of timm's.
    """

    name: str
    adapter: Path | None
    base: Path | None
    models: tuple[str, ...]
    license: str | None = None
    timm: bool = False

    @classmethod
    def of(cls, checkpoint: str | Path) -> Source:
        """Look at a checkpoint, without asking the Hub.

        Raises:
            ShapleyError: there is no such folder, it holds no adapter of ours, or its base is not there.
            CheckpointError: its files are damaged, or links out of the folder.
        """
        folder, name = Path(checkpoint), str(checkpoint)
        if not folder.is_dir():
            return cls(_hub_name(name), None, None, (name,))
        refuse_links(folder)
        config = _config(folder)
        AdapterFiles(str(folder), folder).config()  # what could not be loaded is not shown
        base = find_base(folder, str(config["base_model_name_or_path"]))
        local = Path(base) if (Path(base) / "config.json").is_file() else None
        if local is not None and not any(local.glob("model*.safetensors")):
            raise ShapleyError(f"The base model {local} has no safetensors file; pickles are not copied.")
        if local is not None and (code := own_code(local)):
            raise ShapleyError(
                f"The base model {local} comes with code of its own ({', '.join(code)}), which is not copied, and which the "
                "app would not run: this adapter cannot be shown."
            )
        return cls(
            name=folder.resolve().name,
            adapter=folder,
            base=local,
            models=() if local is not None else (_hub_name(base),),
            license=text(card_metadata(folder).get("license")),
            timm="timm" in str((config.get("auto_mapping") or {}).get("parent_library")),
        )

    def copy(self, target: Path) -> None:
        """Copy what is here: adapter into `adapter/`, base into `base/`; model and processor files alone."""
        if self.adapter is not None:
            (target / "adapter").mkdir()
            copy_files(self.adapter, target / "adapter", (SAFETENSORS_WEIGHTS_NAME,))
            processor = AdapterFiles(str(self.adapter), self.adapter).processor()
            copy_files(processor, target / "adapter", PROCESSOR_FILES)
            config = _config(self.adapter)
            # Nobody else has the author's folder, nor need they know its name.
            config |= {"base_model_name_or_path": "base"} if self.base is not None else {}
            (target / "adapter" / CONFIG_NAME).write_text(
                json.dumps(config, indent=2, sort_keys=True), encoding="utf-8"
            )
        if self.base is not None:
            (target / "base").mkdir()
            copy_files(self.base, target / "base", BASE_FILES)


def _hub_name(name: str) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError:
        valid = False
    else:
        valid = not is_path(name)
    if not valid:
        raise ShapleyError(f"There is no folder {name}, and it cannot be a name on the Hub, which reads user/name.")
    return name


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        CheckpointError: it is damaged, or the weights beside it are.
        ShapleyError: it is missing or of another kind of adapter, or there are no safetensors beside it.
    """
    file = folder / CONFIG_NAME
    config: dict[str, Any] = read_json(file) if file.exists() else {}
    if config.get("peft_type") != NAME or not config.get("base_model_name_or_path"):
        raise ShapleyError(f"{folder} holds no adapter of shapadapter that names its base model in {CONFIG_NAME}.")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ShapleyError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; other weights are not read.")
    check_files(file, config)
    return config


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
