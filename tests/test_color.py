"""The mean colour of the training images, which absent pixels show; and who measures it when."""

import random

import numpy as np
import pytest
import torch
import zoo
from families import wrap
from peft import PeftModel, get_peft_model
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import ViTImageProcessorPil

from shapadapter import ShapleyConfig, ShapleyError, ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.training import ImageCollator
from shapadapter.training.validation import mean_color


def tensors(count=300, seed=0):
    """Prepared images that get brighter along the data set, so that it matters which are looked at."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return noise + torch.linspace(-1, 1, count)[:, None, None, None] + torch.tensor([0.5, 0.0, -0.5])[:, None, None]


class Rows(Dataset):
    """A data set by index that remembers which rows were asked for."""

    def __init__(self, pixels, augment=None):
        self.pixels, self.augment, self.asked = pixels, augment, []

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.asked.append(index)
        pixels = self.pixels[index]
        return {"pixel_values": pixels if self.augment is None else self.augment(pixels), "label": index % 5}


class Stream(IterableDataset):
    """A data set that can only be read from its beginning."""

    def __init__(self, pixels):
        self.pixels, self.read = pixels, 0

    def __iter__(self):
        for index, pixels in enumerate(self.pixels):
            self.read += 1
            yield {"pixel_values": pixels, "label": index % 5}


class SizedStream(Stream):
    """One that knows its length all the same."""

    def __len__(self):
        return len(self.pixels)


def near(one, other):
    return one == pytest.approx(list(other), abs=2e-6)


# -- the number ------------------------------------------------------------------------------------------------------


def test_it_is_the_mean_of_each_channel():
    pixels = tensors(40)
    assert near(mean_color(Rows(pixels), ImageCollator()), pixels.mean(dim=(0, 2, 3)).tolist())
    assert near(mean_color(list(Rows(pixels)), ImageCollator()), pixels.mean(dim=(0, 2, 3)).tolist())


def test_of_a_large_data_set_256_images_evenly_spread_are_looked_at():
    rows = Rows(tensors(1000))
    color = mean_color(rows, ImageCollator())
    assert len(rows.asked) == len(set(rows.asked)) == 256
    gaps = np.diff(rows.asked)
    assert set(gaps) == {3, 4}
    assert near(color, rows.pixels[rows.asked].mean(dim=(0, 2, 3)).tolist())
    assert np.allclose(color, rows.pixels.mean(dim=(0, 2, 3)), atol=0.02)


def test_images_count_alike_in_a_small_last_batch():
    pixels = tensors(33)
    pixels[32] += 50
    assert near(mean_color(Rows(pixels), ImageCollator()), pixels.mean(dim=(0, 2, 3)).tolist())


@pytest.mark.parametrize("kind", [Stream, SizedStream])
def test_a_stream_is_read_from_its_beginning(kind):
    stream = kind(tensors(1000))
    color = mean_color(stream, ImageCollator())
    assert stream.read <= 257
    assert near(color, stream.pixels[:256].mean(dim=(0, 2, 3)).tolist())


def test_a_stream_of_datasets():
    datasets = pytest.importorskip("datasets")
    array = np.full((8, 8, 3), (255, 0, 51), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    plain = datasets.Dataset.from_dict({"image": [Image.fromarray(array)] * 5}, features=features)
    collate = ImageCollator(ViTImageProcessorPil(size={"height": 8, "width": 8}))
    for data in (plain, plain.to_iterable_dataset()):
        assert near(mean_color(data, collate), [1.0, -1.0, -0.6])


# -- random numbers --------------------------------------------------------------------------------------------------


def jitter(pixels):
    """An augmentation that draws from all three global generators."""
    return pixels + torch.randn(()) + random.random() + np.random.rand()  # noqa: NPY002


def test_it_is_the_same_in_every_call_and_draws_nothing_from_the_global_generators():
    colors, rows = [], Rows(tensors(50), jitter)
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        colors.append(mean_color(rows, ImageCollator()))
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]
        assert all(np.array_equal(one, other) for one, other in zip(before[2], after[2], strict=True))
    assert colors[0] == colors[1]


def test_the_generators_are_put_back_after_an_error():
    def broken(pixels):
        jitter(pixels)
        raise OSError("unreadable")

    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(OSError, match="unreadable"):
        mean_color(Rows(tensors(4), broken), ImageCollator())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


# -- the trainer -----------------------------------------------------------------------------------------------------


def trainer_of(folder, model, rows, **options):
    usual = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    usual |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-3}
    return ShapleyTrainer(model, ShapleyTrainingArguments(str(folder), **{**usual, **options}), train_dataset=rows)


def large(count=12):
    return Rows(torch.nn.functional.interpolate(tensors(count), (64, 64)))


def resnet(**config):
    return get_peft_model(zoo.base("resnet"), ShapleyConfig(r=2, **config))


def test_it_is_measured_for_pixels_saved_and_restored(tmp_path):
    model, rows = resnet(fill="blur"), large()
    config = model.peft_config["default"]
    assert (config.removal, config.fill_color) == ("pixels", None)
    trainer_of(tmp_path, model, rows).train()
    expected = rows.pixels.mean(dim=(0, 2, 3)).tolist()
    assert near(config.fill_color, expected)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(zoo.base("resnet"), tmp_path / "adapter")
    assert again.peft_config["default"].fill_color == config.fill_color
    model.eval()
    again.eval()
    nobody = torch.zeros(2, 1, 4, dtype=torch.bool)
    with torch.no_grad():
        one, other = (each(pixel_values=rows.pixels[:2], coalitions=nobody) for each in (model, again))
    assert torch.equal(one.coalition_values, other.coalition_values)


def test_the_empty_image_shows_it(tmp_path):
    model, rows = resnet(prediction="classifier", tune="frozen"), large()
    trainer_of(tmp_path, model, rows, learning_rate=0.0).train()
    model.eval()
    color = torch.tensor(model.peft_config["default"].fill_color)
    with torch.no_grad():
        plain = zoo.base("resnet")(color[:, None, None].expand(1, 3, 64, 64)).logits
        null = model(rows.pixels[:1]).null_values
    assert torch.allclose(null, plain, atol=1e-5)


def test_a_colour_that_was_given_stays(tmp_path):
    model, rows = resnet(fill_color=[0.1, 0.2, 0.3]), large()
    trainer_of(tmp_path, model, rows).train()
    assert model.peft_config["default"].fill_color == [0.1, 0.2, 0.3]


def test_a_second_training_keeps_the_colour_of_the_first(tmp_path):
    model, rows = resnet(), large()
    trainer_of(tmp_path, model, rows).train()
    first = model.peft_config["default"].fill_color
    trainer_of(tmp_path, model, Rows(large().pixels + 3)).train()
    assert model.peft_config["default"].fill_color == first


@pytest.mark.parametrize("removal", ["auto", "drop", "mask"])
def test_it_is_not_measured_where_no_pixel_is_replaced(tmp_path, removal):
    from families import base

    model = get_peft_model(base("vit"), ShapleyConfig(r=2, removal=removal))
    rows = Rows(torch.nn.functional.interpolate(tensors(8), (32, 32)))
    trainer_of(tmp_path, model, rows).train()
    assert model.peft_config["default"].fill_color is None


def test_a_model_wrapped_by_transformers_is_measured_too(tmp_path):
    model, rows = zoo.base("resnet"), large()
    model.add_adapter(ShapleyConfig(r=2))
    trainer_of(tmp_path, model, rows).train()
    assert near(model.peft_config["default"].fill_color, rows.pixels.mean(dim=(0, 2, 3)).tolist())


def test_evaluation_alone_measures_nothing(tmp_path):
    model = wrap(zoo.base("resnet"))
    trainer = trainer_of(tmp_path, model, large())
    trainer.evaluate(large())
    assert model.peft_config["default"].fill_color is None


# -- learned ---------------------------------------------------------------------------------------------------------


def test_a_learned_colour_without_anything_to_learn_from_is_refused(tmp_path):
    with pytest.raises(ShapleyError, match=r"fill='learned'.*coalition_task_weight.*coalition_gradients"):
        trainer_of(tmp_path, resnet(fill="learned"), large())
    trainer_of(tmp_path, resnet(fill="learned"), None)  # to evaluate, nothing needs to learn


@pytest.mark.parametrize("setting", [{"coalition_task_weight": 0.5}, {"coalition_gradients": True}])
def test_a_learned_colour_learns(tmp_path, setting):
    model = wrap(zoo.base("resnet"), fill="learned")
    (name,) = [name for name, _ in model.named_parameters() if "shapley_fill" in name]
    before = model.get_parameter(name).detach().clone()
    trainer_of(tmp_path, model, large(), shapley_warmup=0.0, max_steps=2, **setting).train()
    assert (model.get_parameter(name) != before).all()
    assert model.peft_config["default"].fill_color is None
