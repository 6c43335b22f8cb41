"""`shapadapter explain`: pictures, pages and numbers about images whose names are other people's."""

import json
import os
import re
import shutil
import weakref
from pathlib import Path

import families
import matching
import numpy as np
import pytest
from commands import error_of, run
from PIL import Image
from small import pictures
from transformers import ViTImageProcessorPil

import shapadapter.data.images as images_module
from shapadapter import UnsupportedModelError, explain, load
from shapadapter.cli import outputs as writing
from shapadapter.cli.outputs import Names, find_images
from shapadapter.explanation import presence as presence_room
from shapadapter.hub import level as level_room


def test_pictures_a_page_and_numbers(tmp_path):
    found = run("explain", "out", "photos", "--output", tmp_path, "--format", "png,html,json,npz", "--batch-size", 3)
    assert len(found.stdout.splitlines()) == 8
    document = json.loads((tmp_path / "explanations.json").read_text())
    assert document["errors"] == []
    assert [image["path"] for image in document["images"][:2]] == ["photos/ant/0.png", "photos/ant/4.png"]
    written = sorted(name for image in document["images"] for name in image["files"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*written, "explanations.html", "explanations.json"]
    )
    model, own = load("out")
    for image in document["images"]:
        expected = explain(model, image["path"], own, top_k=3, refine="gradient")
        assert image["players"] == [3, 3]
        assert image["level"] == "forward and backward pass"
        assert image["prediction"] == expected.top(1)[0][0].label
        best = image["classes"][0]
        np.testing.assert_allclose(best["attributions"], expected.for_label(best["label"])[0], atol=1e-5)
        assert best["null_value"] + best["sum"] == pytest.approx(best["logit"], abs=1e-5)
        archive, figure = image["files"]
        with np.load(tmp_path / archive, allow_pickle=False) as numbers:
            np.testing.assert_allclose(numbers["attributions"], expected.attributions[0], atol=1e-5)
            assert list(numbers["labels"]) == [one["label"] for one in image["classes"]]
        with Image.open(tmp_path / figure) as drawn:
            assert drawn.format == "PNG"
            assert drawn.width > 400
    assert f"in {tmp_path}: forward and backward pass (--refine 0 for one forward pass)." in " ".join(
        found.stderr.split()
    )
    page = (tmp_path / "explanations.html").read_text()
    assert "Method: forward and backward pass." in page
    assert page.count("<li><button ") == 8
    assert ". photos/ant/4.png</b>" in page


def test_the_level_can_be_chosen_and_is_named(tmp_path):
    levels = {"0": "one forward pass", "gradient": "forward and backward pass", 16: "refined, 16 evaluations"}
    for refine, named in levels.items():
        found = run("explain", "out", "photos/ant/0.png", "--json", "--refine", refine)
        (image,) = json.loads(found.stdout)["images"]
        assert image["level"] == named
    for refine in ("-2", "much"):
        assert "or a number of evaluations" in error_of("explain", "out", "photos", "--refine", refine, code=2)


def test_without_gradients_by_presence_the_default_is_one_pass_and_says_why(tmp_path, monkeypatch):
    def refused(scores, presence):
        raise UnsupportedModelError("No gradient reaches the players.")

    monkeypatch.setattr(presence_room, "presence_gradients", refused)
    found = run("explain", "out", "photos", "--batch-size", 3, "--json")
    assert {image["level"] for image in json.loads(found.stdout)["images"]} == {"one forward pass"}
    assert found.stderr.count("One forward pass, without gradients: No gradient reaches the players.") == 1
    assert "No gradient" in error_of("explain", "out", "photos", "--refine", "gradient")


def test_with_many_classes_the_default_is_one_pass(monkeypatch):
    monkeypatch.setattr(level_room, "MOST_CLASSES", 2)
    found = run("explain", "out", "photos/ant/0.png", "--json")
    assert json.loads(found.stdout)["images"][0]["level"] == "one forward pass"
    assert "3 classes are shown" in found.stderr
    found = run("explain", "out", "photos/ant/0.png", "--top-k", 2, "--json")
    assert json.loads(found.stdout)["images"][0]["level"] == "forward and backward pass"


def test_classes_refinement_and_json_alone(tmp_path):
    found = run("explain", "out", "photos/ant/0.png", "--json", "--targets", "dog", "--targets", 1, "--refine", 16)
    document = json.loads(found.stdout)
    (image,) = document["images"]
    assert [one["label"] for one in image["classes"]] in (["dog", "bee"], ["bee", "dog"])
    assert image["evaluations"] == 16
    assert len(image["classes"][0]["standard_errors"]) == 3
    assert not Path("explanations").exists()
    assert "no class 'wolf'" in error_of("explain", "out", "photos/ant/0.png", "--targets", "wolf")
    assert not run("explain", "out", "photos/ant/0.png", "--targets", "wolf", "--json", code=1).stdout
    # What an image gets does not depend on the others.
    two = ["photos/dog/3.png", "photos/ant/0.png"]
    both = json.loads(run("explain", "out", *two, "--json", "--refine", 16).stdout)
    alone = json.loads(run("explain", "out", two[1], "--json", "--refine", 16).stdout)
    assert both["images"][1] == alone["images"][0]


def test_hostile_names_stay_in_the_folder_and_in_their_page(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    names = ["<script>alert(1)<", "new\nline", "-rf", "x" * 200, "up\\..\\..\\x", "café 猫", "con\x1b[31m", "a'\"&b"]
    for place, name in enumerate(names):
        (source / "one").mkdir(parents=True, exist_ok=True)
        pictures(8)[place].save(source / "one" / f"{name}.png")
    (source / "two").mkdir()
    for name in ("same", "SAME"):
        pictures(1)[0].save(source / "two" / f"{name}.png")
    shutil.copy(source / "two" / "same.png", os.fsencode(source / "two") + b"/bad\xff.png")
    (source / ".hidden.png").write_bytes(b"")
    outside = tmp_path / "outside"
    outside.mkdir()
    (source / "linked").symlink_to(outside)
    pictures(1)[0].save(outside / "elsewhere.png")
    output.mkdir()
    (output / "explanations.html").symlink_to(outside / "victim")
    (output / "one--rf.attribution.png").symlink_to(outside / "victim")
    found = run("explain", "out", source, "--output", output, "--format", "png,html,json,npz")
    assert "\x1b" not in found.output
    assert not (outside / "victim").exists()
    assert [path.name for path in outside.iterdir()] == ["elsewhere.png"]
    document = json.loads((output / "explanations.json").read_text())
    assert len(document["images"]) == len(names) + 3
    files = [name for image in document["images"] for name in image["files"]]
    assert len({name.casefold() for name in files}) == len(files)
    for name in files:
        assert (output / name).is_file()
        assert not (output / name).is_symlink()
        assert not name.startswith((".", "-"))
        assert re.fullmatch(r"[\w.\-]{1,80}", name)
    page = (output / "explanations.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;.png" in page
    # A second run finds no images among what the first one wrote.
    assert len(run("explain", "out", output, code=1).stdout) == 0


def test_what_cannot_be_read_is_named_and_the_others_are_explained(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(b"no image")
    pictures(1)[0].save(source / "b.png")
    os.mkfifo(source / "c.png")
    pictures(1, side=20)[0].resize((90, 33)).save(source / "d.jpg")
    arguments = ("explain", "out", source, tmp_path / "gone.png", "--output", tmp_path / "out", "--format", "json,png")
    found = run(*arguments, code=1)
    document = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert [Path(image["path"]).name for image in document["images"]] == ["b.png", "d.jpg"]
    assert [Path(one["path"]).name for one in document["errors"]] == ["a.png", "c.png", "gone.png"]
    for name in ("a.png", "c.png", "gone.png"):
        assert any(name in line for line in found.stderr.splitlines())
    assert "2 of 5 images explained" in found.stderr
    (tmp_path / "empty").mkdir()
    assert "no images in the folder" in error_of("explain", "out", tmp_path / "empty")


def test_where_nothing_is_explained_it_is_said_once_and_no_folder_is_left(tmp_path):
    found = run("explain", "out", "../shapez", "--output", tmp_path / "new" / "why", code=1)
    assert "Cannot read image '../shapez': No such file or directory\n0 of 1 images explained.\n" in found.stderr
    assert found.stderr.count("shapez") == 1
    error_of("explain", "out", "photos", "--targets", "wolf", "--output", tmp_path / "new" / "why")
    assert not list(tmp_path.iterdir())
    kept = tmp_path / "kept"
    kept.mkdir()
    run("explain", "out", "../shapez", "--output", kept, code=1)
    assert kept.is_dir()


def save(model, processor, root):
    """A wrapped model as base and adapter below a folder; returns the adapter's."""
    base = model.get_base_model()
    adapter = root / "adapter"
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    model.save_pretrained(adapter)
    processor.save_pretrained(adapter)
    type(base)(base.config).save_pretrained(root / "base")
    with model.disable_adapter():
        bare = model.unload()
    bare.save_pretrained(root / "base")
    return adapter


def test_images_of_one_batch_may_differ_in_size(tmp_path):
    adapter = save(families.wrap("dinov2"), ViTImageProcessorPil(do_resize=False), tmp_path)
    for place, size in enumerate([(32, 32), (48, 32), (32, 32)]):
        pictures(1)[0].resize(size).save(tmp_path / f"{place}.png")
    images = [tmp_path / f"{place}.png" for place in range(3)]
    found = run("explain", adapter, *images, "--output", tmp_path / "why", "--format", "html,json")
    document = json.loads((tmp_path / "why" / "explanations.json").read_text())
    assert [image["players"] for image in document["images"]] == [[4, 4], [4, 6], [4, 4]]
    assert (tmp_path / "why" / "explanations.html").read_text().count("<li><button ") == 3
    assert "3 of 3" in found.stderr


def test_a_size_that_the_model_refuses_is_named_and_the_others_are_explained(tmp_path):
    adapter = save(families.wrap("vit"), ViTImageProcessorPil(do_resize=False), tmp_path)
    for place, size in enumerate([(32, 32), (300, 120), (32, 32)]):
        pictures(1)[0].resize(size).save(tmp_path / f"{place}.png")
    images = [tmp_path / f"{place}.png" for place in range(3)]
    found = run("explain", adapter, *images, "--output", tmp_path / "why", "--format", "html,json", code=1)
    document = json.loads((tmp_path / "why" / "explanations.json").read_text())
    assert [Path(image["path"]).name for image in document["images"]] == ["0.png", "2.png"]
    assert [Path(error["path"]).name for error in document["errors"]] == ["1.png"]
    assert "takes no images of 120 x 300 pixels" in found.stderr
    assert "2 of 3" in found.stderr


def test_texts_of_a_matching_model(tmp_path):
    adapter = save(matching.wrapped(), matching.processor("clip"), tmp_path)
    said = ["--texts", "a photo of a one", "--texts", "a photo of a two"]
    found = run("explain", adapter, "photos/ant", *said, "--targets", "a photo of a two", "--json")
    (label,) = {one["label"] for image in json.loads(found.stdout)["images"] for one in image["classes"]}
    assert label == "a photo of a two"
    assert "pass --texts ...." in error_of("explain", adapter, "photos/ant")
    assert "texts, given with the images" in run("inspect", adapter).stdout


def test_pages_of_many_images(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PAGE_IMAGES", 3)
    run("explain", "out", "photos", "--output", tmp_path, "--format", "html")
    pages = [tmp_path / f"explanations{number}.html" for number in ("", "-2", "-3")]
    assert [page.read_text().count("<li><button ") for page in pages] == [3, 3, 2]


def test_no_more_than_a_batch_is_in_memory(tmp_path, monkeypatch):
    """Images are opened, explained and forgotten batch by batch, and json is written as they come."""
    opened, most = [], []
    opening = images_module.open_image

    def watched(path):
        image = opening(path)
        if isinstance(path, str):
            opened.append(weakref.ref(image))
            most.append(sum(one() is not None for one in opened))
        return image

    monkeypatch.setattr(images_module, "open_image", watched)
    run("explain", "out", "photos", "--output", tmp_path, "--format", "json", "--batch-size", 2)
    assert len(most) == 8
    assert max(most) <= 4


def test_an_interruption_leaves_no_half_of_a_document(tmp_path, monkeypatch):
    def stop(*_):
        if list(tmp_path.glob("*.png")):
            raise KeyboardInterrupt
        return b"whole"

    monkeypatch.setattr(writing, "picture", stop)
    found = run("explain", "out", "photos", "--output", tmp_path, "--format", "png,html,json", code=130)
    assert "Interrupted. The pictures written so far are complete." in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ant-0.attribution.png"]


def test_names_are_given_once_and_hold_nothing_that_leads_elsewhere(tmp_path):
    names = Names()
    places = {
        "a/b.png": "a-b",
        "a-b.jpg": "a-b-2",
        "A/B.png": "A-B-3",
        "../../etc/x.png": "etc-x",
        "...": "image",
        "a/\udcff.png": "a-_xff",
        "a\u202egnp.png": "a_gnp",
    }
    assert [names.of(Path(place)) for place in places] == [f"{name}.attribution" for name in places.values()]
    assert len(names.of(Path("x" * 300))) < 80
    pictures(1)[0].save(tmp_path / "a.PNG")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_images([tmp_path, tmp_path / "a.PNG"]) == {tmp_path / "a.PNG": Path("a.PNG")}
