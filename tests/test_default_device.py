"""`torch.set_default_device`, as many set it at the top of a notebook, changes no number. "meta" stands for a GPU here."""

import families
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import ViTImageProcessor

from shapadapter import (
    Explanation,
    PatchGame,
    ShapleyConfig,
    ShapleyTrainer,
    ShapleyTrainingArguments,
    attribute,
    evaluate,
    explain,
)


def _model(**options):
    torch.manual_seed(0)
    model = get_peft_model(families.MAKERS["vit"](), ShapleyConfig(**options)).eval()
    families.randomise(model)
    return model


@pytest.fixture(scope="module")
def model():
    return _model()


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def photos():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(4)]


def elsewhere(call):
    """What a call returns while "meta" is the default device, where tensors hold no numbers."""
    torch.set_default_device("meta")
    try:
        return call()
    finally:
        torch.set_default_device(None)


METHODS = [
    "attention",
    "attention_rollout",
    "grad_cam",
    "leave_one_out",
    "kernel_shap",
    "permutation",
    "random",
    "centre",
]


@pytest.mark.parametrize("method", METHODS)
def test_attributing(model, processor, photos, method):
    def call():
        return attribute(model, photos[:2], processor, method=method, evaluations=32).attributions

    assert torch.equal(elsewhere(call), call())


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("refine", [0, 16, "until"])
def test_explaining(model, processor, photos, prepared, refine):
    inputs = dict(processor(photos[:2], return_tensors="pt")) if prepared else photos[:2]

    def call():
        return explain(model, inputs, None if prepared else processor, refine=refine, **more)

    more = {"max_refine": 128, "relative_error": 0.9} if refine == "until" else {}
    expected, found = call(), elsewhere(call)
    assert torch.equal(expected.attributions, found.attributions)
    assert torch.equal(expected.logits, found.logits)
    assert found.images.device.type == "cpu"


def test_a_game(model, processor, photos):
    pixels = processor(photos[0], return_tensors="pt")["pixel_values"]

    def call():
        game = PatchGame(model, pixels)
        return game.kernel_shap(64, torch.Generator().manual_seed(0))[0]

    assert torch.equal(elsewhere(call), call())


def test_an_explanation(model, processor, photos, tmp_path):
    explanation = explain(model, photos[:2], processor)
    page = elsewhere(lambda: explanation.save_html(tmp_path / "page.html")) or tmp_path / "page.html"
    assert page.stat().st_size > 1000
    assert elsewhere(lambda: explanation.figure(0)).axes
    assert elsewhere(lambda: explanation.to_dict()) == explanation.to_dict()
    assert np.array_equal(elsewhere(lambda: explanation.heatmap()), explanation.heatmap())
    elsewhere(lambda: explanation.save(tmp_path / "saved"))
    loaded = elsewhere(lambda: Explanation.load(tmp_path / "saved"))
    assert torch.equal(loaded.attributions, explanation.attributions)


def test_wrapping(processor, photos):
    base = families.MAKERS["vit"]()
    families.randomise(base)
    model = elsewhere(
        lambda: get_peft_model(base, ShapleyConfig(grid=(2, 2), tune="frozen"))
    )  # PEFT makes LoRA on the default device
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert explain(model, photos[:1], processor).attributions.isfinite().all()


@pytest.mark.usefixtures("quick_evaluation")
def test_evaluating(model, processor, photos):
    rows = [{"image": photo, "label": i % 3} for i, photo in enumerate(photos)]

    def call():
        found = evaluate(
            model, rows, processor, images=2, truth_evaluations=64, budgets=(16, 32), methods=(), progress=False
        )
        return {
            name: number for name, number in found.metrics().items() if "time" not in name and "memory" not in name
        }

    assert elsewhere(call) == pytest.approx(call(), nan_ok=True)


def test_a_training_step(processor, photos, tmp_path):
    rows = [{"image": photo, "label": i % 3} for i, photo in enumerate(photos)]

    def loss():
        model = _model()
        args = ShapleyTrainingArguments(
            tmp_path, use_cpu=True, report_to="none", card_images=0, remove_unused_columns=False
        )
        trainer = ShapleyTrainer(model, args, train_dataset=rows, processing_class=processor)
        batch = trainer.data_collator(rows)

        def step():
            return trainer.compute_loss(model, dict(batch)).detach()

        return step

    assert torch.isfinite(elsewhere(loss()))
