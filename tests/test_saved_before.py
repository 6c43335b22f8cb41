"""What the version before saved loads with the same numbers.

`tests/fixtures` was written by 0.1.0.dev0 before the package got its present layout: a base model, an adapter and an
explanation, and in `expected.json` what they said then. Never write these files anew: they stand for those of users.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from shapadapter import Explanation, explain, load

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


def expected(name: str) -> torch.Tensor:
    return torch.tensor(EXPECTED[name])


def test_an_adapter_saved_before_answers_the_same(monkeypatch):
    monkeypatch.chdir(FIXTURES)  # the adapter names its base as a path beside it
    model, processor = load("adapter", device="cpu")
    images = [Image.open(FIXTURES / f"image-{index}.png") for index in range(2)]
    with torch.no_grad():
        output = model(**processor(images, return_tensors="pt"))
    for name in ("logits", "attributions", "null_values"):
        torch.testing.assert_close(getattr(output, name), expected(name), rtol=1e-4, atol=1e-5)
    assert explain(model, images, processor, top_k=3).labels == ("cat", "dog", "fox")


def test_an_explanation_saved_before_reads_the_same():
    explanation = Explanation.load(FIXTURES / "explanation")
    assert torch.equal(explanation.attributions, expected("explained"))  # (B, rows, cols, C)
    assert explanation.evaluations.tolist() == [8, 8]
    assert explanation.standard_errors.shape == explanation.attributions.shape
    shown = [torch.gather(table, 1, explanation.classes) for table in (explanation.logits, explanation.null_values)]
    torch.testing.assert_close(explanation.attributions.sum((1, 2)), shown[0] - shown[1], rtol=0, atol=1e-5)


MOVED = [
    "collator",
    "errors",
    "explaining",
    "game",
    "grid",
    "images",
    "inspecting",
    "loading",
    "objective",
    "outputs",
    "refinement",
    "retrieval",
    "shapley",
    "texts",
    "training.finetune",
]


@pytest.mark.parametrize("name", MOVED)
def test_a_module_is_found_by_the_name_it_had(name):
    sys.modules.pop(f"shapadapter.{name}", None)
    with pytest.warns(DeprecationWarning, match=rf"shapadapter\.{name} is (\S+) now") as caught:
        found = importlib.import_module(f"shapadapter.{name}")
    new = str(caught[0].message).split(" is ")[1].removesuffix(" now.")
    assert found is importlib.import_module(new)
    assert found.__spec__.name == new
