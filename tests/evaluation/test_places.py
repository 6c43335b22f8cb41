"""Masks and montages: where the maps of an evaluation lie."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import CLASSES, SMALL, pictures, processor, rows_of, wrapped
from transformers import CLIPImageProcessorPil

from shapadapter import attribute, evaluate, explain
from shapadapter.core.errors import ShapleyError
from shapadapter.evaluation.dataset import Rows
from shapadapter.evaluation.localization import montage, montage_groups, saliency, tiles_inside
from shapadapter.explanation.passes import predictions

pytestmark = pytest.mark.usefixtures("quick_evaluation")

QUARTER = np.zeros((40, 40), dtype=bool)
QUARTER[:20, 20:] = True


def predicted(model, side=24, inputs=None):
    inputs = {"pixel_values": torch.randn(1, 3, side, side)} if inputs is None else inputs
    with torch.no_grad():
        (batch,) = predictions(model, inputs, None, None, 1, None, 1, {})
    return batch


def test_a_mask_is_averaged_over_the_tiles():
    inside = tiles_inside(QUARTER, predicted(wrapped()), processor())
    expected = torch.tensor([[0, 0.5, 1], [0, 0.25, 0.5], [0, 0, 0]])
    torch.testing.assert_close(inside.float(), expected, atol=0.02, rtol=0)


def test_a_mask_is_cropped_as_its_image_is():
    cropping = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    wide = np.zeros((40, 120), dtype=bool)
    wide[:, :60] = True
    inside = tiles_inside(wide, predicted(wrapped()), cropping)
    expected = torch.tensor([1, 0.5, 0]).expand(3, 3)
    torch.testing.assert_close(inside.float(), expected, atol=0.02, rtol=0)


def test_without_a_processor_masks_fit_the_prepared_images():
    batch = predicted(wrapped())
    small = np.zeros((24, 24), dtype=bool)
    small[:8, :8] = True
    assert tiles_inside(small, batch, None).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(ShapleyError, match="size of the prepared images"):
        tiles_inside(QUARTER, batch, None)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "array", "tensor", "path"])
def test_masks_of_every_kind(tmp_path, mode):
    mask = Image.fromarray(QUARTER.astype(np.uint8) * 255)
    given = {"array": QUARTER, "tensor": torch.from_numpy(QUARTER)[None], "path": str(tmp_path / "mask.png")}.get(mode)
    mask.save(tmp_path / "mask.png")
    rows = Rows([{"image": 0, "mask": mask.convert(mode) if given is None else given}], processor())
    assert (rows.mask("mask", 0) == QUARTER).all()


@pytest.mark.parametrize("wrong", [None, [1, 2, 3], np.zeros((3, 40, 40))])
def test_what_is_no_mask_is_refused(wrong):
    with pytest.raises(ShapleyError, match=r"mask \(H, W\) in the column 'mask' of row 0"):
        Rows([{"image": 0, "mask": wrong}], processor()).mask("mask", 0)


def test_saliency_finds_what_differs_in_colour():
    image = Image.new("RGB", (24, 24), (90, 90, 90))
    image.paste((200, 30, 30), (8, 0, 16, 8))
    with torch.no_grad():
        (batch,) = predictions(wrapped(), [image], processor(), None, 1, None, 1, {})
    assert saliency(batch)[0].flatten().argmax() == 1


def test_a_map_on_the_object_is_found_there():
    def on_the_object(model, inputs, classes):
        return torch.tensor([[0.0, 0, 1], [0, 0, 0], [0, 0, 0]]).expand(1, 3, 3)[..., None]

    def explainer(model, images, targets):
        return attribute(model, images, method=on_the_object, targets=targets)

    rows = rows_of(mask=[Image.fromarray(QUARTER)] * 8)
    found = evaluate(wrapped(), rows, processor(), **SMALL, methods={"mine": explainer})
    assert found.methods["mine"]["energy_inside"].mean == pytest.approx(1, abs=0.01)
    assert found.methods["mine"]["pointing_game"].mean == 1
    assert found.methods["mine"]["segmentation_ap"].mean == 1
    assert set(found.methods["colour contrast (no model)"]) == {
        "energy_inside",
        "pointing_game",
        "segmentation_accuracy",
        "segmentation_iou",
        "segmentation_ap",
    }
    assert found.about["area"] == pytest.approx(0.25, abs=0.01)
    assert "The object covers 0.25" in found.table()
    ours = np.mean([found.methods["shapadapter"]["energy_inside"].mean])
    assert 0 <= ours < 1


def test_masks_in_another_column():
    rows = rows_of(segmentation=[Image.fromarray(QUARTER)] * 8)
    assert "area" in evaluate(wrapped(), rows, processor(), **SMALL, methods=(), masks="segmentation").about
    assert evaluate(wrapped(), rows, processor(), **SMALL, methods=()).about["area"] is None
    with pytest.raises(ShapleyError, match="no column 'segments' for masks"):
        evaluate(wrapped(), rows, processor(), **SMALL, methods=(), masks="segments")


# -- montages --------------------------------------------------------------------------------------------------------


def test_a_montage_holds_four_images_row_by_row():
    values = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 12)
    found = montage(values)
    assert found.shape == (1, 3, 8, 12)
    quarters = found[0, 0].unflatten(0, (2, 4)).unflatten(2, (2, 6))  # (2, 4, 2, 6)
    assert quarters.mean(dim=(1, 3)).tolist() == [[0, 1], [2, 3]]
    assert quarters.std(dim=(1, 3)).max() == 0


def test_montages_are_of_different_classes_predicted_right():
    records = [{"index": i, "class": i % 5, "label": i % 5 if i % 7 else 9} for i in range(30)]
    fours = montage_groups(records, seed=0)
    used = [record["index"] for four in fours for record in four]
    assert len(used) == len(set(used)) == 24
    assert all(len({record["class"] for record in four}) == 4 for four in fours)
    assert all(record["class"] == record["label"] for four in fours for record in four)
    assert montage_groups(records[:3], seed=0) == []


def balanced(rows):
    """A model that predicts every class of some of the pictures, and what it predicts of each."""
    model = wrapped(rows=rows)
    logits = explain(model, pictures(60), processor(rows)).logits
    (null,) = [value for name, value in model.named_parameters() if "shapley_null" in name]
    with torch.no_grad():
        null.sub_(logits.mean(0))
    return model, (logits - logits.mean(0)).argmax(1).tolist()


def test_the_grid_pointing_game_is_played():
    model, best = balanced(6)
    images = pictures(60)
    rows = [{"image": images[place], "label": label} for place, label in enumerate(best) if best.index(label) == place]
    assert len(rows) == CLASSES
    options = {**SMALL, "images": 4, "methods": ("equal",)}
    found = evaluate(model, rows, processor(6), **options)
    assert found.notes == ()
    shares = {
        name: values["grid_pointing"].mean for name, values in found.methods.items() if "grid_pointing" in values
    }
    assert 0 <= shares["shapadapter"] <= 1
    assert shares["random"] == pytest.approx(0.25, abs=0.15)
    assert shares.get("equal", 0.25) == pytest.approx(0.25), "no positive part where the class lost by the montage"
    assert "chance 0.25" in found.table()
    wrong = [{**row, "label": (row["label"] + 1) % CLASSES} for row in rows]
    assert "predicts right" in evaluate(model, wrong, processor(6), **options).notes[0]
    assert "3 x 3 players" in evaluate(wrapped(), rows, processor(), **options).notes[0]
