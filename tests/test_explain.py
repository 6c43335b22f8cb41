"""`explain`: every kind of input, one forward pass each, and a clear error for the rest."""

import contextlib

import families
import numpy as np
import pytest
import torch
from families import CLASSES, LABELS, images, wrap
from PIL import Image
from transformers import ViTImageProcessorPil

from shapadapter import Explanation, explain
from shapadapter.core.errors import ClassNotFoundError, ImageError, ShapleyError


@pytest.fixture(scope="module")
def model():
    return wrap("vit", lora_dropout=0.5)


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )


def pictures(count=3, height=32, width=32):
    noise = np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def equal(one, other):
    fields = ("attributions", "classes", "logits", "null_values", "probabilities", "images")
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in fields) and one.labels == other.labels


def near(one, other):
    return all(
        torch.allclose(getattr(one, f), getattr(other, f), atol=1e-5)
        for f in ("attributions", "logits", "null_values", "probabilities")
    )


def test_what_comes_back(model, processor):
    explanation = explain(model, pictures(), processor)
    assert isinstance(explanation, Explanation)
    assert len(explanation) == 3
    assert explanation.attributions.shape == (3, 4, 4, CLASSES)
    assert explanation.classes.tolist() == [list(range(CLASSES))] * 3
    assert explanation.labels == tuple(LABELS.values())
    assert (explanation.efficiency_gap < 1e-5).all()
    assert torch.allclose(explanation.probabilities, explanation.logits.softmax(1))
    with torch.no_grad():
        output = model(**processor(pictures(), return_tensors="pt"))
    assert torch.allclose(explanation.logits, output.logits, atol=1e-6)
    assert torch.allclose(explanation.attributions.flatten(1, 2), output.attributions, atol=1e-6)
    assert torch.equal(explanation.images, torch.stack([torch.from_numpy(np.array(p)) for p in pictures()]))


def test_inputs_of_every_kind_agree(model, processor, tmp_path):
    originals = pictures()
    paths = []
    for index, picture in enumerate(originals):
        paths.append(tmp_path / f"{index}.png")
        picture.save(paths[-1])
    arrays = [np.array(picture) for picture in originals]
    kinds = {
        "list": originals,
        "tuple": tuple(originals),
        "paths": paths,
        "strings": [str(path) for path in paths],
        "arrays": arrays,
        "one array": np.stack(arrays),
        "tensors": [torch.from_numpy(a).permute(2, 0, 1) for a in arrays],
        "one tensor": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2),
        "mixed": [originals[0], paths[1], arrays[2]],
    }
    expected = explain(model, originals, processor)
    for kind, value in kinds.items():
        assert equal(explain(model, value, processor), expected), kind
    for one in (originals[0], paths[0], str(paths[0]), arrays[0]):
        assert near(explain(model, one, processor), expected[0])
    prepared = processor(originals, return_tensors="pt")["pixel_values"]
    for value in (prepared, list(prepared)):
        assert near(explain(model, value), expected)
    assert near(explain(model, prepared[0]), expected[0])


def test_images_of_other_sizes_and_modes(model, processor):
    mixed = [
        pictures(1, 50, 20)[0],
        pictures()[0].convert("L"),
        pictures()[0].convert("RGBA"),
        pictures()[0].convert("P"),
        pictures()[0].convert("1"),
        pictures()[0].convert("CMYK"),
        pictures()[0].convert("LA"),
    ]
    assert len(explain(model, mixed, processor)) == 7


def test_the_training_mode_is_restored(model, processor):
    expected = explain(model.eval(), pictures(), processor)
    model.train()
    model.get_base_model().vit.layers[0].eval()
    modes = [m.training for m in model.modules()]
    try:
        assert equal(explain(model, pictures(), processor), expected)
        assert [m.training for m in model.modules()] == modes
        with pytest.raises(ImageError):
            explain(model, [torch.zeros(1, 32, 32)])
        assert [m.training for m in model.modules()] == modes
    finally:
        model.eval()


def test_no_gradients_are_kept(model):
    explanation = explain(model, images())
    assert not explanation.attributions.requires_grad
    assert not explanation.attributions.is_inference()


def test_top_k_and_targets(model):
    everything = explain(model, images(4))
    top = explain(model, images(4), top_k=2)
    assert top.attributions.shape == (4, 4, 4, 2)
    assert torch.equal(top.classes, everything.logits.topk(2).indices)
    for image in range(4):
        for column, index in enumerate(top.classes[image].tolist()):
            assert torch.equal(top.attributions[image, ..., column], everything.attributions[image, ..., index])
    assert (top.efficiency_gap < 1e-5).all()
    assert explain(model, images(), top_k=99).classes.shape == (2, CLASSES)
    named = explain(model, images(4), targets=["dog", 0])
    assert named.classes.tolist() == [[3, 0]] * 4
    assert torch.equal(named.attributions, everything.attributions[..., [3, 0]])
    assert torch.equal(named.for_label("ant"), everything.for_label("ant"))


def test_wrong_top_k_and_targets(model):
    with pytest.raises(ValueError, match="either"):
        explain(model, images(), top_k=2, targets=["dog"])
    for top_k in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            explain(model, images(), top_k=top_k)
    with pytest.raises(ClassNotFoundError, match="Did you mean 'dog'"):
        explain(model, images(), targets=["dogg"])
    with pytest.raises(ClassNotFoundError, match=r"0\.\.4"):
        explain(model, images(), targets=[5])
    with pytest.raises(ClassNotFoundError):
        explain(model, images(), targets=[-1])


def test_a_single_target_is_not_a_sequence_of_letters(model):
    one, listed = (explain(model, images(), targets=targets) for targets in ("dog", ["dog"]))
    assert torch.equal(one.attributions, listed.attributions)


def test_no_targets_explain_nothing(model):
    with pytest.raises((ShapleyError, ValueError)):
        explain(model, images(), targets=[])


def test_a_class_asked_for_twice(model):
    with pytest.raises(ValueError):
        explain(model, images(), targets=["dog", 3])


def test_one_forward_pass_each(model):
    calls = []
    block = model.get_base_model().vit.layers[0]
    handle = block.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    try:
        explain(model, images(7), batch_size=3, top_k=2)
        assert calls == [3, 3, 1]
    finally:
        handle.remove()


def test_batch_size_does_not_matter(model, processor):
    whole = explain(model, pictures(5), processor)
    for size in (1, 2, 5):
        assert near(explain(model, pictures(5), processor, batch_size=size), whole)


def test_options_reach_the_model(model):
    explanation = explain(model, images(2, 16, 48), interpolate_pos_encoding=True)
    assert explanation.attributions.shape == (2, 2, 6, CLASSES)


def test_multi_label_probabilities():
    plain = families.base("vit")
    plain.config.problem_type = "multi_label_classification"
    explanation = explain(wrap(plain), images())
    assert torch.allclose(explanation.probabilities, explanation.logits.sigmoid())


def test_a_bf16_base(processor):
    explanation = explain(wrap(families.base("vit").bfloat16()), pictures(), processor)
    assert (explanation.efficiency_gap < 2e-2 * explanation.logits.abs().max()).all()


def test_the_transformers_mixin():
    from shapadapter import ShapleyConfig

    plain = families.base("vit")
    plain.add_adapter(ShapleyConfig())
    assert len(explain(families.stir(plain).eval(), images())) == 2


# -- errors -----------------------------------------------------------------------------------------------------------


def test_no_images(model, processor):
    for nothing in ([], (), np.zeros((0, 32, 32, 3), dtype=np.uint8), torch.zeros(0, 3, 32, 32)):
        with pytest.raises(ImageError, match="at least one"):
            explain(model, nothing, processor)


def test_files_that_are_no_images(model, processor, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for path in (tmp_path / "text.png", tmp_path / "empty.jpg", tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError, match="Cannot read image"):
            explain(model, [path], processor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_corrupt_files_give_one_kind_of_error(model, processor, tmp_path, kind):
    """Cut at every length or with bytes overwritten: either it still opens or it is an ImageError."""
    path = tmp_path / f"image.{kind}"
    pictures(1)[0].save(path, format=kind)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:length] for length in np.linspace(0, len(whole) - 1, 40).astype(int)]
    for _ in range(120):
        content = bytearray(whole)
        for position in rng.integers(0, min(len(whole), 400), 3):
            content[position] = rng.integers(256)
        damaged.append(bytes(content))
    from shapadapter.data.images import open_image

    for content in damaged:
        path.write_bytes(content)
        try:
            open_image(path)
        except ImageError:
            continue


@pytest.mark.parametrize("thing", [42, None, object(), {"image": 1}, b"bytes"], ids=lambda t: type(t).__name__)
def test_what_is_no_image(model, processor, thing):
    with pytest.raises(ImageError):
        explain(model, [thing], processor)
    with pytest.raises(ImageError):
        explain(model, thing, processor)


@pytest.mark.parametrize("shape", [(32, 32, 4), (32, 32, 2), (5, 32, 32), (32,), (2, 2, 2, 2, 2)])
def test_arrays_of_the_wrong_shape(model, processor, shape):
    with pytest.raises(ImageError):
        explain(model, [np.zeros(shape, dtype=np.uint8)], processor)


def test_grey_arrays_are_images_or_a_clear_error(model, processor):
    for shape in ((32, 32), (32, 32, 1), (1, 32, 32)):
        with contextlib.suppress(ImageError):
            assert len(explain(model, [np.zeros(shape, dtype=np.uint8)], processor)) == 1


def test_tensors_without_a_processor(model):
    with pytest.raises(ImageError, match="of one size"):
        explain(model, [torch.zeros(3, 32, 32), torch.zeros(3, 40, 40)])
    for channels in (1, 2, 4, 9):
        with pytest.raises(ImageError):
            explain(model, [torch.zeros(channels, 32, 32)])
    with pytest.raises(ImageError):
        explain(model, torch.zeros(32, 32))
    with pytest.raises(ImageError, match="processor"):
        explain(model, pictures())
    with pytest.raises(ImageError, match="processor"):
        explain(model, np.zeros((2, 32, 32, 3)))


def test_models_that_cannot_explain(model):
    with pytest.raises(ShapleyError, match="get_peft_model"):
        explain(families.base("vit"), images())
    with pytest.raises(ShapleyError):
        explain("google/vit-base-patch16-224", images())
    with pytest.raises(ShapleyError):
        explain(torch.nn.Linear(2, 2), images())
    with model.disable_adapter(), pytest.raises(ShapleyError, match="disabled"):
        explain(model, images())
