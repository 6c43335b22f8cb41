"""The demo Space: what is written, what is refused, what a visitor sees."""

import ast
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import matching
import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from peft import get_peft_model
from PIL import Image
from spaces import SCRIPT, enlarged, expected_map, noise, write_checkpoint
from transformers import AutoModel

import shapadapter
from shapadapter import ImageError, ShapleyConfig, ShapleyError, explain, load
from shapadapter.core import installation as installing
from shapadapter.hub import space as space_room
from shapadapter.hub import upload
from shapadapter.hub.space import limits as uploads
from shapadapter.hub.space import push_space, write_space
from shapadapter.hub.space.answers import (
    View,
    class_list,
    how_made,
    map_picture,
    message,
    original,
    reading,
    scale_bar,
    strongest,
    sum_check,
)
from shapadapter.hub.space.limits import open_upload


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "<b>holiday.png"
    noise().save(path)
    return path


def files(folder):
    """What is there beside the copy of the package."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("shapadapter/"))


def header(folder):
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(text)


def call(folder):
    """The keyword arguments of `build_app` in app.py, and its first one."""
    tree = ast.parse((folder / "app.py").read_text())
    (found,) = [node for node in ast.walk(tree) if getattr(getattr(node, "func", None), "id", "") == "build_app"]
    return ast.unparse(found.args[0]), {word.arg: ast.unparse(word.value) for word in found.keywords}


# What is written.


def test_a_folder_is_copied_with_its_base_and_nothing_else(checkpoint, picture, tmp_path):
    folder = write_space(checkpoint, tmp_path / "deep" / "space", title="Birds", copy_base=True, examples=[picture])
    assert folder == tmp_path / "deep" / "space"
    assert files(folder) == [
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/preprocessor_config.json",
        "app.py",
        "base/config.json",
        "base/model.safetensors",
        "examples/001.png",
        "requirements.txt",
    ]
    for name in ("adapter/adapter_model.safetensors", "adapter/preprocessor_config.json"):
        assert (folder / name).read_bytes() == (checkpoint / Path(name).name).read_bytes()
    texts = [(folder / name).read_text() for name in files(folder) if not name.endswith((".safetensors", ".png"))]
    assert not any(str(checkpoint.parent) in text for text in texts)  # nobody needs to know where it was made
    seen = header(folder)
    assert (seen["title"], seen["sdk"], seen["app_file"], seen["license"]) == ("Birds", "gradio", "app.py", "mit")
    assert not seen["pinned"]
    assert "models" not in seen
    assert call(folder)[1].keys() == {"base", "title", "examples"}
    assert [path.name for path in folder.parent.iterdir()] == ["space"]


def test_what_a_space_needs_can_be_installed(tmp_path):
    """The package is on no index yet: the Space brings it, and names what it needs."""
    folder = write_space("ada/birds", tmp_path / "space")
    code = "import shapadapter; print(shapadapter.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == folder / "shapadapter" / "__init__.py", done.stderr
    ours = Path(shapadapter.__file__).parent
    assert {path.relative_to(ours) for path in ours.rglob("*.py")} == {
        path.relative_to(folder / "shapadapter") for path in (folder / "shapadapter").rglob("*.py")
    }
    assert "Apache License" in (folder / "shapadapter" / "LICENSE").read_text()
    asked = {one.name: one for one in map(Requirement, (folder / "requirements.txt").read_text().split())}
    assert {"torch", "transformers", "peft", "gradio", "pyyaml"} <= asked.keys()
    assert not {"shapadapter", "timm"} & asked.keys()
    for name in asked.keys() - {"gradio"}:
        assert asked[name].specifier.contains(metadata.version(name), prereleases=True), name


def test_a_space_after_the_release_names_the_package(checkpoint, tmp_path, monkeypatch):
    folder = write_space("ada/birds", tmp_path / "space")
    monkeypatch.setattr(installing, "ON_INDEX", True)
    write_space("ada/birds", folder)
    assert not (folder / "shapadapter").exists()
    assert (folder / "requirements.txt").read_text().startswith(f"shapadapter[app]=={shapadapter.__version__}\n")


def test_a_name_on_the_hub_is_named(tmp_path):
    hostile = 'A\'"""\n---\nsdk: docker\n# <script>alert(1)</script> ${x} {arguments}\\'
    folder = write_space("ada/birds", tmp_path / "space", revision="v1'+x+'", title=hostile)
    assert files(folder) == ["README.md", "app.py", "requirements.txt"]
    first, named = call(folder)
    line = " ".join(hostile.split())
    assert first == repr("ada/birds")
    assert ast.literal_eval(named["title"]) == header(folder)["title"] == line
    assert ast.literal_eval(named["revision"]) == "v1'+x+'"
    assert header(folder)["sdk"] == "gradio"
    assert header(folder)["models"] == ["ada/birds"]
    assert "license" not in header(folder)
    assert "<script" not in (folder / "README.md").read_text().split("---\n", 2)[2]


def test_a_base_on_the_hub_is_named(checkpoint, tmp_path):
    own = shutil.copytree(checkpoint, tmp_path / "adapter")
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "google/vit"}))
    folder = write_space(own, tmp_path / "space", license="apache-2.0")
    assert not (folder / "base").exists()
    assert header(folder)["models"] == ["google/vit"]
    assert header(folder)["license"] == "apache-2.0"
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "google/vit"
    assert "base" not in call(folder)[1]


def test_written_again_it_keeps_what_is_not_ours(checkpoint, picture, tmp_path, monkeypatch):
    folder = write_space(checkpoint, tmp_path / "space", copy_base=True, examples=[picture])
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    before = {name: (folder / name).read_bytes() for name in files(folder)}

    def broken(*_):
        raise OSError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(space_room.installation, "copy_package", broken)
        with pytest.raises(OSError, match="full"):
            write_space(checkpoint, folder, title="Other", copy_base=True)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    write_space("ada/birds", folder)
    assert files(folder) == [".git/HEAD", "README.md", "app.py", "requirements.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


def test_what_cannot_become_a_space_is_refused(checkpoint, picture, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "app.py").write_text("print('mine')")
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    space = tmp_path / "space"
    for arguments, more, reason in (
        ((checkpoint, foreign), {}, "not a Space of ours"),
        ((checkpoint, text), {}, "not a Space of ours"),
        ((pickled, space), {}, "no adapter_model.safetensors"),
        ((tmp_path, space), {}, "holds no adapter"),
        (("./nowhere", space), {}, "There is no folder ./nowhere"),
        (("one/two/three", space), {}, "There is no folder one/two/three"),
        ((checkpoint, space), {"revision": "main"}, "is a folder here"),
        ((checkpoint, space), {"copy_base": False}, r"base-model, a folder on this computer, .* pass copy_base=True"),
        ((checkpoint, space), {"examples": [picture, text]}, "not a PNG, JPEG or WebP"),
    ):
        with pytest.raises(ShapleyError, match=reason):
            write_space(*arguments, **{"copy_base": True, **more})
    assert (foreign / "app.py").read_text() == "print('mine')"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "notes.png", "pickled"]
    with pytest.raises(ShapleyError, match="not a Space that shapadapter wrote"):
        push_space(foreign, "ada/space")


def test_push_sends_the_space_and_nothing_else(checkpoint, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "hub"))
    import server
    from huggingface_hub import HfApi, constants

    folder = write_space(checkpoint, tmp_path / "space", copy_base=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "app.pyc").write_text("")
    (folder / "shapadapter" / "__pycache__").mkdir()
    (folder / "shapadapter" / "__pycache__" / "app.pyc").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with server.LocalHub() as hub:
        for module in (space_room, upload):
            monkeypatch.setattr(module, "HfApi", functools.partial(HfApi, endpoint=hub.url))
        address = push_space(folder, f"{server.OWNER}/birds", private=True, token=server.TOKEN)
        push_space(folder, f"{server.OWNER}/birds", token=server.TOKEN)  # once more is no error
        repo = hub.repos["space", f"{server.OWNER}/birds"]
        sent = hub.files(f"{server.OWNER}/birds", kind="space")
        with pytest.raises(ShapleyError) as refused:
            push_space(folder, f"{server.OWNER}/birds", token=server.STRANGERS_TOKEN)
    assert address.endswith(f"spaces/{server.OWNER}/birds")
    assert repo.private
    assert repo.sdk == "gradio"
    package = {name for name in sent if name.startswith("shapadapter/")}
    assert {"shapadapter/__init__.py", "shapadapter/LICENSE", "shapadapter/hub/space/app.py"} <= package
    assert not any(name.endswith(".pyc") for name in sent)
    assert {name: content for name, content in sent.items() if name not in package} == {
        name: (folder / name).read_bytes()
        for name in files(folder)
        if name not in ("notes.txt", "__pycache__/app.pyc")
    }
    assert server.STRANGERS_TOKEN not in str(refused.value)


# What strangers upload.


def test_uploads_are_images_of_three_formats(tmp_path):
    for form in ("PNG", "JPEG", "WEBP"):
        noise().save(tmp_path / "file", format=form)
        assert open_upload(tmp_path / "file").size == (64, 64)
    turned = Image.Exif()
    turned[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "file", format="JPEG", exif=turned)
    assert open_upload(tmp_path / "file").size == (20, 40)
    png = io.BytesIO()
    noise().save(png, format="PNG")
    for content in (b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", png.getvalue()[:3000]):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ImageError, match="not a PNG, JPEG or WebP image") as refused:
            open_upload(tmp_path / "file")
        assert str(tmp_path) not in str(refused.value)
    for form in ("GIF", "BMP", "TIFF"):
        noise().save(tmp_path / "file", format=form)
        with pytest.raises(ImageError, match="not a PNG, JPEG or WebP image"):
            open_upload(tmp_path / "file")


def test_uploads_have_limits(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for side in (6400, 20_000):  # a few kilobytes each, and the larger beyond Pillow's own limit
        Image.new("1", (side, side)).save(path, format="PNG")
        with pytest.raises(ImageError, match="million pixels"):
            open_upload(path)
    noise().save(path, format="PNG")
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    with pytest.raises(ImageError, match="MB"):
        open_upload(path)


# What a visitor sees.


@pytest.fixture(scope="module")
def explanation(checkpoint):
    model, processor = load(checkpoint, device="cpu")
    return explain(model, noise(), processor)


def test_the_map_is_the_one_of_visual(explanation):
    limit = float(explanation.attributions.abs().max())
    view = View(explanation, place=1)
    index = explanation.top(3)[0][1].index
    np.testing.assert_array_equal(map_picture(view, 1, 1), expected_map(explanation, index, limit))
    np.testing.assert_array_equal(map_picture(view, 0.25, 1), expected_map(explanation, index, limit, kept=4))
    np.testing.assert_array_equal(map_picture(view, 1, 0), original(view))
    np.testing.assert_array_equal(original(view), enlarged(explanation))
    assert view.patch_at(0, 0) == (0, 0)
    assert view.patch_at(511, 130) == (1, 3)
    assert view.patch_at(9999, -5) == (0, 3)
    framed = map_picture(replace(view, patch=(1, 3)), 1, 1)
    changed = (framed != map_picture(view, 1, 1)).any(-1)
    assert changed[128:256, 384:].any()
    changed[128:256, 384:] = False
    assert not changed.any()


def test_strongest_keeps_both_signs():
    values = torch.tensor([[3.0, -4.0], [1.0, -2.0]])
    assert strongest(values, 0.5).tolist() == [[3, -4], [0, 0]]
    assert strongest(values, 0.51).tolist() == [[3, -4], [0, -2]]
    assert strongest(values, 1).tolist() == values.tolist()


def test_names_are_text(explanation):
    place = [column.index for column in View(explanation).columns].index(0)
    view = View(explanation, place, (0, 0))
    for html in (class_list(view), reading(view), sum_check(view), message(SCRIPT)):
        assert "<img" not in html
        assert "<script" not in html
        assert "&lt;img" in html


def test_quantities_have_no_bar(explanation):
    unknown = replace(explanation, probabilities=torch.full_like(explanation.probabilities, torch.nan))
    html = class_list(View(unknown))
    assert html.count("width: 0.0%") == 3
    assert "%<" not in html


def test_without_gradio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "shapadapter.hub.space.app", raising=False)
    monkeypatch.delitem(sys.modules, "shapadapter.hub.space.app", raising=False)
    with pytest.raises(ImportError, match=r'pip install "shapadapter\[app\]"'):
        import shapadapter.hub.space.app  # noqa: F401


def test_texts_take_the_place_of_classes(tmp_path):
    pytest.importorskip("gradio")
    from shapadapter.hub.space.app import MAX_TEXTS, see

    model, processor = matching.wrapped("clip", "classifier"), matching.processor("clip")
    noise().save(tmp_path / "file", format="PNG")
    texts = ["a photo of a one", "a photo of a two"]
    view = see(model, processor, tmp_path / "file", "\n a photo of a one\n\na photo of a two \n")
    expected = explain(model, noise(), processor, texts=texts, refine="gradient")
    assert view.explanation.labels == tuple(texts)
    assert "forward and backward pass, expected error" in how_made(view)
    single = see(model, processor, tmp_path / "file", "\n".join(texts), backward=False)
    assert "one forward pass." in how_made(single)
    many = see(model, processor, tmp_path / "file", "one\n" * 11)
    assert many.explanation.method == "shapadapter"
    for text in texts:
        torch.testing.assert_close(view.explanation.for_label(text), expected.for_label(text))
    for wrong in ("", " \n ", "one\n" * (MAX_TEXTS + 1)):
        with pytest.raises(ShapleyError, match="Write 1 to 20 texts"):
            see(model, processor, tmp_path / "file", wrong)
    with pytest.raises(ShapleyError, match="tokens"):
        see(model, processor, tmp_path / "file", "a photo of a one " * 20)


def test_the_model_runs_once(explanation):
    gradio = pytest.importorskip("gradio")
    from shapadapter.hub.space import app as page

    looked = []

    def look(*given):
        looked.append(given)
        return View(explanation)

    made = page.Page(look, "Title", True, [])
    assert made.texts.visible
    assert made.backward.value
    _, _, _, view, *_ = made._run({"path": "upload.png"}, "one\ntwo", False, 100, 100)
    assert looked == [(Path("upload.png"), "one\ntwo", False)]
    view, *_ = page._choose(view, 100, 100, gradio.EventData(None, {"place": 1}))
    view, *_ = page._point(view, 50, 100, gradio.SelectData(None, {"index": [200, 10], "value": None}))
    assert (view.place, view.patch) == (1, (0, 1))
    page._draw(view, 10, 10)
    assert len(looked) == 1
    assert not page.Page(look, "Title", False, []).texts.visible


def test_small_numbers_have_no_exponent(explanation):
    small = replace(
        explanation, attributions=explanation.attributions / float(explanation.attributions.abs().max()) * 0.0112
    )
    html = scale_bar(View(small))
    assert "\N{MINUS SIGN}0.0112" in html
    assert "+0.0112" in html
    zero = View(replace(explanation, attributions=torch.zeros_like(explanation.attributions)), 0, (0, 0))
    assert "+0.00" in reading(zero)
    assert strongest(zero.column.values, 0.5).abs().sum() == 0


def test_the_space_of_a_matching_model_has_its_tokenizer(tmp_path):
    gradio = pytest.importorskip("gradio")
    from shapadapter.hub.space.app import build_app

    matching.base("clip").save_pretrained(tmp_path / "clip")
    model = get_peft_model(AutoModel.from_pretrained(tmp_path / "clip"), ShapleyConfig(r=4, prediction="classifier"))
    model.save_pretrained(str(tmp_path / "adapter"))
    matching.processor("clip").save_pretrained(tmp_path / "adapter")
    folder = write_space(tmp_path / "adapter", tmp_path / "space", copy_base=True)
    shutil.rmtree(tmp_path / "clip")
    app = build_app(folder / "adapter", base=folder / "base")
    (texts,) = [block for block in app.blocks.values() if isinstance(block, gradio.Textbox)]
    assert texts.visible
