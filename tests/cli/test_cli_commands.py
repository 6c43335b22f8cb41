"""The commands that hand over to other rooms, on real files."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import error_of, run
from small import pictures, processor
from transformers import GPT2Config, GPT2Model

from shapadapter import UnsupportedModelError, load
from shapadapter.backbone import selftest
from shapadapter.cli import share as space
from shapadapter.export import ExportReport


def test_inspect_an_adapter_a_base_and_what_is_not_supported(tmp_path):
    said = run("inspect", "out").stdout
    for words in (
        "self-test   *passed",
        "vit [(]ViTForImageClassification",
        "3 x 3 on images of 24 x 24",
        "4: ant, bee",
    ):
        assert re.search(words, said), said
    found = json.loads(run("inspect", "out", "--json").stdout)
    assert (found["adapter"], found["supported"], found["removal"]) == (True, True, "drop")
    assert found["removals"] == dict.fromkeys(("drop", "mask", "pixels"), "works")
    assert found["adapter_bytes"] == pytest.approx(Path("out/adapter_model.safetensors").stat().st_size, rel=0.1)
    own = json.loads(run("inspect", "base", "--json").stdout)
    assert (own["adapter"], own["players"], own["lora_targets"]) == (False, [3, 3], ["q_proj", "v_proj"])
    gpt = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)
    GPT2Model(gpt).save_pretrained(tmp_path / "gpt")
    refused = run("inspect", tmp_path / "gpt", code=1)
    assert "NOT SUPPORTED: Expected a vision model, got GPT2Model" in refused.stdout
    assert json.loads(run("inspect", tmp_path / "gpt", "--json", code=1).stdout)["supported"] is False
    assert "cannot be loaded" in error_of("inspect", "out/..")


def test_the_inspected_model_is_tested_again(monkeypatch):
    """What is said is what a self-test finds now: a model whose masking leaks is no longer called sound."""
    monkeypatch.setattr(selftest._SelfTest, "check_base", refuse)
    assert "the token changes the logits" in error_of("inspect", "out")


def refuse(*_):
    raise UnsupportedModelError("the token changes the logits")


def test_a_report_is_an_evaluation_with_images(tmp_path):
    arguments = ("report", "out", "--data", "photos", "--images", 2, "--methods", "equal", "--output", tmp_path)
    found = json.loads(run(*arguments, "--shown", 3, "--json").stdout)
    assert found["metrics"]["error"] > 0
    page = Path(found["page"]).read_text()
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])["images"]
    right = [image["right"] for image in shown]
    assert right == sorted(right)  # wrong predictions first
    assert len(right) == 3
    assert all(image["true"] == image["name"].split("/")[0] for image in shown)
    assert all(any(one["true"] for one in image["classes"]) for image in shown)
    assert "Relative L2 error to the true Shapley values" in page
    assert "Insertion: most relevant first" in page
    assert "Compared:" in page
    assert "Method: forward and backward pass." in page
    run(*arguments, "--shown", 1, "--refine", 0)
    assert "Method: one forward pass." in Path(found["page"]).read_text()
    assert json.loads((tmp_path / "evaluation.json").read_text())["about"]["folder"] == "photos"
    assert run("card", "out", "--evaluation", tmp_path / "evaluation.json", "--images", "photos/ant").exit_code == 0
    card = Path("out/README.md").read_text()
    assert "Relative L2 error" in card
    assert "![" in card
    assert "Their level: forward and backward pass." in card
    # Of a large folder a few, spread over all of it.
    assert run("card", "out", "--images", "photos", "--shown", 2, "--refine", 0).exit_code == 0
    assert "Their level: one forward pass." in Path("out/README.md").read_text()
    assert len(list(Path("out/explanations").glob("*.png"))) == 2
    lost = run("evaluate", "out", "--data", "photos", "--base", "nowhere/at/all", code=1)
    assert "--base nowhere/at/all holds no model" in lost.stderr


def test_export_prints_how_far_it_differs(tmp_path, monkeypatch):
    arguments = ("export", "out", tmp_path / "program", "--to", "torch", "--images", "photos/ant")
    assert "largest difference" in run(*arguments).stdout
    program = torch.export.load(tmp_path / "program" / "model.pt2").module()
    (pixels,) = processor()(pictures(1), return_tensors="pt").values()
    model, _ = load("out")
    torch.testing.assert_close(program(pixel_values=pixels)["logits"], model(pixel_values=pixels).logits)
    told = error_of("export", "out", tmp_path / "no", "--to", "torch", "--images", "../shapez")
    assert told == "Error: Cannot read image '../shapez': No such file or directory"
    given = []

    def onnx(model, folder, **options):
        given.append((folder, sorted(options)))
        return ExportReport(folder / "model.onnx", {"logits": 1e-6}, 2, 18, {"model.onnx": 1})

    monkeypatch.setattr("shapadapter.export.export_onnx", onnx)
    found = json.loads(run("export", "out", tmp_path / "onnx", "--images", "photos/ant", "--json").stdout)
    assert found["path"] == str(tmp_path / "onnx" / "model.onnx")
    assert given == [(tmp_path / "onnx", ["images", "processor", "texts"])]


def test_a_space_is_a_folder(tmp_path):
    more = ("--license", "mit", "--example", "photos/ant/0.png")
    found = json.loads(
        run("space", "out", tmp_path / "space", "--copy-base", "--title", "<b>Ants</b>", "--json", *more).stdout
    )
    assert (Path(found["folder"]) / "app.py").is_file()
    assert "license: mit" in (Path(found["folder"]) / "README.md").read_text()
    assert list(Path(found["folder"], "examples").iterdir())
    assert found["url"] is None


def test_a_space_says_what_starts_it_and_what_installs_gradio(tmp_path, monkeypatch):
    app = tmp_path / "space"
    monkeypatch.setattr(space, "find_spec", lambda _: None)
    said = run("space", "out", app, "--copy-base").stdout
    assert said == f"Wrote {app}. Try it: pip install -r {app}/requirements.txt && python {app}/app.py\n"
    monkeypatch.setattr(space, "find_spec", lambda _: True)
    assert f"Try it: python {app}/app.py" in run("space", "out", app, "--copy-base").stdout


def test_push_has_no_option_for_a_token():
    said = run("push", "--help").stdout
    assert "hf auth login" in said
    assert "--token" not in said
    assert "No such option" in error_of("push", "out", "me/out", "--token", "hf_secret", code=2)
    assert "base-repo" in error_of("push", "out", "me/out")


def rows_of_a_demo(output, seed, quick):
    print("1/6")  # noqa: T201
    return [(" accuracy", str(seed))]


def test_demo_says_what_it_found(monkeypatch, tmp_path):
    monkeypatch.setattr("shapadapter.demo.run", rows_of_a_demo)
    found = run("demo", "--output", tmp_path, "--seed", 3, "--json")
    assert json.loads(found.stdout) == {"output": str(tmp_path), "rows": {"accuracy": "3"}}
    assert "1/6" in found.stderr
