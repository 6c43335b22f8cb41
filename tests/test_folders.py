"""A folder of images as a data set: no image is lost, whatever files, classes and folders are called."""

import os

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("datasets")

from shapadapter import ShapleyError
from shapadapter.training import image_folder
from shapadapter.training import script as finetune


def picture(value=0):
    return Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8))


def fill(root, *names):
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path, format="PNG")
    return root


def loaded(root, **options):
    args = finetune.ScriptArguments("unused", image_folder=str(root), **options)
    return finetune.load_images(args, seed=0)


def names_in(split):
    return split.features["label"].names


# -- splits and classes ----------------------------------------------------------------------------------------------


def test_words_in_names_of_files_and_classes_make_no_splits(tmp_path, capsys):
    classes = ("train-station", "testcard", "validator", "bus")
    fill(
        tmp_path,
        *(f"{name}/{word}_{index}.png" for name in classes for word in ("train", "test") for index in range(5)),
    )
    splits = loaded(tmp_path)
    assert names_in(splits["train"]) == sorted(classes)
    assert (len(splits["train"]), len(splits["test"])) == (32, 8)
    assert capsys.readouterr().out == "40 images, 4 classes, split 32/8 (train/test)\n"


def test_a_class_called_train_beside_others_is_a_class(tmp_path):
    fill(tmp_path, *(f"{name}/{index}.png" for name in ("train", "car", "bus") for index in range(3)))
    splits = image_folder(tmp_path)
    assert list(splits) == ["train"]
    assert names_in(splits["train"]) == ["bus", "car", "train"]
    assert splits["train"]["label"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train", "validation", "test"), ["test", "train", "validation"]),
        (("Train", "VAL"), ["train", "validation"]),
        (("training", "dev"), ["train", "validation"]),
    ],
)
def test_folders_at_the_top_are_splits(tmp_path, names, split):
    fill(
        tmp_path, *(f"{name}/{kind}/{index}.png" for name in names for kind in ("train", "test") for index in range(2))
    )
    splits = image_folder(tmp_path)
    assert sorted(splits) == split
    for part in splits.values():  # classes that are called like splits
        assert names_in(part) == ["test", "train"]
        assert len(part) == 4


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["train/1.png", "test/1.png"], "leaves open what is a class"),
        (["train/cat/1.png", "train/dog/1.png", "more/cat/1.png"], "leaves open what is a class.*more"),
        (["train/cat/1.png", "train/dog/1.png", "test/1.png"], "leaves open what is a class"),
        (["val/cat/1.png", "valid/cat/1.png", "train/cat/1.png", "train/dog/1.png"], "several folders for the split"),
        (["train/cat/1.png", "train/dog/1.png", "train/3.png"], r"1 images in .*train are in no class folder"),
        (["cat/1.png", "dog/1.png", "3.png"], r"1 images in .* are in no class folder: .*3\.png"),
        (["cat/1.png", "dog/young/1.png"], "dog holds folders: young"),
        (["Cat/1.png", "cat/2.png", "dog/1.png"], "Cat and cat, which differ in case alone"),
        (["train/cat/1.png", "train/dog/1.png", "test/Dog/1.png"], "differ in case alone"),
        (["train/cat/1.png", "train/dog/1.png", "test/owl/1.png"], "no images of owl to train on"),
        (["cat/1.png"], "fewer than two"),
        (["1.png", "2.png"], "fewer than two"),
    ],
)
def test_what_is_left_open_is_one_sentence(tmp_path, files, said):
    fill(tmp_path, *files)
    with pytest.raises(ShapleyError, match=said) as caught:
        image_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_empty_class_is_refused(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "owl").mkdir()
    with pytest.raises(ShapleyError, match="owl holds no image"):
        image_folder(tmp_path)


# -- files -----------------------------------------------------------------------------------------------------------


def test_every_image_is_read_whatever_its_file_is_called(tmp_path):
    fill(tmp_path, "cat/1.PNG", "cat/2.JPEG", "cat/without", "cat/4.jpg_large", "dog/.hidden.png", "dog/5.tiff")
    fill(tmp_path, "dog/Thumbs.db", ".git/1.png")
    split = image_folder(tmp_path)["train"]
    assert split["label"] == [0, 0, 0, 0, 1]
    assert [np.asarray(one)[0, 0, 0] for one in split["image"]] == [0, 1, 3, 2, 5]  # in the order of their names


def test_a_file_that_is_no_image_is_named(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog" / "notes.txt").write_text("a dog")
    (tmp_path / "labels.csv").write_text("a,b")
    with pytest.raises(ShapleyError, match=r"2 files in .* no images.*labels\.csv.*notes\.txt.*--corrupt-images skip"):
        image_folder(tmp_path)
    with pytest.warns(UserWarning, match=r"notes\.txt.*left out"):
        assert len(image_folder(tmp_path, corrupt_images="skip")["train"]) == 2


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_links(tmp_path):
    root = fill(tmp_path / "photos", "cat/1.png", "dog/1.png")
    fill(tmp_path, "elsewhere/1.png")
    (root / "owl").symlink_to(tmp_path / "elsewhere")  # a class kept elsewhere
    (root / "owl" / "2.png").symlink_to(root / "cat" / "1.png")
    assert image_folder(root)["train"]["label"] == [0, 1, 2, 2]
    for name, target in (("dog/gone.png", "nowhere.png"), ("cat/round", "..")):
        (root / name).symlink_to(target)
        with pytest.raises(ShapleyError, match=f"{name} is a link to"):
            image_folder(root)
        (root / name).unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    root = fill(tmp_path, "cat/1.png", "dog/1.png")
    os.mkfifo(root / "cat" / "2.png")
    with pytest.raises(ShapleyError, match=r"2\.png is neither a file nor a folder"):
        image_folder(root)


def test_names_that_are_no_utf8(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    odd = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / "cat" / "1.png").rename(tmp_path / "cat" / odd)
    except OSError:
        pytest.skip("the file system wants UTF-8")
    split = image_folder(tmp_path)["train"]
    assert np.asarray(split[0]["image"])[0, 0, 0] == 0
    assert len(split) == 2
    (tmp_path / "cat").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ShapleyError, match=r"caf\\udce9' is no UTF-8"):
        image_folder(tmp_path)


# -- holding out -----------------------------------------------------------------------------------------------------


def test_a_class_with_one_image_is_trained_on(tmp_path, capsys):
    fill(tmp_path, "owl/1.png", *(f"{name}/{index}.png" for name in ("cat", "dog") for index in range(10)))
    splits = loaded(tmp_path)
    assert sorted(splits["test"]["label"]) == [0, 0, 1, 1]
    assert splits["train"]["label"].count(2) == 1
    assert "one image, which is trained on and not tested: owl" in capsys.readouterr().out
    again = loaded(tmp_path)
    assert again["test"][0]["image"].tobytes() == splits["test"][0]["image"].tobytes()


def test_a_split_that_is_not_there(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    with pytest.raises(ShapleyError, match="no split 'val'; there are train"):
        loaded(tmp_path, test_split="val")
    with pytest.raises(ShapleyError, match="two images or more of some class"):
        loaded(tmp_path)
