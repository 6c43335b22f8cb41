"""Run by a test in a process of its own, with an empty cache: use a pushed adapter as its card says, in every way."""

import re
import sys

import numpy as np
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

import shapadapter

NAME, AUTHORS = sys.argv[1], np.load(sys.argv[2])
PICTURES = [Image.fromarray(pixels) for pixels in AUTHORS["images"]]


def agree(road, logits, attributions, tolerance=0.0, images=slice(None)):
    gap = max(
        float(np.abs(np.asarray(logits) - expected.logits[images].numpy()).max()),
        float(np.abs(np.asarray(attributions) - expected.attributions[images].numpy()).max()),
    )
    assert gap <= tolerance, (road, gap)
    print("agrees", road)


model, processor = shapadapter.load(NAME)
expected = shapadapter.explain(model, PICTURES, processor)
agree("the author", AUTHORS["logits"], AUTHORS["attributions"])

# The first block of Python on the card, as it stands there, with an image beside it.
snippet = next(iter(re.findall(r"```python\n(.*?)```", ModelCard.load(NAME).content, re.DOTALL)))
print(snippet)
for name in re.findall(r'"([^"\s]+\.(?:jpg|png))"', snippet)[:1]:
    PICTURES[0].save(name, format="png")
said = {}
exec(snippet, said)
one = said["explanation"]
maps = torch.stack([one.for_label(index) for index in range(3)], dim=-1)  # (1, rows, cols, 3)
agree("the card", one.logits, maps, tolerance=1e-5, images=slice(1))  # one image alone is rounded otherwise

answers = pipeline("image-attribution", model=NAME)(PICTURES, top_k=3)
order = [[expected.class_index(answer["label"]) for answer in image] for image in answers]
logits, maps = np.zeros((len(answers), 3)), np.zeros((*expected.attributions.shape[:3], 3))
for row, (image, indices) in enumerate(zip(answers, order, strict=True)):
    for answer, index in zip(image, indices, strict=True):
        logits[row, index], maps[row, :, :, index] = answer["logit"], answer["attributions"]
agree("the pipeline", logits, maps, tolerance=1e-5)
plain = pipeline("image-classification", model=NAME)(PICTURES)
assert [image[0]["label"] for image in plain] == [image[0].label for image in expected.top(1)]
print("agrees image-classification")
