"""Load an adapter from a folder or from the Hub, at the top or in a subfolder, with its base model and processor."""

from __future__ import annotations

import glob
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoProcessor, PreTrainedModel

from shapadapter.adapter import ShapleyConfig
from shapadapter.adapter.registration import NAME
from shapadapter.core.documents import read_json, shown
from shapadapter.core.errors import CheckpointError, ShapleyError
from shapadapter.core.files import refuse_link, refuse_links
from shapadapter.core.phrases import argument, reason, some
from shapadapter.core.remote import HUB_ERRORS, PROCESSOR_FILES, find_base, hub_trouble, is_path
from shapadapter.data.processors import load_processor
from shapadapter.explanation.game import active_layer


def load(
    checkpoint: str | Path,
    *,
    subfolder: str | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load an adapter on its base model, and the processor that goes with them.

    Weights are read from safetensors only. From the Hub come the adapter's two files, the processor's, and the base model.

    Args:
        checkpoint: the folder of an adapter, or its name on the Hub.
        subfolder: where in it the adapter is, if not at the top: PEFT saves one of another name than "default" in a folder
            of that name.
        base: the base model's folder or name on the Hub, where that is not what the adapter says. Its weights must be the
            same.
        revision: branch, tag or commit of the adapter's repository; that of the base is written in the adapter.
        device: e.g. `"cpu"` or `"cuda:1"`; None for the GPU if there is one.
        dtype: of the base's weights, e.g. `torch.bfloat16` or `"bfloat16"`; None as they were saved. The adapter's own
            stay as they are.
        token: for private repositories; None for that of `hf auth login`.
        trust_remote_code: whether a base with code of its own on the Hub may run it here.

    Returns:
        The wrapped model, in eval mode, and its image processor; for a model that matches images with texts, the
        processor of both.

    Raises:
        ShapleyError: there is no such adapter or base model, it may not be seen, or its weights are no safetensors.
        CheckpointError: a file is damaged or a link out of its folder, or the base is not the one of the adapter.
    """
    place, kind = _device(device), _dtype(dtype)
    files = locate(str(checkpoint), subfolder, revision, token)
    config = files.config()
    root, recorded = _root(files, config, base)
    commit = _pinned(files.name, root, recorded, token)
    options: dict[str, Any] = {"revision": commit, "token": token, "trust_remote_code": trust_remote_code}
    base_model = _base_model(files.name, root, config, {**options, "dtype": kind})
    try:
        model = PeftModel.from_pretrained(base_model, str(files.folder)).eval()
    except ShapleyError:
        raise
    except Exception as error:  # whatever PEFT makes of values that are of the right kind and mean nothing to it
        raise CheckpointError(
            f"The adapter {files.name} does not fit its base model {root}: {reason(error)}"
        ) from error
    own = files.processor()
    # Code that comes with an adapter never runs: what is trusted is the base.
    options = options if own is None else {"trust_remote_code": False}
    return model.to(place), _processor(model, str(own or root), options, own is not None)


def _root(files: AdapterFiles, config: Any, base: str | Path | None) -> tuple[str, str | None]:
    """Where the base model is, and its revision if it is the one the adapter recorded."""
    if base is not None:
        if is_path(str(base)) and not (Path(base) / "config.json").is_file():
            raise ShapleyError(f"{argument('base', str(base))} holds no model: expected config.json in it.")
        return str(base), None
    recorded = config.base_model_name_or_path
    if not recorded:
        raise ShapleyError(
            f"The adapter {files.name} does not name its base model. Say where it is: {argument('base')}"
        )
    if not files.fetched:
        try:
            return find_base(files.folder, str(recorded)), config.revision
        except ShapleyError as error:
            raise ShapleyError(f"{error} Or say where it is: {argument('base')}") from error
    if is_path(str(recorded)):
        raise ShapleyError(
            f"The adapter {files.name} names as its base model {recorded}, a local folder on its author's machine. If "
            f"you have that model, say where: {argument('base')} Its author can push both: push(folder, repo_id, base_repo_id=...) "
            "of shapadapter.hub."
        )
    return str(recorded), config.revision


def _pinned(name: str, root: str, revision: str | None, token: str | bool | None) -> str | None:
    """The commit of the base model, so that all its files are of the same one; None for a folder, without links out of it."""
    folder = Path(root)
    if folder.is_dir():
        for path in folder.iterdir():
            # Weights are nobody's secret if the adapter was made for them.
            if path.suffix != ".safetensors" and not path.is_dir():
                refuse_link(path, folder)
        return None
    try:
        return HfApi().resolve_revision(root, revision=revision, token=token).resolved
    except HUB_ERRORS as error:
        raise ShapleyError(_why_no_base(name, root, revision, error)) from error


def _base_model(name: str, root: str, config: Any, options: dict[str, Any]) -> Any:
    """The base model, without the adapter."""
    # A new classifier is saved with the adapter; the base model must have room for its classes.
    new_head = config.prediction == "classifier" and config.modules_to_save
    room = {"num_labels": config.num_classes, "ignore_mismatched_sizes": True} if new_head else {}
    maker = getattr(transformers, (config.auto_mapping or {}).get("base_model_class", ""), None)
    if not (isinstance(maker, type) and issubclass(maker, PreTrainedModel)):
        maker = AutoModelForImageClassification
    try:
        return maker.from_pretrained(root, use_safetensors=True, **room, **options)
    except Exception as error:  # of a damaged file transformers says what its parsers say, of many kinds
        raise ShapleyError(_why_no_base(name, root, options["revision"], error)) from error


def _why_no_base(name: str, root: str, revision: str | None, error: BaseException) -> str:
    trouble = None if Path(root).is_dir() else hub_trouble(error, root, revision)
    if trouble is not None:
        remedy = (
            f"If its weights are unchanged elsewhere, {argument('base', root, of='load')} takes its newest revision."
            if "has no revision" in trouble
            else f"Put its folder beside the adapter, or say where it is: {argument('base')}"
        )
        return f"The base model {root} of the adapter {name} is not there. {trouble} {remedy}"
    if "safetensors" in str(error):
        return (
            f"The base model {root} has no safetensors file, and pickles are not read. Convert it once, if you trust it: "
            f"AutoModelForImageClassification.from_pretrained({root!r}).save_pretrained('base'), its processor likewise; "
            f"then {argument('base', 'base', of='load')}."
        )
    if "trust_remote_code" in str(error):
        return comes_with_code(root)
    return f"The base model {root} of the adapter {name} cannot be loaded: {reason(error)}"


def comes_with_code(base: str) -> str:
    """What to say where transformers refuses to run the code of a base model."""
    return (
        f"The base model {base} comes with code of its own, which would run here. Read it, and if you trust it, "
        f"{argument('trust_remote_code', True, of='load')}."
    )


def _processor(model: Any, place: str, options: dict[str, Any], adapters_own: bool) -> Any:
    """The processor in a folder or a repository, the adapter's or the base model's."""
    maker: Any = AutoProcessor if active_layer(model).anatomy.kind == "matching" else AutoImageProcessor
    try:
        return load_processor(place, maker, **options)
    except ShapleyError:
        raise
    except Exception as error:  # as above
        hub_trouble(error, place)  # for the credentials in it
        if "trust_remote_code" not in str(error):
            raise ShapleyError(
                f"There is no image processor with the adapter or in {place}: {reason(error)} Save one with the "
                "adapter: processor.save_pretrained(folder)."
            ) from error
        if not adapters_own:
            raise ShapleyError(comes_with_code(place)) from error
        raise ShapleyError(
            f"The image processor in {place} comes with code of its own, which is not run. Save one of transformers' with "
            "the adapter: processor.save_pretrained(folder)."
        ) from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ShapleyError(f"There is no device {str(device)!r} here: {reason(error)}") from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ShapleyError(f"dtype must be a torch.dtype or its name, such as 'bfloat16', got {dtype!r}.")
    return found if isinstance(found, torch.dtype) else "auto"


# -- the files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter."""

    source: str  # the folder that was asked for, or the name on the Hub
    root: Path  # that folder, or the one with what was fetched
    subfolder: str = ""  # where in it the adapter is, with slashes; empty for the top
    token: str | bool | None = field(default=None, repr=False)  # for the Hub; of no meaning for a folder

    @property
    def folder(self) -> Path:
        """Where `adapter_config.json` should be."""
        return self.root / self.subfolder

    @property
    def name(self) -> str:
        """What the adapter is called in messages."""
        return called(self.source, self.subfolder)

    @property
    def fetched(self) -> bool:
        """Whether they came from the Hub."""
        return self.root != Path(self.source)

    def config(self) -> Any:
        """The adapter's configuration, after a look at what kind of adapter it is and whether its weights are there."""
        refuse_links(self.root, self.subfolder)
        file = self.folder / CONFIG_NAME
        if not file.is_file():
            raise ShapleyError(
                f"{self.name} holds no adapter: expected {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}.{self.elsewhere()}"
            )
        try:
            kind = read_json(file).get("peft_type")
        except CheckpointError as error:
            raise CheckpointError(f"{CONFIG_NAME} of {self.name} is damaged: {error}") from error
        if kind != NAME:
            other = shown(kind).strip("'")
            raise ShapleyError(
                f"{self.name} is an adapter of type {other}, not one of shapadapter. Load it with peft.AutoPeftModel."
            )
        if not (self.folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            why = " The adapter is incomplete."
            if (PurePosixPath(self.subfolder) / WEIGHTS_NAME).as_posix() in self._listed():
                why = (
                    f" Its {WEIGHTS_NAME} is a pickle, which can run code of its author's when it is opened, and is not read. "
                    "Ask for a safetensors file: model.save_pretrained(folder) writes one."
                )
            raise ShapleyError(f"{self.name} holds no {SAFETENSORS_WEIGHTS_NAME}.{why}")
        return ShapleyConfig.from_pretrained(str(self.root), subfolder=self.subfolder or None)

    def processor(self) -> Path | None:
        """The folder with the processor that was saved with the adapter, or with all adapters beside it; None without.

        A folder here may be that of an adapter with a name, whose processor is in the folder above; a model's own is not.
        """
        above = self.root.resolve().parent
        alone = self.fetched or self.subfolder or (above / "config.json").is_file()
        places = (self.folder, self.root if alone else above)
        found = next((place for place in places if any((place / f).is_file() for f in PROCESSOR_FILES[:2])), None)
        if found == places[1]:  # the folder itself has been looked at
            refuse_links(found)
        return found

    def elsewhere(self) -> str:
        """Where below the root there are adapters, and what to type for one of them; nothing if there are none."""
        end = f"/{CONFIG_NAME}"
        found = sorted(file.removesuffix(end) for file in self._listed() if file.endswith(end))
        if not found:
            return ""
        there = f" There {'is one' if len(found) == 1 else 'are some'} in {some(called(self.source, one) for one in found)}."
        typed = next((inner for inner in found if _inside(inner) == inner), None)
        return f"{there} Say which: {argument('subfolder', typed, of='load')}." if self.fetched and typed else there

    def _listed(self) -> list[str]:
        """Paths from the root of adapters' files; of a repository those that were fetched, if the Hub cannot be asked."""
        if self.fetched:
            with suppress(*HUB_ERRORS):
                # The root is called like the commit.
                return HfApi().list_repo_files(self.source, revision=self.root.name, token=self.token)
        files = (*self.root.glob(f"*/{CONFIG_NAME}"), self.folder / WEIGHTS_NAME)
        return [path.relative_to(self.root).as_posix() for path in files if path.is_file()]


def called(source: str | Path, subfolder: str | None) -> str:
    """What an adapter in a subfolder is called in what is said and written about it."""
    return f"{str(source).rstrip('/')}/{subfolder}" if subfolder else str(source)


def refuse_revision(revision: str | None, folder: str | Path) -> None:
    """Refuse a revision of what is no repository."""
    if revision is not None:
        raise ShapleyError(
            f"{argument('revision', revision)} is one of a repository on the Hub, but {folder} is a folder here."
        )


def locate(source: str, subfolder: str | None, revision: str | None, token: str | bool | None) -> AdapterFiles:
    """Find the files of an adapter in a folder, or fetch them from the Hub."""
    inner = "" if subfolder is None else _inside(subfolder)
    if inner is None:
        raise ShapleyError(
            f"{argument('subfolder', subfolder)} does not name a folder inside another one: expected a name such as 'best'."
        )
    if Path(source).is_dir():
        refuse_revision(revision, source)
        return AdapterFiles(source, Path(source), inner)
    if is_path(source):
        raise ShapleyError(f"There is no folder {source}.")
    beside = f"{glob.escape(inner)}/" if inner else ""
    wanted = [f"{beside}{file}" for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES)]
    try:
        root = snapshot_download(source, revision=revision, token=token, allow_patterns=[*wanted, *PROCESSOR_FILES])
    except HUB_ERRORS as error:
        trouble = hub_trouble(error, source, revision)
        if trouble is None:
            raise
        raise ShapleyError(f"There is no folder {source} here. {trouble}") from error
    return AdapterFiles(source, Path(root), inner, token)


def _inside(subfolder: str) -> str | None:
    """The path of a subfolder, with slashes; None for what is not inside."""
    path = PureWindowsPath(subfolder)  # knows both kinds of slashes, and drives
    return None if path.anchor or ".." in path.parts or not path.parts else path.as_posix()
