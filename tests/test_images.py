"""What is an image, and what its numbers mean: the same everywhere, or one sentence."""

import io

import numpy as np
import pytest
import torch
from families import wrap
from PIL import Image
from transformers import ViTImageProcessorPil

from shapadapter import attribute, evaluate, explain
from shapadapter.core.errors import ImageError, ShapleyError, UnreadableImageError
from shapadapter.data.collator import ImageCollator
from shapadapter.data.images import as_list, each, open_image
from shapadapter.hub.pipeline import ImageAttributionPipeline


@pytest.fixture(scope="module")
def model():
    return wrap("vit")


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def through(model, processor):
    """Every entry point, from an image to logits."""
    pipe = ImageAttributionPipeline(model, image_processor=processor)

    def piped(image):
        return {answer["label"]: answer["logit"] for answer in pipe(image, top_k=5)}

    def named(explanation):
        return dict(zip(explanation.labels, explanation.logits[0].tolist(), strict=True))

    def collated(image):
        with torch.no_grad():
            logits = model(pixel_values=ImageCollator(processor)([{"image": image}])["pixel_values"]).logits[0]
        return {model.config.id2label[index]: value for index, value in enumerate(logits.tolist())}

    return {
        "explain": lambda image: named(explain(model, image, processor)),
        "refine": lambda image: named(explain(model, image, processor, refine=2)),
        "attribute": lambda image: named(attribute(model, image, processor, method="equal")),
        "pipeline": piped,
        "collator": collated,
    }


def entries():
    return pytest.mark.parametrize("entry", ["explain", "refine", "attribute", "pipeline", "collator"])


def same(found, right):
    return found.keys() == right.keys() and all(abs(found[name] - right[name]) < 1e-5 for name in right)


# -- ranges -----------------------------------------------------------------------------------------------------------


REFUSED = {
    "floats": lambda rgb: (rgb / 255).astype("float32"),
    "float64": lambda rgb: rgb / 255,
    "float16": lambda rgb: (rgb / 255).astype("float16"),
    "tensor": lambda rgb: torch.tensor(rgb / 255).permute(2, 0, 1).float(),
    "bfloat16": lambda rgb: torch.tensor(rgb / 255).permute(2, 0, 1).bfloat16(),
    "from -1": lambda rgb: rgb / 127.5 - 1,
    "prepared, bright": lambda rgb: rgb / 255 / 0.225 + 0.01,
    "uint16": lambda rgb: rgb.astype(np.uint16) * 257,
    "int32 beyond": lambda rgb: rgb.astype(np.int32) * 2,
    "negative": lambda rgb: rgb.astype(np.int16) - 128,
    "zeros and ones": lambda rgb: (rgb > 128).astype(np.int64),
    "NaN": lambda rgb: np.where(rgb > 250, np.nan, rgb),
    "complex": lambda rgb: rgb.astype(complex),
    "masked": lambda rgb: np.ma.masked_where(rgb > 200, rgb),
    "four channels": lambda rgb: np.concatenate([rgb, rgb[..., :1]], axis=2),
    "meta": lambda rgb: torch.zeros(3, 32, 32, device="meta"),
}


@pytest.mark.parametrize("name", REFUSED)
@entries()
def test_a_range_that_means_something_else_is_refused_everywhere(model, processor, photo, name, entry):
    with pytest.raises(ImageError, match=r"^(Expected|Cannot read)"):
        through(model, processor)[entry](REFUSED[name](np.asarray(photo)))


ACCEPTED = {
    "floats to 255": lambda rgb: rgb.astype("float32"),
    "float64 to 255": lambda rgb: rgb.astype(float),
    "int64": lambda rgb: rgb.astype(np.int64),
    "uint16 of 8 bits": lambda rgb: rgb.astype(np.uint16),
    "bgr turned": lambda rgb: np.ascontiguousarray(rgb[..., ::-1])[..., ::-1],
    "upside down twice": lambda rgb: np.ascontiguousarray(rgb[::-1])[::-1],
    "rotated back": lambda rgb: np.rot90(np.ascontiguousarray(np.rot90(rgb, -1))),
    "fortran": np.asfortranarray,
    "channels first": lambda rgb: rgb.transpose(2, 0, 1),
    "read only": lambda rgb: np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.shape),
    "nothing masked": np.ma.asarray,
    "tensor": lambda rgb: torch.tensor(rgb).permute(2, 0, 1),
    "tensor, channels last": torch.tensor,
    "tensor with gradient": lambda rgb: torch.tensor(rgb).permute(2, 0, 1).float().requires_grad_(),
    "bytes": lambda rgb: png(Image.fromarray(rgb)),
    "bytearray": lambda rgb: bytearray(png(Image.fromarray(rgb))),
    "file": lambda rgb: io.BytesIO(png(Image.fromarray(rgb))),
    "dict": lambda rgb: {"bytes": png(Image.fromarray(rgb)), "path": None},
    "only bytes": lambda rgb: {"bytes": png(Image.fromarray(rgb))},
    "row": lambda rgb: {"image": Image.fromarray(rgb), "label": 1},
    "pair": lambda rgb: (Image.fromarray(rgb), 3),
}


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_same_picture_is_the_same_everywhere(model, processor, photo, name):
    for entry, run in through(model, processor).items():
        assert same(run(ACCEPTED[name](np.array(photo))), run(photo)), entry


def test_evaluate_judges_the_range_too(model, processor, photo):
    with pytest.raises(ImageError, match=r"from 0\.00 to 1\.00.*pixel_values.*uint8"):
        evaluate(model, [{"image": np.asarray(photo) / 255}] * 2, processor, images=1, progress=False)


def test_a_processor_that_does_not_scale_takes_floats_as_they_are(model, photo):
    floats = np.asarray(photo.resize((32, 32))).astype("float32") / 255
    plain = ViTImageProcessorPil(do_rescale=False, do_resize=False)
    found = explain(model, floats, plain)
    prepared = ViTImageProcessorPil(do_resize=False)(photo.resize((32, 32)), return_tensors="pt")
    assert torch.allclose(found.logits, explain(model, prepared).logits, atol=1e-5)


def test_integers_are_not_prepared(model, photo):
    with pytest.raises(ImageError, match=r"torch\.uint8.*processor"):
        explain(model, torch.tensor(np.asarray(photo.resize((32, 32)))).permute(2, 0, 1))


def test_where_channels_are():
    grey = np.arange(8, dtype=np.uint8).reshape(2, 4) * 30
    for array in (grey, grey[..., None], grey[None], torch.tensor(grey), torch.tensor(grey)[None]):
        assert np.array_equal(np.asarray(open_image(array)), np.repeat(grey[..., None], 3, 2))
    both = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(open_image(both)), both)
    assert np.array_equal(np.asarray(open_image(torch.tensor(both))), both.transpose(1, 2, 0))
    line = both[:1]  # (1, 5, 3): a line of colors, not five lines of grey
    assert np.array_equal(np.asarray(open_image(line)), line)
    assert np.array_equal(np.asarray(open_image(grey > 100))[..., 0], 255 * (grey > 100))


# -- 16 bits and transparency -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_of_grey_are_scaled(tmp_path, suffix):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"grey.{suffix}")
    for given in (
        tmp_path / f"grey.{suffix}",
        levels,
        levels[..., None],
        torch.tensor(levels.astype(np.int32)).to(torch.uint16),
    ):
        assert np.asarray(open_image(given))[0, :, 1].tolist() == [0, 1, 128, 255]
    Image.fromarray(levels).save(tmp_path / "clear.png", transparency=32896)
    assert np.asarray(open_image(tmp_path / "clear.png"))[0, :, 0].tolist() == [0, 1, 255, 255]


def test_wider_images_are_judged_by_their_numbers(tmp_path):
    for mode, dtype in (("I", np.int32), ("F", np.float32)):
        whole = Image.fromarray(np.array([[0, 100, 255]], dtype=dtype))
        assert whole.mode == mode
        assert np.asarray(open_image(whole))[0, :, 0].tolist() == [0, 100, 255]
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "floats.tif")
    with pytest.raises(UnreadableImageError, match=r"floats\.tif.*from 0\.00 to 1\.00"):  # so that it can be skipped
        open_image(tmp_path / "floats.tif")


def transparent(mode):
    """Half red, half transparent black, in a mode."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 2, 2))
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode == "PA":
        paletted = image.convert("RGB").convert("P").convert("PA")
        paletted.putalpha(image.getchannel("A"))
        return paletted
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_transparent_parts_are_white(mode):
    image = transparent(mode)
    assert image.mode == mode
    with pytest.warns(UserWarning, match="laid on white"):
        found = np.asarray(open_image(image))
    left = [255, 0, 0] if "L" not in mode else [76, 76, 76]
    assert found[0, 3].tolist() == [255, 255, 255]
    assert np.abs(found[0, 0].astype(int) - left).max() <= 1


def test_half_transparent_is_half_white_and_opaque_says_nothing(recwarn, tmp_path):
    assert np.asarray(open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))[0, 0].tolist() == [127, 127, 127]
    recwarn.clear()
    assert np.asarray(open_image(Image.new("RGBA", (1, 1), (9, 8, 7, 255))))[0, 0].tolist() == [9, 8, 7]
    assert not recwarn.list
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert np.asarray(open_image(tmp_path / "key.png")).min() == 255


def test_an_upright_transparent_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    transparent("RGBA").save(tmp_path / "turned.png", exif=exif)
    found = np.asarray(open_image(tmp_path / "turned.png"))
    assert found.shape == (4, 2, 3)
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[3, 0].tolist() == [255, 255, 255]


# -- one image or many ------------------------------------------------------------------------------------------------


class Folder(torch.utils.data.Dataset):
    """As torchvision's ImageFolder: pairs by index, and no end but the length."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index % len(self.images)], index


def test_many_images_of_every_kind(model, processor, photo, tmp_path):
    from datasets import Dataset

    photos = [photo, photo.rotate(90), photo.rotate(180)]
    for index, image in enumerate(photos):
        image.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    rows = Dataset.from_dict({"image": photos, "label": [0, 1, 2]})
    kinds = {
        "generator": lambda: (image for image in photos),
        "contents": lambda: [png(image) for image in photos],
        "array of paths": lambda: np.array(paths),
        "array of objects": lambda: np.array(paths, dtype=object),
        "data set": lambda: rows,
        "slice": lambda: rows[:3],
        "column": lambda: rows["image"],
        "rows": lambda: list(rows),
        "pairs": lambda: [(image, 0) for image in photos],
        "torch data set": lambda: Folder(photos),
        "values": lambda: dict(enumerate(photos)).values(),
        "tuple": lambda: tuple(photos),
    }
    pipe = ImageAttributionPipeline(model, image_processor=processor)
    right, top = explain(model, photos, processor), [answer[0]["logit"] for answer in pipe(photos)]
    for kind, make in kinds.items():
        assert torch.allclose(explain(model, make(), processor, batch_size=2).logits, right.logits, atol=1e-5), kind
        assert len(attribute(model, make(), processor, method="equal")) == 3, kind
        assert [answer[0]["logit"] for answer in pipe(make())] == pytest.approx(top, abs=1e-5), kind


def test_a_generator_is_read_batch_by_batch(photo):
    taken = []
    images = (taken.append(index) or photo for index in range(5))
    first = each(images)
    next(first)
    assert taken == [0]
    assert len(as_list(photo)) == len(as_list((photo, 3))) == len(as_list({"image": photo})) == 1


@pytest.mark.parametrize("entry", ["explain", "refine", "attribute", "pipeline", "collator"])
def test_what_is_no_image_is_told_what_was_expected(model, processor, photo, tmp_path, entry):
    run = through(model, processor)[entry]
    (tmp_path / "photos").mkdir()
    with pytest.raises(ImageError, match=r"photos.*is a folder.*list of the paths"):
        run(str(tmp_path / "photos"))
    with pytest.raises(ImageError, match=r"PIL image, a path, an array or a tensor, got dict of \['train'\]"):
        run({"train": [photo]})
    for nothing in (b"", {"bytes": None, "path": None}):
        with pytest.raises(ImageError):
            run(nothing)


@pytest.mark.parametrize("nothing", [[], (), {}.values(), iter(())], ids=lambda value: type(value).__name__)
def test_no_image_at_all(model, processor, nothing):
    with pytest.raises(ImageError, match="at least one image"):
        explain(model, nothing, processor)


def test_data_that_evaluate_does_not_take(model, processor, photo, tmp_path):
    def refused(data, match):
        with pytest.raises(ShapleyError, match=match):
            evaluate(model, data, processor, progress=False)

    refused(str(tmp_path), "Expected a data set with a length")
    refused(iter([{"image": photo}]), "Expected a data set with a length")
    refused([photo], r"Expected rows with an image column.*\{'image': image\}")
    refused({"image": photo, "label": 0}, r"a single row.*\[row\]")


# -- with the image processors that need torchvision -------------------------------------------------------------------


def test_with_torchvision_too(model, photo):
    pytest.importorskip("torchvision")
    from transformers import ViTImageProcessor

    processor, pixels = ViTImageProcessor(size={"height": 32, "width": 32}), np.asarray(photo)
    right = explain(model, photo, processor)
    for name in ("bgr turned", "rotated back", "floats to 255", "tensor", "channels first"):
        assert torch.allclose(explain(model, ACCEPTED[name](pixels), processor).logits, right.logits, atol=1e-5), name
    for name in ("floats", "tensor", "uint16", "from -1"):
        with pytest.raises(ImageError):
            explain(model, REFUSED[name](pixels), processor)


def test_training_on_16_bits(model, processor, tmp_path):
    Image.fromarray(np.full((32, 32), 65535, np.uint16)).save(tmp_path / "white.png")
    white = ImageCollator(processor)([{"image": str(tmp_path / "white.png")}])["pixel_values"]
    assert torch.equal(
        white, ImageCollator(processor)([{"image": Image.new("RGB", (32, 32), "white")}])["pixel_values"]
    )
