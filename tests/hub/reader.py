"""Run by the tests in a process of its own, with an empty cache: load what `author.py` pushed, on every road."""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from shapadapter import ShapleyError, load

ANSWERS, TOKEN = Path(sys.argv[1]), sys.argv[2]
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def check(road, model, answer):
    with torch.no_grad():
        output = model.eval()(pixel_values=PIXELS)
    expected = load_file(ANSWERS / f"{answer}.safetensors")
    assert torch.equal(output.logits, expected["logits"]), road
    assert torch.equal(output.attributions, expected["attributions"]), road
    print("same", road)


model, processor = load("ada/whole")
check("load", model, "trained")
assert processor.size["height"] == 32
assert not model.training
cached = Path(sys.argv[3]) / "hub"
for path in sorted(cached.glob("*/snapshots/*/*")):
    print("cached", path.parts[-4], path.name)

check("AutoPeftModel", AutoPeftModel.from_pretrained("ada/pushed"), "trained")
base = AutoModelForImageClassification.from_pretrained("ada/tiny-vit")
check("PeftModel", PeftModel.from_pretrained(base, "ada/pushed"), "trained")
check("AutoModel", AutoModelForImageClassification.from_pretrained("ada/pushed"), "trained")
check("pipeline", pipeline("image-classification", model="ada/whole").model, "trained")
check("branch", load("ada/pushed", revision="v2")[0], "moved")
check("pull request", load("ada/pushed", revision="refs/pr/1")[0], "moved")
base = AutoModelForImageClassification.from_pretrained("ada/tiny-vit")
check("PeftModel, branch", PeftModel.from_pretrained(base, "ada/pushed", revision="v2"), "moved")
adapter = {"revision": "v2"}
check(
    "AutoModel, branch", AutoModelForImageClassification.from_pretrained("ada/pushed", adapter_kwargs=adapter), "moved"
)
check("added, load", load("ada/added")[0], "added")
check("added, AutoModel", AutoModelForImageClassification.from_pretrained("ada/added"), "added")
check("added, AutoPeftModel", AutoPeftModel.from_pretrained("ada/added"), "added")

for name in ("ada/trained", "ada/secret", "ada/own"):
    try:
        load(name)
    except ShapleyError as error:
        print("refused", error)
check("private, trainer", load("ada/trained", token=TOKEN)[0], "trained")
check("private, branch of the trainer", load("ada/trained", revision="from-trainer", token=TOKEN)[0], "trained")
check("private, PEFT", AutoPeftModel.from_pretrained("ada/secret", token=TOKEN), "trained")
check("private, AutoModel", AutoModelForImageClassification.from_pretrained("ada/secret", token=TOKEN), "trained")
check("base beside, load", load("ada/own", token=TOKEN)[0], "own")
check("base beside, PEFT", AutoPeftModel.from_pretrained("ada/own", token=TOKEN), "own")
