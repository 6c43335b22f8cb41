"""Evaluate a saved adapter on a folder of images: what the command line does."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from torch import Tensor

from shapadapter.adapter.saving import weights_digest
from shapadapter.core.errors import CheckpointError, ShapleyError
from shapadapter.core.files import write_together
from shapadapter.data.classes import class_names
from shapadapter.evaluation.compared import unknown
from shapadapter.evaluation.evaluator import evaluate
from shapadapter.evaluation.plan import METHODS
from shapadapter.evaluation.result import Evaluation
from shapadapter.explanation.game import active_layer
from shapadapter.explanation.methods import METHODS as KNOWN
from shapadapter.explanation.storage import refuse_link
from shapadapter.hub.load import load
from shapadapter.hub.locate import called

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def evaluate_checkpoint(
    checkpoint: str | Path,
    data: Path,
    masks: Path | None,
    methods: tuple[str, ...],
    output: Path | None,
    *,
    subfolder: str | None = None,
    base: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Evaluation:
    """Load an adapter and images, evaluate, and write the results.

    Args:
        checkpoint: the folder of an adapter, which names its base model; or its name on the Hub.
        data: a folder with a subfolder of images for each class.
        masks: a folder with a png mask at the same relative path for each image; None without.
        methods: to compare, those of `evaluate` by default.
        output: where `evaluation.json`, `table.md` and `curves.png` go, and the records with which an interrupted run goes
            on; None writes nothing.
        subfolder: where in that folder or repository the adapter is, if not at the top.
        base: the base model, if it is not where the adapter says.
        revision: branch, tag or commit of the adapter on the Hub.
        device: where to run; a GPU by default, if there is one.
        trust_remote_code: whether a base with code of its own may run it here.
        **settings: further arguments of `evaluate`.

    Raises:
        ShapleyError: a folder is not what it should be, or the classes are not the model's.
        ImportError: matplotlib, which draws the curves, is missing.
    """
    shown = called(checkpoint, subfolder)
    if output is not None and find_spec("matplotlib") is None:  # found missing now rather than after the work
        raise ImportError('The curves are drawn by matplotlib: pip install "shapadapter[plot]"')
    check_folders(data, masks)
    for name in methods:
        if name not in KNOWN:
            raise ShapleyError(unknown(name))
    if output is not None:
        _check_output(output, shown)
        refuse_link(output / "records", output)
    place: dict[str, Any] = {"subfolder": subfolder, "base": base, "revision": revision}
    model, processor = load(checkpoint, device=device, trust_remote_code=trust_remote_code, **place)
    rows = labelled_images(data, list(class_names(model.config.id2label, active_layer(model).classes)), masks)
    cache = None if output is None else output / "records"
    result = evaluate(model, rows, processor, methods=methods or METHODS, cache=cache, **settings)
    # By the weights a card knows whether the evaluation is of its adapter.
    known = {"checkpoint": shown, "folder": str(data), "weights": weights_digest(_adapter(model))}
    result = replace(result, about={**result.about, **known})
    if output is not None:
        picture = io.BytesIO()
        result.figure().savefig(picture, format="png")
        result.save(output / "evaluation.json")
        write_together({output / "table.md": result.markdown().encode(), output / "curves.png": picture.getvalue()})
    return result


def _adapter(model: Any) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=str(active_layer(model).active))


def _check_output(output: Path, checkpoint: str) -> None:
    """Refuse a folder with the evaluation of another adapter.

    Raises:
        ShapleyError: it is, or nobody can say.
    """
    file = output / "evaluation.json"
    try:
        other = Evaluation.load(file).about.get("checkpoint") if file.exists() else None
    except CheckpointError as error:
        raise CheckpointError(f"{error} Move it away, or choose another --output.") from error
    if other is not None and Path(other).resolve() != Path(checkpoint).resolve():
        raise ShapleyError(f"{output} holds the evaluation of {other}. Choose another --output for {checkpoint}.")


def check_folders(*folders: Path | None) -> None:
    """Refuse folders that do not exist, before a model is loaded.

    Raises:
        ShapleyError: there is one.
    """
    for folder in folders:
        if folder is not None and not folder.is_dir():
            raise ShapleyError(f"There is no folder {folder}.")


def labelled_images(data: Path, labels: list[str], masks: Path | None) -> list[dict[str, Any]]:
    """A row for each image of a folder with a subfolder for each class.

    Raises:
        ShapleyError: there are no images, a subfolder is no class of the model, or a mask is missing.
    """
    folders = sorted(path for path in data.iterdir() if path.is_dir())
    rows = [
        {"image": str(path), "label": folder.name}
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not rows:
        raise ShapleyError(
            f"Expected {data} to hold a subfolder of images for each class, e.g. {data}/{labels[0]}/1.png."
        )
    strangers = sorted({row["label"] for row in rows} - set(labels))
    if strangers:
        raise ShapleyError(
            f"The subfolders {strangers[:5]} of {data} are no classes of the model. Its classes are {labels[:10]}"
            f"{' ...' if len(labels) > 10 else ''}."
        )
    return [
        {
            "image": row["image"],
            "label": labels.index(row["label"]),
            **({} if masks is None else {"mask": _mask_of(Path(row["image"]), data, masks)}),
        }
        for row in rows
    ]


def _mask_of(image: Path, data: Path, masks: Path) -> str:
    path = (masks / image.relative_to(data)).with_suffix(".png")
    if not path.is_file():
        raise ShapleyError(f"There is no mask {path} for {image}.")
    return str(path)
