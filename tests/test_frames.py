"""Where the model saw the original image: checked by painting patches into originals, whatever the processor does."""

import warnings

import numpy as np
import pytest
import torch
from families import wrap
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    LevitImageProcessorPil,
    MobileViTImageProcessorPil,
    PerceiverImageProcessorPil,
    PoolFormerImageProcessorPil,
    Siglip2ImageProcessorPil,
    TextNetImageProcessorPil,
    ViTImageProcessorPil,
)

from shapadapter import Explanation, attribute, explain
from shapadapter.data.collator import ImageCollator
from shapadapter.data.images import prepare_opened, unpatchify
from shapadapter.data.processors import frames, unseen
from shapadapter.explanation.passes import as_pictures
from shapadapter.training.validation import warn_of_crops
from shapadapter.visual import draw_explanation, draw_strip

SQUARE = {"height": 64, "width": 64}
PROCESSORS = {
    "resized": ViTImageProcessorPil(size=SQUARE),
    "resized, nearest": ViTImageProcessorPil(size=SQUARE, resample=0),
    "stretched": ViTImageProcessorPil(size={"height": 48, "width": 96}),
    "as it is": ViTImageProcessorPil(do_resize=False),
    "shortest edge, center crop": CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=SQUARE),
    "shortest edge, smaller crop": BitImageProcessorPil(size={"shortest_edge": 80}, crop_size=SQUARE),
    "shortest edge alone": CLIPImageProcessorPil(size={"shortest_edge": 64}, do_center_crop=False),
    "both edges": CLIPImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 64}, do_center_crop=False),
    "crop alone, with padding": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 160, "width": 160}),
    "crop_pct": ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875),
    "crop_pct, too large to crop": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "256 / 224": LevitImageProcessorPil(),
    "pooled crop": PoolFormerImageProcessorPil(size={"shortest_edge": 64}, crop_size=SQUARE),
    "padded, channels flipped": MobileViTImageProcessorPil(size={"shortest_edge": 56}, crop_size=SQUARE),
    "resized, then cropped": EfficientNetImageProcessorPil(size={"height": 80, "width": 80}, crop_size=SQUARE, do_center_crop=True),
    "cropped, then resized": PerceiverImageProcessorPil(size=SQUARE, crop_size={"height": 72, "width": 72}),
    "multiples of 32": TextNetImageProcessorPil(size={"shortest_edge": 64}),
    "patches": Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64),
}  # fmt: skip


def prepared(image, processor):
    """Pixels (3, h, w)."""
    inputs = prepare_opened([image], processor)
    pixels = inputs["pixel_values"]
    return (unpatchify(pixels, inputs["spatial_shapes"][0].tolist()) if pixels.ndim == 3 else pixels)[0].double()


def middle(changed):
    """The center of mass of changes (h, w), in pixels: down and across."""
    return [
        float(((torch.arange(len(along)) + 0.5) * along).sum() / along.sum())
        for along in (changed.sum(1), changed.sum(0))
    ]


@pytest.mark.parametrize("size", [(150, 227), (41, 30)], ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_patch_painted_into_the_original_is_where_the_frame_says(name, size):
    processor, (height, width) = PROCESSORS[name], size
    black = Image.new("RGB", (width, height))
    before = prepared(black, processor)
    found = frames([black], processor, tuple(before.shape[1:]))
    assert found[0, :2].tolist() == [height, width]
    top, left, bottom, right = found[0, 2:].tolist()
    per_pixel = (bottom - top) / before.shape[1], (right - left) / before.shape[2]
    for down, across in ((0.42, 0.56), (0.57, 0.45)):
        rows, cols = (
            (round((at - 0.05) * count), round((at + 0.05) * count)) for at, count in ((down, height), (across, width))
        )
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[slice(*rows), slice(*cols)] = 255
        seen = middle((prepared(Image.fromarray(pixels), processor) - before).abs().sum(0))
        there = top + seen[0] * per_pixel[0], left + seen[1] * per_pixel[1]
        for measured, painted, unit in zip(there, (sum(rows) / 2, sum(cols) / 2), per_pixel, strict=True):
            assert abs(measured - painted) < 0.75 * max(unit, 1), (name, found)


@pytest.mark.parametrize(
    ("name", "size", "frame"),
    [
        ("resized", (150, 227), (0, 0, 150, 227)),
        ("as it is", (31, 45), (0, 0, 31, 45)),
        ("shortest edge, center crop", (100, 200), (0, 50, 100, 150)),
        ("shortest edge, center crop", (200, 100), (50, 0, 150, 100)),
        ("shortest edge, smaller crop", (100, 100), (10, 10, 90, 90)),
        ("crop alone, with padding", (100, 200), (-30, 20, 130, 180)),
        ("crop_pct, too large to crop", (100, 200), (0, 0, 100, 200)),
        ("padded, channels flipped", (56, 56), (-4, -4, 60, 60)),
    ],
)
def test_frames_that_can_be_told_by_hand(name, size, frame):
    processor, image = PROCESSORS[name], Image.new("RGB", size[::-1])
    found = frames([image], processor, tuple(prepared(image, processor).shape[1:]))
    assert torch.allclose(found[0, 2:], torch.tensor(frame, dtype=torch.float64), atol=0.6), found


def test_what_is_cut_off():
    found = torch.tensor([[100, 200, 0, 50, 100, 150], [100, 100, -10, -10, 110, 110], [10, 10, 0, 0, 10, 10]])
    assert unseen(found.double()).tolist() == [0.5, 0.0, 0.0]
    assert unseen(torch.full((1, 6), torch.nan)).isnan().all()


# -- maps -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return wrap("vit")


CROP = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def photo(height=100, width=200, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_maps_in_the_frame_of_the_original(model):
    explanation = explain(model, [photo(), photo(200, 100)], CROP, top_k=2)
    for index, size in enumerate([(100, 200), (200, 100)]):
        assert tuple(explanation.frames[index, :2].tolist()) == size
        for smooth in (False, True):
            heat = explanation.heatmap(index=index, original=True, smooth=smooth)
            alone = explanation.heatmap(index=index, smooth=smooth)
            assert heat.shape == size
            seen = heat[:, 50:150] if index == 0 else heat[50:150]
            assert np.isfinite(seen).all()
            assert np.isnan(heat).mean() == 0.5
            places = (np.arange(32) * 100 + 50) // 32
            assert np.allclose(
                seen[np.ix_(places, places)], alone, atol=0 if not smooth else 0.2 * np.abs(alone).max()
            )
    values = explanation[0].attributions[0, :, :, 0].numpy()
    heat = explanation.heatmap(explanation.classes[0, 0].item(), original=True)
    assert np.array_equal(heat[::25, 50:150:25], values)
    assert np.array_equal(heat[24:100:25, 74:150:25], values)


def test_padding_is_no_part_of_the_original(model):
    processor = CLIPImageProcessorPil(do_resize=False, crop_size={"height": 32, "width": 32})
    heat = explain(model, photo(16, 48), processor).heatmap(original=True)
    assert heat.shape == (16, 48)
    assert np.isnan(heat[:, :8]).all()
    assert np.isnan(heat[:, 40:]).all()
    assert np.isfinite(heat[:, 8:40]).all()


def test_a_turned_photograph_has_an_upright_frame(model, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    photo().save(tmp_path / "turned.jpg", exif=exif)
    assert explain(model, tmp_path / "turned.jpg", CROP).heatmap(original=True).shape == (200, 100)


def test_frames_travel_along(model, tmp_path):
    whole = attribute(model, [photo(), photo(), photo(90, 60)], CROP, method="equal", batch_size=2)
    assert whole.frames.shape == (3, 6)
    assert whole[2].frames[0, :2].tolist() == [90, 60]
    assert explain(model, photo(), CROP, refine=2).frames is not None
    whole.save(tmp_path)
    loaded = Explanation.load(tmp_path)
    assert torch.equal(loaded.frames, whole.frames)
    assert np.array_equal(loaded.heatmap(original=True), whole.heatmap(original=True), equal_nan=True)
    assert np.array_equal(whole.to_numpy()["frames"], whole.frames.numpy())


class Shuffled(CLIPImageProcessorPil):
    """Does more than resize, crop and pad."""

    def __call__(self, images, **options):
        found = super().__call__(images, **options)
        found["pixel_values"] = found["pixel_values"].transpose(2, 3)
        return found


def test_without_a_frame_there_is_a_word(model):
    ready = CROP(photo(), return_tensors="pt")
    with pytest.raises(ValueError, match="explain it with an image processor"):
        explain(model, ready).heatmap(original=True)
    strange = explain(model, photo(), Shuffled(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))
    assert strange.frames[0, 2:].isnan().all()
    with pytest.raises(ValueError, match="more than resize, crop and pad"):
        strange.heatmap(original=True)
    assert strange.heatmap().shape == (32, 32)


def test_pictures_on_the_original(model):
    explanation, image = explain(model, photo(), CROP, top_k=2), photo()
    figure = draw_explanation(explanation, original=image)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert np.array_equal(shown[0], np.asarray(image))
    grey = np.asarray(image.convert("L"))
    for drawn in shown[1:3]:
        assert drawn.shape == (100, 200, 3)
        beyond, inside = drawn[:, :50], drawn[:, 50:150]
        assert (beyond.std(axis=-1) == 0).all()  # no color where the model never looked, and darker
        assert (beyond[..., 0] < 0.72 * (255 - 0.2 * (255.0 - grey[:, :50])) + 1).all()
        assert inside.std(axis=-1).max() > 10
    assert any("never seen by the model, 50 %" in text.get_text() for text in figure.texts)
    strip = draw_strip(explanation, original=image)
    assert strip.size[0] > draw_strip(explanation).size[0]
    with pytest.raises(ValueError, match="100 x 200 pixels, got 200 x 100"):
        explanation.figure(original=photo(200, 100))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_timm_says_where_it_looks_and_shows_what_it_saw(mode):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    processor = TimmWrapperImageProcessor({"input_size": (3, 32, 32), "crop_pct": 1.0, "crop_mode": mode})
    image = Image.new("RGB", (150, 100), (200, 100, 50))
    expected = {"center": (0, 25, 100, 125), "squash": (0, 0, 100, 150), "border": (-25, 0, 125, 150)}[mode]
    found = frames([image], processor, (32, 32))[0, 2:]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=5), found  # a prepared pixel
    pixels = as_pictures(prepared(image, processor)[None], processor)
    assert pixels[0, 16, 16].tolist() == [200, 100, 50]


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_says_how_much_is_never_seen():
    rows = [{"image": photo(100, 150), "label": 0}] * 3 + [{"image": photo(100, 100), "label": 1}] * 3
    with pytest.warns(
        UserWarning, match=r"On average 17 % of an image's area.*center crop of CLIPImageProcessorPil.*'height': 32"
    ):
        warn_of_crops(rows, ImageCollator(CROP))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_crops(rows, ImageCollator(PROCESSORS["resized"]))
        warn_of_crops([{"image": photo(50, 50)}], ImageCollator(CROP))
        warn_of_crops([{"image": "missing.png"}], ImageCollator(CROP))
        warn_of_crops([{"pixel_values": torch.zeros(3, 32, 32)}], ImageCollator(CROP))
        warn_of_crops(None, ImageCollator(CROP))


def test_the_trainer_warns(model, tmp_path):
    from shapadapter import ShapleyTrainer, ShapleyTrainingArguments

    args = ShapleyTrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no",
        card_images=0,
    )  # fmt: skip
    rows = [{"image": photo(), "label": index % 2} for index in range(4)]
    with pytest.warns(UserWarning, match="On average 50 %"):
        ShapleyTrainer(wrap("vit"), args, train_dataset=rows, processing_class=CROP).train()
