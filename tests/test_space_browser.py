"""The app of a written Space, started as its visitors meet it and driven by a real browser."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from spaces import NAMES, expected_map, noise, write_checkpoint

from shapadapter import explain, load
from shapadapter.core.phrases import one_line
from shapadapter.hub.space import write_space

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)

# Python runs this before the app and writes down every machine that it asks for.
WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1][0] if event == "socket.connect" and isinstance(arguments[1], tuple) else arguments[0]
        if isinstance(host, str) and host not in ("127.0.0.1", "localhost", "::1"):
            with open(os.environ["ASKED"], "a") as file:
                file.write(f"{event} {host}\\n")
sys.addaudithook(watch)
"""
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(folder, root):
    """The address of the app of a Space, as a process of its own; afterwards it is stopped as with Ctrl-C."""
    (root / "watch").mkdir()
    (root / "watch" / "sitecustomize.py").write_text(WATCH)
    port = free_port()
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(root / "uploads"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root / "watch"), os.environ.get("PYTHONPATH")])),
        "ASKED": str(root / "asked"),
    }
    with (root / "log").open("w") as log:
        app = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if app.poll() is not None or "Running on" in (root / "log").read_text():
                break
            time.sleep(0.1)
        assert app.poll() is None, (root / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        app.send_signal(signal.SIGINT)
        app.wait(timeout=20)


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """A page of the running app, and all that the browser said about it."""
    root = tmp_path_factory.mktemp("space")
    checkpoint = write_checkpoint(root)
    noise().save(root / "picture.png")
    noise(seed=1).save(root / "sample.png")
    folder = write_space(checkpoint, root / "out", title=NAMES[0], copy_base=True, examples=[root / "sample.png"])
    shutil.rmtree(root / "base-model")  # the Space has all it needs
    shutil.rmtree(checkpoint)
    with running(folder, root) as address, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(15_000)
        said = []
        page.on("console", lambda line: said.append(line.text) if line.type == "error" and ours(line) else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("input[type=file]", state="attached")
        yield SimpleNamespace(page=page, root=root, folder=folder, said=said, asked=asked, address=address)
        browser.close()
        assert list((root / "uploads").rglob("picture.png"))
    # The app has stopped, and nothing is left of the uploads.
    assert {path.name for path in (root / "uploads").rglob("*.*")} <= {"001.png"}


def ours(line):
    """Gradio asks how far an upload is, and complains when it was over before."""
    return line.text != "Response" and "/upload_progress?" not in line.location["url"]


def picture_of(visit, box):
    source = visit.page.locator(f"#{box} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(visit.page.request.get(source).body())).convert("RGB"))


def until(visit, script):
    visit.page.wait_for_function(script, timeout=15_000)


def drawn(visit, expected):
    """Wait until the map is the one expected; the picture that is there then."""
    for _ in range(50):
        found = picture_of(visit, "map")
        if np.array_equal(found, expected):
            break
        visit.page.wait_for_timeout(100)
    np.testing.assert_array_equal(found, expected)


def test_a_visitor(visit, tmp_path):
    page = visit.page
    model, processor = load(visit.folder / "adapter", base=visit.folder / "base", device="cpu")
    explanation = explain(model, noise(), processor, refine="gradient")
    best = explanation.top(3)[0]
    limit = float(explanation.attributions.abs().max())

    page.set_input_files("input[type=file]", visit.root / "picture.png")
    page.wait_for_selector(".classes button")
    assert page.locator(".classes .share").all_inner_texts() == [f"{100 * one.probability:.1f} %" for one in best]
    shown = page.locator(".classes .name").all_inner_texts()
    assert [" ".join(text.split()) for text in shown] == [one_line(one.label) for one in best]
    drawn(visit, expected_map(explanation, best[0].index, limit))
    assert picture_of(visit, "original").shape == (512, 512, 3)

    page.locator(".classes button").nth(1).click()
    until(visit, "document.querySelectorAll('.classes button')[1].ariaPressed === 'true'")
    drawn(visit, expected_map(explanation, best[1].index, limit))
    total, null = explanation.for_label(best[1].index)[0].double().sum(), explanation.null_values[0, best[1].index]
    check = page.locator(".check").inner_text().replace("\N{MINUS SIGN}", "-")
    assert f"{float(null):.3f} for an empty picture, and {float(total):+.3f} from all patches" in check
    assert f"The score the model gives is {best[1].logit:.3f}" in check
    assert "forward and backward pass, expected error" in page.locator(".level").inner_text()

    slider = page.get_by_label("number input for Strongest patches (%)")
    slider.fill("25")
    slider.press("Enter")
    drawn(visit, expected_map(explanation, best[1].index, limit, kept=4))

    box = page.locator("#map img").bounding_box()
    page.locator("#map img").click(position={"x": box["width"] * 0.6, "y": box["height"] * 0.4})
    page.wait_for_selector(".reading strong")
    value = float(explanation.for_label(best[1].index)[0, 1, 2])
    words = page.locator(".reading").inner_text().replace("\N{MINUS SIGN}", "-")
    found = re.match(r"Row 2, column 3: ([+-][\d.]+) for ", words)
    assert float(found[1]) == pytest.approx(value, abs=0.005 * limit)

    page.get_by_label("Backward pass, too").click()
    page.locator(".level", has_text="one forward pass.").wait_for()
    single = explain(model, noise(), processor)
    drawn(visit, expected_map(single, best[0].index, float(single.attributions.abs().max()), kept=4))
    page.get_by_label("Backward pass, too").click()
    page.locator(".level", has_text="backward").wait_for()


def test_refused_uploads(visit):
    page = visit.page
    (visit.root / "notes.png").write_text("no picture")
    Image.new("1", (6400, 6400)).save(visit.root / "huge.png")
    Image.new("RGB", (8, 8)).save(visit.root / "animal.gif")
    for name, reason in (
        ("notes.png", "not a PNG, JPEG or WebP image"),
        ("huge.png", "41 million pixels, the most is 40 million"),
        ("animal.gif", "not a PNG, JPEG or WebP image"),
    ):
        page.get_by_label("Remove Image").click()
        page.set_input_files("input[type=file]", visit.root / name)
        page.locator(".message", has_text=reason).wait_for()
        assert str(visit.root) not in page.locator(".message").inner_text()
        assert not page.locator("#map").is_visible()
    page.get_by_label("Remove Image").click()
    page.locator(".message").wait_for(state="detached")
    heavy = b"0" * (10 * 2**20 + 1)
    (visit.root / "heavy.png").write_bytes(heavy)
    page.set_input_files("input[type=file]", visit.root / "heavy.png")
    page.get_by_text("maximum allowed size of 10.0 Mb").wait_for()
    # The browser did not send it; nor does the server take it.
    sent = {"files": {"name": "heavy.png", "mimeType": "image/png", "buffer": heavy}}
    try:
        assert page.request.post(f"{visit.address}/gradio_api/upload", multipart=sent).status == 413
    except playwright.Error as error:  # the server hung up before all of it was sent
        if not re.search("EPIPE|ECONNRESET", str(error)):
            raise


def test_a_sample_is_explained(visit):
    page = visit.page
    model, processor = load(visit.folder / "adapter", base=visit.folder / "base", device="cpu")
    explanation = explain(model, noise(seed=1), processor, refine="gradient")
    page.locator(".gallery img, .gallery-item img").first.click()
    page.locator("#map img").wait_for()
    limit = float(explanation.attributions.abs().max())
    drawn(visit, expected_map(explanation, explanation.top(1)[0][0].index, limit, kept=4))


def test_nothing_was_executed_asked_or_shown_to_others(visit):
    assert visit.page.evaluate("window.hacked") is None
    assert visit.said == []
    own = (visit.address, "data:", "blob:")
    assert [url for url in visit.asked if not url.startswith(own)] == []
    assert not (visit.root / "asked").exists(), (visit.root / "asked").read_text()
    assert "Traceback" not in (visit.root / "log").read_text()
    secret = visit.page.request.get(f"{visit.address}/gradio_api/file={visit.folder}/adapter/adapter_config.json")
    assert secret.status == 403
    config = json.loads(visit.page.request.get(f"{visit.address}/config").text())
    assert not config["analytics_enabled"]


def test_only_uploads_are_opened(visit):
    """Who talks to the server without the page cannot have it explain a picture of the server's."""
    request = visit.page.request
    config = json.loads(request.get(f"{visit.address}/config").text())
    (run,) = [one["id"] for one in config["dependencies"] if len(one["outputs"]) == 9]

    def answer(path, session):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [given, "", True, 100, 100], "fn_index": run, "session_hash": session}
        assert request.post(f"{visit.address}/gradio_api/queue/join", data=body).ok
        return request.get(f"{visit.address}/gradio_api/queue/data?session_hash={session}").text()

    content = (visit.root / "sample.png").read_bytes()
    sent = {"files": {"name": "own.png", "mimeType": "image/png", "buffer": content}}
    (own,) = request.post(f"{visit.address}/gradio_api/upload", multipart=sent).json()
    assert '"success":true' in answer(own, "one")
    refused = answer(str(visit.root / "sample.png"), "two")
    assert '"success":false' in refused
    assert "aria-pressed" not in refused
    assert "InvalidPathError" in (visit.root / "log").read_text()
