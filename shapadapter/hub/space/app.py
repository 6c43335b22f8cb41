"""The demo app: a visitor uploads an image, sees the likeliest classes, and looks at the map of each."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapadapter.errors import ShapleyError
from shapadapter.explaining import explain
from shapadapter.game import active_layer
from shapadapter.loading import load

from .page import Page
from .uploads import MAX_BYTES, open_upload
from .view import View

if TYPE_CHECKING:
    from gradio import Blocks

SHOWN = 6
"""Classes that a visitor can choose from, the likeliest."""

MAX_TEXTS = 20
MAX_WAITING = 32


def build_app(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    title: str | None = None,
    examples: Sequence[str | Path] = (),
) -> Blocks:
    """Load a checkpoint and build its app; see `launch`.

    Args:
        checkpoint: the folder of an adapter, or its name on the Hub.
        base: the base model, where it is not to be found under the name the adapter was saved with.
        revision: branch, tag or commit of the adapter's repository.
        title: heading; the checkpoint's name by default.
        examples: images that visitors can click.

    Raises:
        ShapleyError: the checkpoint cannot be loaded.
        ImportError: gradio is missing.
    """
    if "GRADIO_TEMP_DIR" not in os.environ:  # gradio's own is one folder for all its apps
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="shapadapter-space-")
        atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    model, processor = load(checkpoint, base=base, revision=revision)
    matching = active_layer(model).anatomy.kind == "matching"
    return Page(partial(see, model, processor), title or Path(checkpoint).name, matching, examples).app


def launch(app: Blocks) -> None:
    """Run an app until it is stopped, on the port that GRADIO_SERVER_PORT names, 7860 by default.

    Nothing is recorded or sent anywhere, no file of the machine is served, and what strangers upload is limited in size, for
    each request and in all.
    """
    from gradio.themes import Default
    from starlette.middleware import Middleware

    from .limits import Limits

    system = ("system-ui", "sans-serif")  # nothing to fetch
    app.queue(max_size=MAX_WAITING).launch(
        share=False,
        show_error=False,
        max_file_size=MAX_BYTES,
        app_kwargs={"middleware": [Middleware(Limits, folder=Path(app.GRADIO_CACHE))]},
        state_session_capacity=200,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=Default(primary_hue="blue", font=system, font_mono=("ui-monospace", "monospace")),
        css=resources.files("shapadapter.hub.space").joinpath("style.css").read_text("utf-8"),
    )


def see(model: Any, processor: Any, upload: Path, texts: str | None = None) -> View:
    """Run the model once on an upload.

    Args:
        model: a wrapped model.
        processor: that goes with it.
        upload: a file that may be anything.
        texts: for a matching model, one on each line.

    Raises:
        ImageError: the upload is refused.
        ShapleyError: there is no text, or there are too many or too long ones.
    """
    image = open_upload(upload)
    if texts is None:
        return View(explain(model, image, processor, top_k=SHOWN))
    lines = [line.strip() for line in texts.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_TEXTS:
        raise ShapleyError(f"Write 1 to {MAX_TEXTS} texts, one on each line; there are {len(lines)}.")
    return View(explain(model, image, processor, texts=lines))
