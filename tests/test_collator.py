"""From rows to batches: what the collator takes, and what it says to what it does not take."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from shapadapter.errors import ImageError
from shapadapter.images import open_image
from shapadapter.training import ImageCollator

RED = (255, 0, 0)


@pytest.fixture(scope="module")
def collate() -> ImageCollator:
    # Pixel values are 2 * value / 255 - 1: red is (1, -1, -1).
    return ImageCollator(ViTImageProcessorPil(size={"height": 32, "width": 32}))


def red(mode="RGB") -> Image.Image:
    return Image.new("RGB", (40, 30), RED).convert(mode)


def test_images_become_pixel_values_in_order_and_labels_a_vector(collate):
    batch = collate([{"image": red(), "label": 2}, {"image": Image.new("RGB", (9, 9)), "label": 0}])
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].mean(dim=(2, 3)).tolist() == [[1, -1, -1], [-1, -1, -1]]
    assert batch["labels"].tolist() == [2, 0]
    assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("kind", ["image", "path", "string", "array"])
def test_images_paths_and_arrays_give_the_same(collate, tmp_path, kind):
    path = tmp_path / "red.png"
    red().save(path)
    image = {"image": red(), "path": path, "string": str(path), "array": np.asarray(red())}[kind]
    assert torch.equal(collate([{"image": image}])["pixel_values"], collate([{"img": red()}])["pixel_values"])


@pytest.mark.parametrize(("mode", "mean"), [("L", [-0.4, -0.4, -0.4]), ("RGBA", [1, -1, -1]), ("P", [1, -1, -1])])
def test_other_modes_become_rgb(collate, mode, mean):
    pixels = collate([{"image": red(mode)}])["pixel_values"]
    torch.testing.assert_close(pixels.mean(dim=(2, 3)), torch.tensor([mean], dtype=torch.float32), atol=5e-3, rtol=0)


def test_prepared_rows_are_stacked_without_a_processor():
    rows = [{"pixel_values": torch.full((3, 4, 4), float(value)), "labels": value} for value in (1, 2)]
    batch = ImageCollator()(rows)
    assert batch["pixel_values"].mean(dim=(1, 2, 3)).tolist() == [1, 2]
    assert batch["labels"].tolist() == [1, 2]
    lists = ImageCollator()([{"pixel_values": np.zeros((3, 4, 4), dtype=np.float32)}])
    assert lists["pixel_values"].shape == (1, 3, 4, 4)


def test_labels_may_be_missing(collate):
    assert set(collate([{"image": red()}])) == {"pixel_values"}


def test_multi_hot_labels_stay_floats(collate):
    labels = collate([{"image": red(), "label": [1.0, 0.0]}, {"image": red(), "label": [0.0, 1.0]}])["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "cut off"])
def test_a_damaged_file_is_named(collate, tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:4000]
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.png"):
        collate([{"image": path}])


def test_a_missing_file_is_named(collate, tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        collate([{"image": tmp_path / "nowhere.png"}])


def test_no_image_column_names_the_columns_that_came(collate):
    with pytest.raises(ImageError, match=r"'picture'"):
        collate([{"picture": red(), "label": 0}])


def test_images_without_a_processor_say_what_to_pass():
    with pytest.raises(ImageError, match="processing_class"):
        ImageCollator()([{"image": red()}])


def test_unused_columns_are_named_once():
    collate = ImageCollator()
    rows = [{"pixel_values": torch.zeros(3, 4, 4), "label": 0, "weather": "rain", "camera": 7}]
    with pytest.warns(UserWarning, match=r"\['camera', 'weather'\]"):
        collate(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate(rows)


# -- known faults, to be mended --------------------------------------------------------------------------------------

fault = pytest.mark.xfail(strict=True)


def test_multi_hot_labels_may_be_tensors(collate):
    labels = collate([{"image": red(), "label": torch.tensor([1.0, 0.0])}] * 2)["labels"]
    assert labels.tolist() == [[1, 0]] * 2


def test_a_turned_photograph_is_set_upright_as_data_sets_do(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)
