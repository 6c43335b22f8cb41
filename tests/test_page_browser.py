"""The page in a real browser: what it shows, what happens when it is touched, and that it asks nobody for anything."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_visual import HOSTILE, make

from shapadapter.visual import write_page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"]
FILES = ("a/first.png", "b/second.png", "b/third.png", "c/fourth.png")


@pytest.fixture(scope="module")
def explanation():
    one = make(batch=4)
    probabilities = one.probabilities.clone()
    best = one.logits.argmax(dim=1)
    for index, sure in enumerate((0.9, 0.4, 0.7, 0.6)):
        probabilities[index, best[index]] = sure
    return replace(one, probabilities=probabilities, standard_errors=one.attributions.abs() * 0.1)


@pytest.fixture(scope="module")
def visit(explanation, tmp_path_factory):
    """One browser for all; every page of it is watched for errors, dialogs and requests."""
    root = tmp_path_factory.mktemp("pages")
    predicted = [best[0].label for best in explanation.top(1)]
    true = [predicted[0], "eight", predicted[2], "eight"]
    write_page(
        explanation,
        root / "several.html",
        names=FILES,
        true_labels=true,
        table=[("accuracy of the model on the images that it never saw", "0.50")],
    )
    hostile = replace(explanation, labels=HOSTILE)
    names = ["<img src=x onerror=alert(1)>.png", "</script><script>alert(2)</script>", "c", "d"]
    table = [("<svg onload=alert(3)>", "<script>alert(4)</script>")]
    write_page(
        hostile,
        root / "hostile.html",
        names=names,
        title="<script>alert(5)</script>",
        table=table,
        true_labels=[0] * 4,
    )
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield SimpleNamespace(browser=browser, root=root, predicted=predicted, true=true)
        browser.close()


@pytest.fixture
def opened(visit):
    """A function that opens a page in a window of its own; afterwards nothing bad may have happened in any."""
    said, asked, windows = [], [], []

    def go(file="several.html", width=1280, **options):
        window = visit.browser.new_page(viewport={"width": width, "height": 900}, **options)
        windows.append(window)
        window.set_default_timeout(5000)
        window.on("console", lambda line: said.append(line.text))
        window.on("pageerror", lambda error: said.append(str(error)))
        window.on("dialog", lambda dialog: said.append(dialog.message))
        window.on("request", lambda request: asked.append(request.url))
        window.goto((visit.root / file).as_uri())
        return window

    go.said = said
    yield go
    assert said == []
    assert all(url.startswith(("file:///", "data:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == len(windows)
    for window in windows:
        window.close()


def numbers(text):
    return [float(found) for found in re.findall(r"[-+]?\d+\.?\d*(?:e[-+]\d+)?", text.replace("\u2212", "-"))]


def order(page):
    return [int(text.split(".")[0]) for text in page.locator("#cards li:not([hidden]) b").all_text_contents()]


def columns_of(explanation, index):
    """Place of each shown class among the columns, likeliest first."""
    logits = explanation.logits[index, explanation.classes[index]]
    return logits.argsort(descending=True).tolist()


def show(page, number):
    page.locator("#cards button").filter(has=page.locator("b", has_text=re.compile(rf"^{number}\. "))).click()


def drawn(page):
    """The strengths 0..255 of the map's colours, (rows, cols)."""
    # Read from a copy: the browser complains of a canvas that is read again and again.
    script = """canvas => {
        const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
        copy.getContext("2d").drawImage(canvas, 0, 0);
        return [...copy.getContext("2d").getImageData(0, 0, copy.width, copy.height).data].filter((_, i) => i % 4 === 3);
    }"""
    return np.array(page.locator("#colors").evaluate(script)).reshape(4, 4)


def test_values_are_those_of_the_arrays(opened, explanation):
    page = opened()
    for index in (0, 3):
        show(page, index + 1)
        for player in (0, 6, 15):
            page.locator("[role=gridcell]").nth(player).hover()
            for row, column in enumerate(columns_of(explanation, index)):
                value = explanation.attributions[index].flatten(0, 1)[player, column].item()
                error = explanation.standard_errors[index].flatten(0, 1)[player, column].item()
                shown = numbers(page.locator("#rows tr").nth(row).locator(".value").inner_text())
                assert shown[0] == pytest.approx(value, rel=6e-3)
                assert shown[1] == pytest.approx(error, rel=0.06)
            assert page.locator("#place").inner_text() == f"Row {player // 4 + 1}, column {player % 4 + 1}"
        strongest = explanation.attributions[index].abs().max().item()
        expected = 255 * explanation.attributions[index, :, :, columns_of(explanation, index)[0]].abs() / strongest
        np.testing.assert_allclose(drawn(page), expected, atol=1)


def test_hover_goes_tap_stays_and_keys_walk(opened):
    page = opened(has_touch=True)
    cells = page.locator("[role=gridcell]")
    cells.nth(5).hover()
    assert page.locator("#place").inner_text() == "Row 2, column 2"
    page.locator("h1").hover()
    assert "Point at a patch" in page.locator("#place").inner_text()
    cells.nth(6).tap()
    page.locator("h1").hover()
    assert page.locator("#place").inner_text() == "Row 2, column 3"
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Home"):  # the edge stops
        page.keyboard.press(key)
    assert page.locator("#place").inner_text() == "Row 3, column 1"
    assert (
        cells.nth(8).evaluate("cell => cell === document.activeElement && getComputedStyle(cell).outlineStyle")
        == "solid"
    )
    assert cells.nth(8).get_attribute("aria-label").startswith("row 3, column 1: ")
    assert page.locator("[role=gridcell][tabindex='0']").count() == 1


def test_classes_are_switched_and_contrasted(opened, explanation):
    page = opened()
    show(page, 2)
    best, second, _ = columns_of(explanation, 1)
    maps, classes = explanation.attributions[1], explanation.classes[1].tolist()
    names = [explanation.labels[classes[place]] for place in (best, second)]
    page.keyboard.press("Tab")
    page.locator("#rows input").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#shown").inner_text().startswith(f"{names[1]}, ")
    np.testing.assert_allclose(drawn(page), 255 * maps[..., second].abs() / maps.abs().max(), atol=1)
    page.locator("#rows input").first.check()
    page.locator("#other").select_option(names[1])
    difference = maps[..., best] - maps[..., second]
    np.testing.assert_allclose(drawn(page), 255 * difference.abs() / difference.abs().max(), atol=1)
    page.locator("[role=gridcell]").nth(9).hover()
    assert numbers(page.locator("#place").inner_text())[-1] == pytest.approx(difference.flatten()[9].item(), rel=6e-3)
    ends = [explanation.logits[1, classes[place]].item() for place in (best, second)]
    assert numbers(page.locator("#check").inner_text())[-1] == pytest.approx(ends[0] - ends[1], abs=6e-3)
    assert numbers(page.locator("#end-text").text_content())[-1] == pytest.approx(ends[0] - ends[1], abs=6e-3)
    assert page.locator("#build-title").inner_text() == "How the difference of the logits builds up"
    assert names[0] + " \u2212 " + names[1] in page.locator("#shown").inner_text()


def test_the_threshold_keeps_the_strongest_patches(opened, explanation):
    page = opened()
    show(page, 1)
    slider = page.locator("#strongest")
    slider.fill("25")
    best = explanation.attributions[0, :, :, columns_of(explanation, 0)[0]]
    strong = best.abs() >= best.abs().flatten().sort(descending=True).values[3]
    assert np.array_equal(drawn(page) > 0, strong.numpy())
    text = page.locator("#strongest-text").inner_text()
    assert "4 of 16 patches" in text
    assert numbers(text)[-1] == pytest.approx(best[strong].sum().item(), abs=6e-3)
    assert numbers(text)[3] == pytest.approx(100 * (best[strong].abs().sum() / best.abs().sum()).item(), abs=0.51)
    assert page.locator("#contour .line").get_attribute("d")
    page.get_by_label("Mark + and").check()
    signs = [
        page.locator("[role=gridcell]").nth(n).get_attribute("data-sign") for n in strong.flatten().nonzero().flatten()
    ]
    assert signs == ["+" if value > 0 else "\u2212" for value in best[strong]]
    slider.focus()
    page.keyboard.press("End")
    assert "All patches" in page.locator("#strongest-text").inner_text()
    assert not page.locator("#contour .line").get_attribute("d")


def test_the_build_up_ends_at_the_logit(opened, explanation):
    page = opened()
    show(page, 3)
    column = columns_of(explanation, 2)[0]
    values = explanation.attributions[2, :, :, column].flatten().sort(descending=True).values
    label = explanation.classes[2, column]
    null, logit = explanation.null_values[2, label].item(), explanation.logits[2, label].item()
    for added in (16, 0, 5):
        page.locator("#added").fill(str(added))
        total = numbers(page.locator("#added-text").inner_text().split("=")[1])[0]
        assert total == pytest.approx(null + values[:added].sum().item(), abs=6e-3)
        assert int((drawn(page) > 0).sum()) == added
        if added == 16:
            assert total == pytest.approx(logit, abs=6e-3)
    assert numbers(page.locator("#end-text").text_content())[0] == pytest.approx(logit, abs=6e-3)
    points = [numbers(page.locator(f"#{part}").get_attribute("d") or "") for part in ("rise", "fall", "rest")]
    assert sum(len(part) // 2 - 1 for part in points if part) == 16
    assert points[2][-1] == pytest.approx(numbers(page.locator("#end-line").get_attribute("d"))[1], abs=0.06)
    assert "The model is not run again" in page.locator("#build").inner_text()


def test_the_gallery_is_sorted_filtered_and_searched(opened, visit, explanation):
    page = opened()
    wrong = [place + 1 for place in range(4) if visit.predicted[place] != visit.true[place]]
    assert wrong
    assert order(page)[: len(wrong)] == wrong
    assert page.locator("#heading").inner_text().startswith(f"{wrong[0]}. ")
    assert page.locator("#count").inner_text() == f"4 of 4 images, {len(wrong)} wrong"
    page.locator("#order").select_option("confidence")
    sure = [best[0].probability for best in explanation.top(1)]
    assert order(page) == [place + 1 for place in np.argsort(sure)]
    page.locator("#order").select_option("gap")
    assert order(page) == [place + 1 for place in np.argsort(-explanation.efficiency_gap.numpy(), kind="stable")]
    page.locator("#order").select_option("class")
    assert [visit.predicted[place - 1] for place in order(page)] == sorted(visit.predicted)
    page.locator("#order").select_option("given")
    assert order(page) == [1, 2, 3, 4]
    page.locator("#find").fill("B/")
    assert order(page) == [2, 3]
    assert "second.png" in page.locator("#heading").inner_text()
    page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowDown"):  # the end stops
        page.keyboard.press(key)
    assert "third.png" in page.locator("#heading").inner_text()
    page.locator("#find").fill("no such file")
    assert page.locator("#count").inner_text().startswith("0 of 4")
    page.locator("#find").fill("")
    page.locator("#only").select_option("eight")
    assert order(page) == [place + 1 for place in range(4) if "eight" in (visit.predicted[place], visit.true[place])]


def test_light_dark_phone_and_print(opened):
    page = opened(width=360, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    value = page.get_by_role("cell", name="0.50")
    lines = """cell => { const text = document.createRange(); text.selectNodeContents(cell); return text.getClientRects().length; }"""
    assert value.evaluate(lines) == 1
    page.locator("#theme").click()
    light = page.evaluate(paper)
    assert sum(numbers(light)) > sum(numbers(dark)) + 300
    page.locator("#theme").click()
    assert page.evaluate(paper) == dark
    for theme in ("dark", "system"):
        assert page.locator("#theme").inner_text() == f"Theme: {theme}"
        page.emulate_media(media="print")
        assert page.evaluate(paper) == "rgb(255, 255, 255)"
        assert not page.locator("#strongest").is_visible()
        assert not page.get_by_text("Point at a patch").is_visible()
        assert not page.get_by_role("columnheader", name="This patch").is_visible()
        page.emulate_media(media="screen")
        assert page.get_by_text("Point at a patch").is_visible()
        page.locator("#theme").click()


def marked(page):
    """The signs that are seen on the map, and how many dashes on the small maps of the gallery."""
    signs = page.locator("[role=gridcell]").evaluate_all(
        """cells => cells.map(cell => getComputedStyle(cell, "::after"))
            .map(mark => mark.display === "none" || mark.content === "none" ? "" : mark.content.replaceAll('"', ""))"""
    )
    dashes = page.locator(".thumb path").evaluate_all("paths => paths.map(path => path.getAttribute('d'))")
    seen = page.locator(".thumb svg").evaluate_all("all => all.map(one => getComputedStyle(one).display !== 'none')")
    return signs, [path.count("M") if shown else 0 for path, shown in zip(dashes, seen, strict=True)]


def test_signs_are_marked_where_colours_may_not_tell(opened, explanation):
    page = opened()
    page.locator("#order").select_option("given")
    best = [explanation.attributions[i, :, :, columns_of(explanation, i)[0]].flatten() for i in range(4)]
    worth = [0.15 * explanation.attributions[i].abs().max() for i in range(4)]
    signs = ["" if abs(value) < worth[0] else "+" if value > 0 else "\u2212" for value in best[0]]
    asked = signs, [int((values < -least).sum()) for values, least in zip(best, worth, strict=True)]
    assert {"", "+", "\u2212"} == set(signs)
    assert marked(page) == ([""] * 16, [0] * 4)
    page.emulate_media(media="print")
    assert marked(page) == asked
    page.emulate_media(media="screen", contrast="more")
    page.locator("main.signs").wait_for()  # browsers tell of the wish with the next frame
    assert marked(page) == asked
    page.get_by_label("Mark + and").uncheck()
    assert marked(page) == ([""] * 16, [0] * 4)
    page = opened(contrast="more")
    assert page.get_by_label("Mark + and").is_checked()
    assert any(marked(page)[0])


def test_hostile_names_are_shown_and_never_run(opened):
    page = opened("hostile.html", width=360)
    assert page.locator("h1").inner_text() == "<script>alert(5)</script>"
    assert "<img src=x onerror=alert(1)>.png" in page.locator("#cards").inner_text()
    assert HOSTILE[1] in page.locator("#rows").inner_text()
    show(page, 2)
    assert "</script><script>alert(2)</script>" in page.locator("#heading").inner_text()
    page.locator("#other").select_option(index=2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("script, img, svg").count() == 2 + 3 * 4 + 2 + 2
    # Even what would get in could not run.
    blocked = page.evaluate(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));"
        " const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s); })"
    )
    assert blocked.startswith("script-src")
    assert page.evaluate("window.ran") is None
    assert "Content Security Policy" in opened.said.pop()
