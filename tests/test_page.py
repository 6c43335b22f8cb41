"""The self-contained page as a file; what a browser makes of it is in test_page_browser.py."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from test_visual import HOSTILE, make, refined, unitless

from shapadapter.core.errors import ClassNotFoundError
from shapadapter.core.statistics import Interval
from shapadapter.evaluation.tables import Block
from shapadapter.visual import write_page
from shapadapter.visual.page import Measures
from shapadapter.visual.wording import columns


class Page(HTMLParser):
    """What a browser would see: tags with attributes, the text of scripts and styles, the text outside."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.styles, self.words = [], [], [], []
        self.feed(text)
        self.data = json.loads(self.scripts[0])
        self.images = self.data["images"]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def pictures(page):
    """Of the gallery, as arrays."""
    sources = [attrs["src"] for attrs in page.all("img") if "src" in attrs]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources]


def test_page_holds_the_attributions_and_the_picture(tmp_path):
    explanation = make()
    _, page = read(explanation.save_html(tmp_path / "why.html", title="Why"))
    assert len(page.images) == 2
    for index, (image, picture) in enumerate(zip(page.images, pictures(page), strict=True)):
        assert [c["label"] for c in image["classes"]] == [c.label for c in columns(explanation, index, max_classes=9)]
        for found in image["classes"]:
            place = explanation.class_index(found["label"])
            np.testing.assert_allclose(found["values"], explanation.for_label(place)[index].numpy(), rtol=5e-5)
            assert found["logit"] == pytest.approx(explanation.logits[index, place].item())
            assert found["null"] + np.sum(found["values"]) == pytest.approx(found["logit"], abs=1e-3)
            assert "Σφ" in found["check"]
        assert image["limit"] == pytest.approx(explanation.attributions[index].abs().max().item())
        assert np.array_equal(picture, explanation.images[index].numpy())


def test_page_states_errors_beside_the_values(tmp_path):
    errors = torch.rand(2, 4, 4, 3)
    errors[1] = torch.nan
    explanation = replace(make(), standard_errors=errors)
    known, unknown = read(explanation.save_html(tmp_path / "why.html"))[1].images
    for found in known["classes"]:
        column = explanation.classes[0].tolist().index(explanation.class_index(found["label"]))
        np.testing.assert_allclose(found["errors"], errors[0, :, :, column], rtol=0.06)
    assert {found["errors"] for found in unknown["classes"]} == {None}
    plain = read(make().save_html(tmp_path / "plain.html"))[1]
    assert {found["errors"] for image in plain.images for found in image["classes"]} == {None}


def test_page_of_maps_that_do_not_sum(tmp_path):
    text, page = read(unitless().save_html(tmp_path / "why.html"))
    assert "relevance, does not sum to the logit" in text
    assert "they sum to the logit" not in text
    assert "Method: attention_rollout." in text
    assert {found["check"] for image in page.images for found in image["classes"]} == {""}
    assert not page.data["sums"]
    text, page = read(refined().save_html(tmp_path / "refined.html"))
    assert "they sum to the logit" in text
    for image, spent in zip(page.images, (64, 128), strict=True):
        made = f"refined, {spent} evaluations\nexpected error about 35 %"
        assert all(c["check"].endswith(made) for c in image["classes"])
    assert "Method: refined, 64 to 128 evaluations." in text
    assert "Method: one forward pass." in make().save_html(tmp_path / "pass.html").read_text()


def test_page_lets_nothing_through_but_its_own_style_and_script(tmp_path):
    text, page = read(write_page(make(), tmp_path / "why.html"))
    assert not re.search("https?:", text)
    assert not page.all("link")
    for _, attrs in page.tags:
        assert attrs.get("src", "data:").startswith("data:")
        assert not {"href", "style"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
    (policy,) = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    for name, content in (("style-src", page.styles[0]), ("script-src", page.scripts[1])):
        assert rules.pop(name) == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert rules == {"img-src": "data:"}


def test_page_can_be_read_without_a_mouse_and_without_a_script(tmp_path):
    _, page = read(write_page(make(), tmp_path / "why.html", names=["a.png", "b.png"]))
    assert all("alt" in attrs for attrs in page.all("img"))
    assert "predicted" in page.all("img")[0]["alt"]
    assert all(attrs["type"] == "button" for attrs in page.all("button"))
    assert {"1. a.png", "2. b.png"} <= set(page.words)


def test_hostile_names_stay_names(tmp_path):
    title, table = "</title><script>alert(2)</script>", [("<b>", "</script><script>alert(3)</script>")]
    more = {"names": ["a", "b"], "true_labels": [1, None]}
    plain = read(write_page(make(), tmp_path / "plain.html", table=[("a", "b")], **more))[1]
    more["names"] = ["<img src=x onerror=alert(4)>", "</script>"]
    _, page = read(write_page(make(labels=HOSTILE), tmp_path / "why.html", title=title, table=table, **more))
    # No name became a tag, an attribute or a line of the script.
    assert [(tag, list(attrs)) for tag, attrs in page.tags] == [(tag, list(attrs)) for tag, attrs in plain.tags]
    assert page.scripts[1:] == plain.scripts[1:]
    assert not any(mark in page.scripts[0] for mark in "<>&\u2028")
    assert {c["label"] for c in page.images[0]["classes"]} == {HOSTILE[1], HOSTILE[0], "a b c"}
    assert title in page.words
    assert "</script><script>alert(3)</script>" in page.words


def test_page_offers_the_best_classes_and_the_true_one(tmp_path):
    explanation = make()
    worst = [explanation.classes[i][explanation.logits[i][explanation.classes[i]].argmin()].item() for i in (0, 1)]
    _, page = read(write_page(explanation, tmp_path / "why.html", max_classes=1, true_labels=[worst[0], None]))
    assert [len(image["classes"]) for image in page.images] == [2, 1]
    assert [c["true"] for c in page.images[0]["classes"]] == [False, True]
    assert [image["right"] for image in page.images] == [False, None]
    _, page = read(write_page(explanation, tmp_path / "why.html", max_classes=1, true_labels=["two", "two"]))
    assert [image["true"] for image in page.images] == ["two", "two"]  # not explained, but known
    assert [len(image["classes"]) for image in page.images] == [1, 1]


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"names": ["one"]}, ValueError, "a name for each, got 2 and 1"),
        ({"true_labels": [0, 1, 2]}, ValueError, "a true label for each, got 2 and 3"),
        ({"true_labels": ["nought", None]}, ClassNotFoundError, "nought"),
        ({"max_classes": 0}, ValueError, "no class to draw"),
    ],
)
def test_page_of_what_does_not_fit(tmp_path, more, error, match):
    with pytest.raises(error, match=match):
        write_page(make(), tmp_path / "why.html", **more)
    assert not list(tmp_path.iterdir())


def test_page_of_too_many_images_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"at most 500 images, got 502.*explanation\[:500\]"):
        write_page([make()] * 251, tmp_path / "why.html")
    with pytest.raises(ValueError, match="got none"):
        write_page([], tmp_path / "why.html")


def test_page_replaces_the_old_one_whole_or_not_at_all(tmp_path):
    path = tmp_path / "why.html"
    path.write_text("old")
    broken = replace(make(), attributions=torch.full((2, 4, 4, 3), float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        write_page(broken, path)
    assert path.read_text() == "old"
    assert write_page(make(), str(path)) == path
    assert path.read_text().rstrip().endswith("</html>")
    assert [p.name for p in tmp_path.iterdir()] == ["why.html"]


def test_twenty_large_images_take_less_than_two_megabytes(tmp_path):
    """224 x 224 pixels, 16 x 16 players, 10 classes with standard errors, pictures with the detail of photographs."""
    generator = torch.Generator().manual_seed(0)
    shape = (20, 16, 16, 10)
    attributions = torch.randn(shape, generator=generator)
    null_values = torch.randn(20, 10, generator=generator)
    logits = null_values + attributions.sum(dim=(1, 2))
    waves = torch.rand(20, 1, 56, 56, generator=generator) * torch.rand(20, 3, 1, 1, generator=generator)
    images = torch.nn.functional.interpolate(waves, size=224, mode="bicubic").clamp(0, 1).movedim(1, -1)
    explanation = replace(
        make(),
        attributions=attributions,
        classes=torch.arange(10).expand(20, -1),
        logits=logits,
        null_values=null_values,
        probabilities=logits.softmax(1),
        labels=tuple(f"class {number}" for number in range(10)),
        images=(255 * images).to(torch.uint8),
        standard_errors=attributions.abs() * 0.1,
    )
    _, page = read(explanation.save_html(tmp_path / "why.html"))
    assert (tmp_path / "why.html").stat().st_size < 2_000_000
    for picture, original in zip(pictures(page), explanation.images.numpy(), strict=True):
        assert picture.shape == original.shape
        assert np.abs(picture.astype(float) - original).mean() < 6


def test_measures_stand_above_the_images(tmp_path):
    points = {"insertion": tuple(Interval(x, x - 0.1, x + 0.1, 9) for x in (0.0, 0.5, 1.0))}
    table = Block("Cost", ("time",), (("<method>", ("1.0",)),), "Beside the plain pass.")
    measures = Measures([table], {"shapadapter": points, "random": points}, "logit", ["Of 9 images."])
    _, page = read(write_page(make(), tmp_path / "why.html", measures=measures))
    assert {"Cost", "<method>", "Beside the plain pass.", "Of 9 images."} <= set(page.words)
    (chart,) = [attrs for attrs in page.all("svg") if attrs.get("aria-label", "").startswith("Insertion")]
    assert "mean logit" in chart["aria-label"]
    assert "shapadapter 0.50, random 0.50" in chart["aria-label"]
    lines = [attrs["d"] for attrs in page.all("path") if attrs.get("fill") == "none" and "stroke-dasharray" in attrs]
    assert len(set(lines)) == 1
    # From 0 to 1 along straight lines, in a frame from -0.1 to 1.1.
    assert lines[0] == "M0.0 146.7L150.0 80.0L300.0 13.3"
    assert "Evaluation" not in read(write_page(make(), tmp_path / "plain.html"))[1].words


def test_measured_curves_differ_without_their_colours(tmp_path):
    points = tuple(Interval(x, x - 0.1, x + 0.1, 9) for x in (0.0, 0.5, 1.0))
    names = ["shapadapter", "a", "b", "c", "d", "random", "centre"]
    curves = {name: {"insertion": points, "deletion": points} for name in names}
    del curves["a"]["insertion"]
    _, page = read(write_page(make(), tmp_path / "why.html", measures=Measures(curves=curves)))
    drawn = [(attrs["stroke"], attrs["stroke-dasharray"]) for attrs in page.all("path") if "stroke-dasharray" in attrs]
    insertion, listed, deletion, listed_too = drawn[:6], drawn[6:12], drawn[12:19], drawn[19:]
    assert insertion[::-1] == listed
    assert deletion[::-1] == listed_too
    assert [*listed[:1], listed_too[1], *listed[1:]] == listed_too  # a method looks the same in both
    assert len({colour for colour, _ in listed_too}) == len({dashes for _, dashes in listed_too}) == len(names)
    assert listed_too[0] == ("#ff0d57", "none")
