"""The demo app: a visitor uploads an image, sees the likeliest classes, and looks at the maps."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapadapter.core.errors import ShapleyError
from shapadapter.explanation.game import active_layer
from shapadapter.hub.level import Explainer
from shapadapter.hub.load import load
from shapadapter.hub.space.answers import (
    View,
    class_list,
    how_made,
    map_picture,
    message,
    original,
    reading,
    scale_bar,
    sum_check,
)
from shapadapter.hub.space.limits import KEPT, MAX_BYTES, MAX_PIXELS, open_upload

if TYPE_CHECKING:
    from gradio import Blocks


try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The demo app is made with gradio: pip install "shapadapter[app]"') from error

INTRODUCTION = "Upload a picture. The model says what it sees, and which patches of the picture speak for that and which against it."
HOW_TO_READ = (
    "<strong>How to read the map.</strong> The picture is cut into patches, and each has a number for each class. Red "
    "patches raise the score of the class, blue ones lower it, colourless ones do nothing. Together with the score of an "
    "empty picture, the numbers add up to the score the model gives. They say what the model goes by, right or wrong."
)
BACKWARD = "Backward pass, too"
WHY_BACKWARD = (
    "Maps come nearer to the Shapley values and say how near. It takes some times as long as the prediction alone."
)
INVITATION = f"# Drop a picture here, or click\nPNG, JPEG or WebP, up to {MAX_BYTES // 2**20} MB and {MAX_PIXELS // 1_000_000} million pixels"

# Class names can be anything. Gradio runs what a template's {{value}} leaves behind as JavaScript, a lone ${value} not.
TEMPLATE = '<div class="shap">${value}</div>'
ON_CLASS = """element.addEventListener("click", event => {
  const button = event.target.closest("button[data-place]");
  if (button) trigger("select", { place: Number(button.dataset.place) });
});"""


class Page:
    """Components and their events.

    `look` says what the model sees in an upload, with `matching` in texts as well, and with a backward pass if it is told so.
    """

    def __init__(self, look: Callable[..., View], title: str, matching: bool, examples: Sequence[str | Path]) -> None:
        self.look = look
        self.matching = matching
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, KEPT)) as self.app:
            self.view = gr.State(None, time_to_live=KEPT)
            _words(f'<h1>{escape(title)}</h1><p class="quiet">{INTRODUCTION}</p>')
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    self._questions(examples)
                with gr.Column(scale=5, min_width=300):
                    self._answers()
            self._connect()

    def _questions(self, examples: Sequence[str | Path]) -> None:
        self.upload = gr.Image(
            label="Picture", sources=["upload", "clipboard"], height=260, buttons=[], placeholder=INVITATION
        )
        upload: Any = self.upload
        upload.async_move_resource_to_block_cache = partial(_local, upload.async_move_resource_to_block_cache)
        self.texts = gr.Textbox(
            "a photo of a cat\na photo of a dog", lines=3, label="Texts, one on each line", visible=self.matching
        )
        self.compare = gr.Button("Compare", variant="primary", visible=self.matching)
        self.backward = gr.Checkbox(True, label=BACKWARD, info=WHY_BACKWARD)
        if examples:
            gr.Examples([[str(path)] for path in examples], [self.upload], label="Samples", cache_examples=False)
        self.classes = _words(js_on_load=ON_CLASS)

    def _answers(self) -> None:
        self.trouble = _words()
        with gr.Column(visible=False) as self.found:
            self.reading = _words()
            with gr.Row():
                self.map = gr.Image(label="Map", elem_id="map", **_PICTURE)
                self.original = gr.Image(label="As the model saw it", elem_id="original", **_PICTURE)
            self.scale = _words()
            with gr.Row():
                self.share = gr.Slider(1, 100, 100, step=1, label="Strongest patches (%)", min_width=240)
                self.opacity = gr.Slider(0, 100, 100, step=1, label="Opacity of the map (%)", min_width=240)
            self.check = _words()
        _words(f'<p class="quiet">{HOW_TO_READ}</p>')

    def _connect(self) -> None:
        sliders = [self.share, self.opacity]
        shown = [self.view, self.classes, self.map, self.reading, self.scale, self.check]
        gr.on(
            [self.upload.change, self.compare.click, self.backward.input],
            self._run,
            [self.upload, self.texts, self.backward, *sliders],
            [self.trouble, self.found, self.original, *shown],
            preprocess=False,  # gradio would decode the file before anyone has looked at it
            concurrency_limit=1,
            api_visibility="private",
        )
        # None of these asks the model again.
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.classes.select(_choose, [self.view, *sliders], shown, **quick)
        self.map.select(_point, [self.view, *sliders], shown, **quick)
        for slider in sliders:
            slider.change(_draw, [self.view, *sliders], self.map, trigger_mode="always_last", **quick)

    def _run(
        self, upload: dict[str, Any] | None, texts: str, backward: bool, share: float, opacity: float
    ) -> tuple[Any, ...]:
        nothing = (gr.update(visible=False), None, None, "", None, "", "", "")
        if upload is None or upload["path"] is None:
            return "", *nothing
        path = Path(upload["path"])  # gradio has checked that the file is an upload
        try:
            view = self.look(path, texts if self.matching else None, backward)
        except ShapleyError as error:
            return message(str(error)), *nothing
        return "", gr.update(visible=True), original(view), *_shown(view, share, opacity)


async def _local(theirs: Callable[[Any], Awaitable[Any]], place: Any) -> Any:
    """What gradio does with an upload, without fetching one from another server."""
    if str(place).lower().startswith(("http:", "https:")):
        raise gr.Error("Upload the picture itself.")
    return await theirs(place)


_PICTURE: dict[str, Any] = {
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
    "min_width": 260,
}


def _words(value: str = "", js_on_load: str | None = None) -> Any:
    return gr.HTML(value, html_template=TEMPLATE, js_on_load=js_on_load)


def _shown(view: View, share: float, opacity: float) -> tuple[Any, ...]:
    picture = map_picture(view, share / 100, opacity / 100)
    return view, class_list(view), picture, reading(view), scale_bar(view), sum_check(view) + how_made(view)


def _draw(view: View | None, share: float, opacity: float) -> Any:
    return gr.skip() if view is None else map_picture(view, share / 100, opacity / 100)


def _choose(view: View | None, share: float, opacity: float, event: gr.EventData) -> Any:
    if view is None:
        return gr.skip()
    return _shown(replace(view, place=range(len(view.columns))[event.place]), share, opacity)


def _point(view: View | None, share: float, opacity: float, event: gr.SelectData) -> Any:
    if view is None:
        return gr.skip()
    return _shown(replace(view, patch=view.patch_at(*event.index)), share, opacity)


SHOWN = 6  # classes that a visitor can choose from, the likeliest
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

    from shapadapter.hub.space.limits import Limits

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


def see(model: Any, processor: Any, upload: Path, texts: str | None = None, backward: bool = True) -> View:
    """What the model says of an upload, which may be any file, and for a matching model of texts, one on each line.

    With `backward` by a forward and a backward pass, where the model can and there are not too many texts, else by one pass.
    """
    image, explain = open_upload(upload), Explainer(None if backward else 0)
    if texts is None:
        return View(explain(model, image, processor, top_k=SHOWN))
    lines = [line.strip() for line in texts.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_TEXTS:
        raise ShapleyError(f"Write 1 to {MAX_TEXTS} texts, one on each line; there are {len(lines)}.")
    return View(explain(model, image, processor, texts=lines))
