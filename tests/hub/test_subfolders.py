"""Adapters of other names than "default": PEFT saves and pushes each in a folder of its name, and `load` finds it there."""

import copy
import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from server import OWNER, TOKEN
from test_cli_push import run
from tiny import BASE
from transformers import AutoImageProcessor, AutoModelForImageClassification

import shapadapter
from shapadapter import ImageError, ShapleyConfig, ShapleyError
from shapadapter.hub import push, update_card
from shapadapter.hub.load import AdapterFiles
from shapadapter.hub.space import write_space

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def base():
    return AutoModelForImageClassification.from_pretrained(BASE)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def output(model):
    with torch.no_grad():
        found = model.eval()(pixel_values=PIXELS)
    return found.logits, found.attributions


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(output(one), output(other), strict=True))


@pytest.fixture
def repo(online, tmp_path):
    """A name that no other test uses: the server is one for all."""
    return f"{OWNER}/{tmp_path.name[:40].strip('_')}"


@pytest.fixture
def named(online):
    """A model with the adapters `best` and `last`, whose numbers differ; `best` is the active one."""
    return copy.deepcopy(_named())


@functools.cache
def _named():
    torch.manual_seed(1)
    model = get_peft_model(base(), ShapleyConfig(r=2), adapter_name="best")
    model.add_adapter("last", ShapleyConfig(r=2))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".best" in name or ".last" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def alone(named):
    """A model with the adapter `best` alone."""
    named.delete_adapter("last")
    return named


def test_saved_is_loaded_bit_for_bit_from_a_folder_and_from_the_hub(online, named, tmp_path, repo):
    named.save_pretrained(tmp_path / "out")
    named.push_to_hub(repo, private=True)
    found = {}
    for name in ("best", "last"):
        named.set_adapter(name)
        for loaded, _ in (
            shapadapter.load(tmp_path / "out", subfolder=name),
            shapadapter.load(tmp_path / "out" / name),
            shapadapter.load(repo, subfolder=name, token=TOKEN),
        ):
            assert same(loaded, named)
        assert same(PeftModel.from_pretrained(base(), repo, subfolder=name), named)
        found[name], _ = output(named)
    assert not torch.equal(found["best"], found["last"])


def test_no_more_is_fetched_than_needed(online, named, tmp_path, repo):
    named.push_to_hub(repo)
    AutoImageProcessor.from_pretrained(BASE, size={"height": 64, "width": 64}).push_to_hub(repo)
    shutil.rmtree(tmp_path / "home" / "hub")  # what pushing looked up
    _, processor = shapadapter.load(repo, subfolder="best")
    assert processor.size["height"] == 64  # that of the repository, and not the base's
    (snapshot,) = (tmp_path / "home" / "hub").glob(f"models--{OWNER}--{repo.split('/')[1]}/snapshots/*")
    fetched = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    assert fetched == ["best/adapter_config.json", "best/adapter_model.safetensors", "preprocessor_config.json"]


def test_the_processor_beside_the_adapter_comes_first(online, alone, tmp_path):
    alone.save_pretrained(tmp_path)
    for place, side in ((tmp_path, 64), (tmp_path / "best", 96)):
        AutoImageProcessor.from_pretrained(BASE, size={"height": side, "width": side}).save_pretrained(place)
        assert shapadapter.load(tmp_path, subfolder="best")[1].size["height"] == side


def test_the_processor_of_all_is_found_from_the_folder_of_one(online, alone, tmp_path, repo):
    out = tmp_path / "out"
    alone.save_pretrained(out)
    AutoImageProcessor.from_pretrained(BASE, size={"height": 64, "width": 64}).save_pretrained(out)
    push(out / "best", repo)
    write_space(out / "best", tmp_path / "space")
    places = {
        "subfolder": (out, "best"),
        "folder": (out / "best",),
        "Hub": (repo,),
        "app": (tmp_path / "space/adapter",),
    }
    for checkpoint, *subfolder in places.values():
        _, processor = shapadapter.load(checkpoint, subfolder=subfolder[0] if subfolder else None)
        assert processor.size["height"] == 64
    with pytest.raises(ImageError, match="no images of 64 x 64"):  # which says that it was taken
        update_card(out / "best", images=[picture()])
    # A model's own folder has its own processor.
    (out / "config.json").write_text("{}")
    assert shapadapter.load(out / "best")[1].size["height"] == 32


def test_a_token_is_in_no_repr():
    assert TOKEN not in repr(AdapterFiles("you/vit", Path("vit"), "best", TOKEN))


def test_only_what_is_taken_is_suggested(online, alone, repo):
    alone.push_to_hub(repo)
    files = {path.replace("best/", "a\\b/"): data for path, data in online.files(repo).items()}
    online.add(f"{OWNER}/odd", files)
    with pytest.raises(ShapleyError, match="There is one in") as caught:
        shapadapter.load(f"{OWNER}/odd")
    assert "Say which" not in str(caught.value)
    online.add(f"{OWNER}/even", {**files, **online.files(repo)})
    with pytest.raises(ShapleyError, match=r"Say which: load\(..., subfolder='best'\)"):
        shapadapter.load(f"{OWNER}/even")


def test_where_there_is_none_at_the_top_the_subfolders_are_named(online, alone, tmp_path, repo):
    alone.push_to_hub(repo, private=True)
    alone.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "best").rename(tmp_path / "out" / "other")
    alone.save_pretrained(tmp_path / "out")
    for load in (lambda: shapadapter.load(repo, token=TOKEN), lambda: shapadapter.load(repo, subfolder="bset")):
        with pytest.raises(ShapleyError, match="holds no adapter") as caught:
            load()
        assert f" There is one in {repo}/best. Say which: load(..., subfolder='best')." in str(caught.value)
    for load in (lambda: shapadapter.load(tmp_path / "out"), lambda: push(tmp_path / "out", repo)):
        with pytest.raises(ShapleyError, match="holds no adapter") as caught:
            load()
        assert str(caught.value).endswith(f" There are some in {tmp_path}/out/best, {tmp_path}/out/other.")


@pytest.mark.parametrize("gone", [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_without_a_hub_those_are_named_that_were_fetched(online, alone, repo, monkeypatch, gone):
    alone.push_to_hub(repo)
    shapadapter.load(repo, subfolder="best")
    monkeypatch.setattr(f"huggingface_hub.constants.{gone[0]}", gone[1])
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the client asks again
    assert same(shapadapter.load(repo, subfolder="best")[0], alone)
    with pytest.raises(ShapleyError, match=r"holds no adapter.* There is one in .*/best"):
        shapadapter.load(repo)


def test_a_subfolder_is_inside(online, alone, tmp_path):
    alone.save_pretrained(tmp_path)
    for subfolder in ("", ".", "..", "../out", "best/../../x", "/etc", "\\etc", "best\\..\\..", "c:best"):
        for place in (tmp_path, f"{OWNER}/never-asked"):
            with pytest.raises(ShapleyError, match="does not name a folder inside another one"):
                shapadapter.load(place, subfolder=subfolder)
    assert not any("never-asked" in path for _, path, _ in online.requests)


def test_signs_of_patterns_are_letters(online, alone, repo):
    alone.push_to_hub(repo)
    files = online.files(repo)
    more = {path.replace("best/", f"{place}/"): data for path, data in files.items() for place in ("b[1]", "b1")}
    online.add(f"{OWNER}/signs", more)
    assert same(shapadapter.load(f"{OWNER}/signs", subfolder="b[1]")[0], alone)
    with pytest.raises(ShapleyError, match="holds no adapter"):
        shapadapter.load(f"{OWNER}/signs", subfolder="b*")


def test_a_pickle_in_a_subfolder_is_one(online, alone, tmp_path):
    alone.save_pretrained(tmp_path, safe_serialization=False)
    online.add(f"{OWNER}/pickled", tmp_path, private=True)
    for place in (tmp_path, f"{OWNER}/pickled"):
        with pytest.raises(ShapleyError, match=r"/best holds no adapter_model\.safetensors.* is a pickle"):
            shapadapter.load(place, subfolder="best", token=TOKEN)


def test_the_cards_of_a_push_say_how_it_is_loaded(online, named, repo):
    named.push_to_hub(repo, revision="v2", tags=["mine"])
    cards = {path: data.decode() for path, data in online.files(repo, "v2").items() if path.endswith("README.md")}
    assert set(cards) == {"README.md", "best/README.md", "last/README.md"}
    for path, card in cards.items():
        name = path.split("/")[0] if "/" in path else "best"
        assert f'shapadapter.load("{repo}", subfolder="{name}", revision="v2")' in card
        assert "pipeline(" not in card
        assert "More Information Needed" not in card
        assert card.startswith("---\n")
    assert "- mine" in cards["README.md"]
    code = re.search(r"^model, processor = .*$", cards["last/README.md"], re.MULTILINE)[0]
    said = {"shapadapter": shapadapter}
    exec(code, said)
    named.set_adapter("last")
    assert same(said["model"], named)


def test_what_was_written_into_the_cards_stays(online, alone, repo):
    alone.push_to_hub(repo)
    cards = {path: data for path, data in online.files(repo).items() if path.endswith("README.md")}
    edited = {path: data + f"\nWritten into {path}.\n".encode() for path, data in cards.items()}
    online.add(repo, {**online.files(repo), **edited})
    alone.push_to_hub(repo)
    for path, card in ((path, online.files(repo)[path].decode()) for path in edited):
        assert re.findall("Written into .*", card) == [f"Written into {path}."]


def test_the_card_of_a_default_adapter_that_is_there_stays(online, alone, tmp_path, repo):
    get_peft_model(base(), ShapleyConfig(r=2)).save_pretrained(tmp_path / "first")
    update_card(tmp_path / "first", images=[picture(1)])
    push(tmp_path / "first", repo)
    before = online.files(repo)
    alone.save_pretrained(tmp_path)
    update_card(tmp_path / "best", images=[picture(2)])
    model = PeftModel.from_pretrained(base(), tmp_path, subfolder="best", adapter_name="best")
    for branch in (None, "v2"):
        model.push_to_hub(repo, revision=branch)
        after = online.files(repo, branch or "main")
        assert {path: after[path] for path in before} == before
        assert set(after) - set(before) == {
            "best/README.md",
            "best/adapter_config.json",
            "best/adapter_model.safetensors",
        }


def test_an_adapter_may_be_called_as_the_folder_of_pictures(online, tmp_path, repo):
    get_peft_model(base(), ShapleyConfig(r=2), adapter_name="explanations").save_pretrained(tmp_path)
    place = tmp_path / "explanations"
    update_card(place, images=[picture()])
    model = PeftModel.from_pretrained(base(), tmp_path, subfolder="explanations", adapter_name="explanations")
    model.push_to_hub(repo)
    files = online.files(repo)
    assert set(files) == {
        "README.md",
        *(f"explanations/{file}" for file in ("README.md", "adapter_config.json", "adapter_model.safetensors")),
    }
    assert "](explanations/" not in files["README.md"].decode()
    assert same(shapadapter.load(repo, subfolder="explanations")[0], model)


def test_pictures_are_pushed_with_the_card_that_the_hub_shows(online, alone, tmp_path, repo):
    alone.save_pretrained(tmp_path)
    update_card(tmp_path / "best", images=[picture()])
    model = PeftModel.from_pretrained(base(), tmp_path, subfolder="best", adapter_name="best")
    model.push_to_hub(repo)
    files = online.files(repo)
    (shown,) = [path for path in files if path.startswith("explanations/")]
    assert f"]({shown})" in files["README.md"].decode()
    assert "](explanations/" not in files["best/README.md"].decode()
    assert sorted({path.split("/")[0] for path in files}) == ["README.md", "best", "explanations"]


def test_a_default_adapter_has_the_card_at_the_top(online, repo):
    model = get_peft_model(base(), ShapleyConfig(r=2))
    model.add_adapter("best", ShapleyConfig(r=2))
    model.push_to_hub(repo)
    files = online.files(repo)
    assert f'load("{repo}")' in files["README.md"].decode()
    assert f'load("{repo}", subfolder="best")' in files["best/README.md"].decode()


def test_a_base_that_nobody_else_has_is_warned_of(online, repo, tmp_path):
    base().save_pretrained(tmp_path / "base")
    here = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="a folder on this computer"):
        get_peft_model(here, ShapleyConfig(r=2), adapter_name="best").push_to_hub(repo)


def test_the_commands_take_a_subfolder(online, named, repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named.push_to_hub(repo)
    named.save_pretrained("out")
    Path("photos", "red").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save("photos/red/1.png")
    found = json.loads(run("explain", repo, "photos", "--subfolder", "last", "--json").stdout)
    assert found["checkpoint"] == f"{repo}/last"
    assert found["images"] == json.loads(run("explain", "out/last", "photos", "--json").stdout)["images"]
    assert found["images"] != json.loads(run("explain", "out/best", "photos", "--json").stdout)["images"]
    measured = ("--data", "photos", "--images", 1, "--methods", "equal", "--output", "found", "--json")
    words = json.loads(run("evaluate", repo, "--subfolder", "best", *measured).stdout)
    assert words["about"]["checkpoint"] == f"{repo}/best"
    assert (
        f"Choose another --output for {repo}/last"
        in run("report", repo, "--subfolder", "last", *measured, code=1).stderr
    )
    json.loads(run("report", repo, "--subfolder", "best", *measured).stdout)
    assert f"{repo}/best on photos" in Path("found/report.html").read_text()
    exported = ("exported", "--to", "torch", "--images", "photos", "--json")
    assert json.loads(run("export", repo, *exported, "--subfolder", "last").stdout)["images"] == 1
    inspected = json.loads(run("inspect", repo, "--subfolder", "last", "--json").stdout)
    assert (inspected["name"], inspected["adapter"]) == (f"{repo}/last", True)
    for words in (("explain", repo, "photos"), ("inspect", repo), ("export", repo, *exported)):
        assert f"{repo}/best, {repo}/last. Say which: --subfolder best." in run(*words, code=1).stderr
