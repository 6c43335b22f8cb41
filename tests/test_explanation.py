import ast
import hashlib
import json
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

import shapadapter.explanation.explanation as explanation_module
from shapadapter.core.errors import CheckpointError, ClassNotFoundError
from shapadapter.core.files import write_together
from shapadapter.explanation.explanation import Explanation, Prediction
from shapadapter.explanation.forms import JSON_NAME, TENSORS_NAME

LABELS = ("zero", "one", "two", "seven", "eight")
TENSORS = ("attributions", "classes", "logits", "null_values", "probabilities", "images")


@pytest.fixture
def explanation():
    """Two images of 6x9 pixels, 2x3 players, 2 of 5 classes, a different pair in each image."""
    torch.manual_seed(0)
    attributions, null_values = torch.randn(2, 2, 3, 2), torch.randn(2, 5)
    classes = torch.tensor([[3, 1], [3, 4]])
    sums = null_values.gather(1, classes) + attributions.sum(dim=(1, 2))
    logits = torch.full((2, 5), -9.0).scatter(1, classes, sums)
    images = torch.randint(0, 256, (2, 6, 9, 3), dtype=torch.uint8)
    return Explanation(attributions, classes, logits, null_values, logits.softmax(1), LABELS, images)


def same(one, other):
    return one.labels == other.labels and all(torch.equal(getattr(one, n), getattr(other, n)) for n in TENSORS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attributions", torch.zeros(2, 6, 2), "attributions \\(B, rows, cols, C\\)"),
        ("attributions", torch.zeros(1, 2, 3, 2), "attributions .* shape \\(2, 2, 3, 2\\)"),
        ("attributions", torch.zeros(2, 2, 3, 2, dtype=torch.float64), "float32"),
        ("attributions", torch.zeros(2, 2, 3, 2, requires_grad=True), "requiring grad"),
        ("attributions", torch.zeros(2, 2, 3, 2, device="meta"), "CPU"),
        ("classes", torch.tensor([[0, 1, 2], [0, 1, 2]]), "classes .* shape \\(2, 2\\)"),
        ("classes", torch.tensor([[0, 5], [0, 1]]), "0\\.\\.4"),
        ("classes", torch.tensor([[0, -1], [0, 1]]), "0\\.\\.4"),
        ("classes", torch.tensor([[2, 2], [0, 1]]), "different"),
        ("null_values", torch.zeros(2, 4), "null_values .* shape \\(2, 5\\)"),
        ("probabilities", torch.zeros(5), "probabilities"),
        ("labels", ("a", "b"), "5 labels"),
        ("images", torch.zeros(2, 3, 6, 9, dtype=torch.uint8), "images .* shape \\(2, 3, 6, 3\\)"),
        ("images", torch.zeros(2, 6, 9, 3), "uint8"),
    ],
)
def test_what_does_not_fit_is_refused(explanation, name, value, message):
    with pytest.raises(ValueError, match=message):
        replace(explanation, **{name: value})


def test_is_frozen(explanation):
    with pytest.raises(FrozenInstanceError):
        explanation.labels = ()


def test_subsets_keep_each_image_with_its_numbers(explanation):
    assert len(explanation) == 2
    assert [len(explanation[i]) for i in (0, -1, slice(0, 0), slice(None))] == [1, 1, 0, 2]
    assert same(explanation[-1], explanation[1])
    for name in TENSORS:
        assert torch.equal(getattr(explanation[1], name)[0], getattr(explanation, name)[1])
    assert sum(1 for _ in explanation) == 2  # iteration ends by IndexError
    for wrong in (2, -3):
        with pytest.raises(IndexError):
            explanation[wrong]


def test_repr_says_what_it_holds(explanation):
    assert repr(explanation).startswith("Explanation(2 images, 2x3 players, 2 of 5 classes, gap ")
    assert repr(explanation[:0]) == "Explanation(0 images, 2x3 players, 2 of 5 classes)"


def test_gap_is_the_worst_shown_column(explanation):
    assert (explanation.efficiency_gap <= 1e-6).all()
    logits = explanation.logits.clone()
    logits[1, 4] += 0.5  # shown in image 1
    logits[1, 3] -= 0.25  # shown too, but less far off
    logits[0, 0] += 7.0  # not shown in image 0
    assert replace(explanation, logits=logits).efficiency_gap.tolist() == pytest.approx([0, 0.5], abs=1e-6)


def test_for_label_finds_the_column_of_each_image(explanation):
    everywhere = replace(explanation, classes=torch.tensor([[3, 1], [4, 3]]))
    expected = torch.stack([everywhere.attributions[0, :, :, 0], everywhere.attributions[1, :, :, 1]])
    assert torch.equal(everywhere.for_label("seven"), expected)
    assert torch.equal(everywhere.for_label(3), expected)


def test_unknown_classes_are_named_with_their_neighbours(explanation):
    with pytest.raises(ClassNotFoundError, match=r"'sevn'.*Did you mean 'seven'") as caught:
        explanation.for_label("sevn")
    assert isinstance(caught.value, KeyError)
    with pytest.raises(ClassNotFoundError, match=r"zero, one, two, seven, eight"):
        explanation.for_label("xyzxyz")
    with pytest.raises(ClassNotFoundError, match=r"no class 'ate'\. The classes are zero, one, two"):
        explanation.for_label("ate")
    cats = replace(explanation, labels=("tabby, tabby cat", "Egyptian cat", "scatter", "seven", "eight"))
    with pytest.raises(ClassNotFoundError, match=r"Did you mean 'tabby, tabby cat' or 'Egyptian cat'\?"):
        cats.for_label("Cat")
    for wrong in (5, -1):
        with pytest.raises(ClassNotFoundError, match=r"0\.\.4"):
            explanation.for_label(wrong)
    doubled = replace(explanation, labels=("crane", "one", "crane", "seven", "eight"))
    with pytest.raises(ClassNotFoundError, match=r"ids \[0, 2\]"):
        doubled.for_label("crane")


def test_known_but_not_computed_says_what_to_pass(explanation):
    with pytest.raises(ValueError, match=r"'eight' .* image 0\. .*targets=\['eight'\] or a larger top_k") as caught:
        explanation.for_label("eight")
    assert not isinstance(caught.value, ClassNotFoundError)
    assert explanation[1].for_label("eight").shape == (1, 2, 3)


def test_top_is_sorted_and_complete(explanation):
    best = explanation.top(2)[0]
    order = explanation.logits[0].argsort(descending=True).tolist()
    assert [p.index for p in best] == order[:2]
    assert best[0] == Prediction(
        LABELS[order[0]],
        order[0],
        float(explanation.logits[0].max()),
        float(explanation.probabilities[0].max()),
    )
    assert [len(row) for row in explanation.top(99)] == [5, 5]


def test_heatmap_lies_exactly_over_the_image(explanation):
    heat = explanation.heatmap("one", index=0)
    expected = np.kron(explanation.attributions[0, :, :, 1].numpy(), np.ones((3, 3), np.float32))
    assert heat.dtype == np.float32
    assert np.array_equal(heat, expected)
    smooth = explanation.heatmap("one", index=0, smooth=True)
    assert smooth.shape == (6, 9)
    assert not np.array_equal(smooth, heat)


def test_heatmap_takes_the_top_column_by_itself(explanation):
    for index in range(2):
        shown = explanation.classes[index].tolist()
        best = max(shown, key=lambda c: float(explanation.logits[index, c]))
        assert np.array_equal(explanation.heatmap(index=index), explanation.heatmap(best, index=index))


def test_saved_and_loaded_is_the_same_bit_for_bit(explanation, tmp_path):
    odd = explanation.null_values.clone()
    odd[0, 0], odd[0, 2] = -0.0, float("nan")
    explanation = replace(explanation, null_values=odd, labels=("日本", "</script>", *LABELS[2:]))
    assert explanation.save(tmp_path / "new" / "why") == tmp_path / "new" / "why"
    loaded = Explanation.load(tmp_path / "new" / "why")
    assert loaded.labels == explanation.labels
    for name in TENSORS:
        before, after = getattr(explanation, name), getattr(loaded, name)
        assert before.dtype == after.dtype
        assert before.numpy().tobytes() == after.numpy().tobytes()


def test_views_of_one_memory_can_be_saved(explanation, tmp_path):
    shared = torch.zeros(2, 10)
    views = replace(explanation, logits=shared[:, :5], null_values=shared[:, 5:], probabilities=shared[:, :5])
    views.save(tmp_path)
    assert same(Explanation.load(tmp_path), views)


def test_saving_replaces_the_old_and_spares_the_rest(explanation, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    explanation.save(tmp_path)
    explanation[:1].save(tmp_path)
    assert same(Explanation.load(tmp_path), explanation[:1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON_NAME, TENSORS_NAME, "notes.txt"]


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_foreign_files_are_not_overwritten(explanation, tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match=name):
        explanation.save(tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ['{"mine": 1}']


def test_a_failed_save_leaves_the_old_one(explanation, tmp_path, monkeypatch):
    explanation.save(tmp_path)
    write = type(tmp_path).write_bytes

    def full_disk(path, data):
        write(path, data[: len(data) // 2])
        if TENSORS_NAME in path.name:
            raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space"):
            explanation[:1].save(tmp_path)
    assert same(Explanation.load(tmp_path), explanation)
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON_NAME, TENSORS_NAME]


def test_files_appear_complete_or_not_at_all(tmp_path, monkeypatch):
    seen = []
    replace_file = type(tmp_path).replace

    def watched(path, target):
        seen.append(sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")))
        return replace_file(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", watched)
    write_together({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert seen == [[], ["a"]]
    assert [p.read_bytes() for p in sorted(tmp_path.iterdir())] == [b"1", b"2"]


def _cut(path):
    data = (path / TENSORS_NAME).read_bytes()
    (path / TENSORS_NAME).write_bytes(data[: len(data) // 2])


def _flip(path):
    data = bytearray((path / TENSORS_NAME).read_bytes())
    data[-1] ^= 1
    (path / TENSORS_NAME).write_bytes(bytes(data))


def _change(**changes):
    def damage(path):
        about = json.loads((path / JSON_NAME).read_text())
        (path / JSON_NAME).write_text(json.dumps({**about, **changes}))

    return damage


def _drop_a_tensor(path):
    tensors = load_file(path / TENSORS_NAME)
    del tensors["classes"]
    data = save(tensors)
    (path / TENSORS_NAME).write_bytes(data)
    _change(sha256=hashlib.sha256(data).hexdigest())(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cut short"),
        (_flip, "cut short, changed"),
        (lambda path: (path / TENSORS_NAME).unlink(), "missing"),
        (lambda path: (path / JSON_NAME).unlink(), "missing"),
        (lambda path: (path / JSON_NAME).write_text('{"format": "shapad'), "unreadable"),
        (lambda path: (path / JSON_NAME).write_text("[]"), "unreadable"),
        (_change(format_version=4, shapadapter_version="9.9"), r"format_version 1 to 3 .* shapadapter 9\.9 wrote 4"),
        (_change(format_version=0), "format_version 1 to 3 .* wrote 0"),
        (_change(format_version=None), "format_version 1 to 3 .* wrote None"),
        (_change(labels=["a"]), "5 labels"),
        (_change(labels=None), "incomplete"),
        (_drop_a_tensor, "classes"),
    ],
)
def test_damage_gives_one_clear_error(explanation, tmp_path, damage, message):
    explanation.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Explanation.load(tmp_path)


def test_a_mixture_of_two_saves_is_noticed(explanation, tmp_path):
    explanation.save(tmp_path / "a")
    explanation[:1].save(tmp_path / "b")
    (tmp_path / "a" / TENSORS_NAME).write_bytes((tmp_path / "b" / TENSORS_NAME).read_bytes())
    with pytest.raises(CheckpointError, match="another explanation"):
        Explanation.load(tmp_path / "a")


def test_importing_it_needs_no_transformer_and_no_drawing_library():
    tree = ast.parse(Path(explanation_module.__file__).read_text(encoding="utf-8"))
    names = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names]
    foreign = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.split(".")[0] for name in foreign} == {"numpy", "shapadapter", "torch"}
    assert {n for n in foreign if n.startswith("shapadapter")} == {
        "shapadapter.data.classes",
        "shapadapter.core.errors",
        "shapadapter.core.grid",
        "shapadapter.core.phrases",
        "shapadapter.explanation.forms",
        "shapadapter.core.estimates",
    }


@pytest.fixture
def refined(explanation):
    return replace(explanation, standard_errors=torch.rand(2, 2, 3, 2), evaluations=torch.tensor([64, 256]))


def test_errors_and_their_cost_travel_along(refined, tmp_path):
    refined = replace(refined, method="kernel_shap")
    refined.save(tmp_path)
    loaded = Explanation.load(tmp_path)
    assert loaded.method == loaded[0].method == "kernel_shap"
    assert torch.equal(loaded.standard_errors, refined.standard_errors)
    assert torch.equal(loaded[1].standard_errors[0], refined.standard_errors[1])
    assert loaded[1].evaluations.tolist() == [256]
    assert ", kernel_shap, 64 to 256 evaluations, gap" in repr(refined)
    assert ", 64 evaluations" in repr(refined[0])
    assert "evaluations" not in repr(refined[:0])


def test_an_explanation_without_errors_stays_without(explanation, tmp_path):
    explanation.save(tmp_path)
    for one in (explanation, explanation[0], Explanation.load(tmp_path)):
        assert (one.standard_errors, one.evaluations, one.method) == (None, None, "shapadapter")
    with pytest.raises(ValueError, match="refine=256"):
        explanation.interval("seven")


def test_files_of_version_1_are_read(explanation, tmp_path):
    explanation.save(tmp_path)
    about = json.loads((tmp_path / JSON_NAME).read_text())
    del about["method"]
    (tmp_path / JSON_NAME).write_text(json.dumps({**about, "format_version": 1}))
    assert same(Explanation.load(tmp_path), explanation)


def test_maps_that_do_not_sum_have_no_gap_to_tell(explanation):
    assert explanation.sums_to_logits
    assert replace(explanation, attributions=explanation.attributions * (1 + 1e-6)).sums_to_logits
    other = replace(explanation, attributions=explanation.attributions.abs(), method="attention")
    assert not other.sums_to_logits
    assert repr(other) == "Explanation(2 images, 2x3 players, 2 of 5 classes, attention)"
    assert repr(replace(other, evaluations=torch.tensor([1, 1]))).endswith(", attention, 1 evaluation)")
    assert repr(replace(other, evaluations=torch.tensor([0, 1]))).endswith(", attention, 0 to 1 evaluations)")


def test_the_interval_of_each_image_s_likeliest_class(refined):
    low, high = refined.interval()
    for index in range(2):
        one = refined[index]
        best = max(one.classes[0].tolist(), key=lambda label: one.logits[0, label])
        assert torch.equal(low[index], one.interval(best)[0][0])
        assert torch.equal(high[index], one.interval(best)[1][0])


def test_an_interval_is_the_attribution_and_its_error(refined):
    low, high = refined.interval("seven")
    errors = refined.standard_errors[..., 0]
    assert torch.allclose((low + high) / 2, refined.for_label("seven"), atol=1e-6)
    assert torch.allclose(high - low, 2 * 1.959964 * errors, atol=1e-5)
    narrow, wide = (torch.sub(*reversed(refined.interval(3, level))) for level in (0.5, 0.99))
    assert (narrow < high - low).all()
    assert (wide > high - low).all()
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f"got {level}"):
            refined.interval("seven", level)
    with pytest.raises(ValueError, match="not among the columns"):
        refined.interval("eight")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("standard_errors", torch.zeros(2, 2, 3, 1)),
        ("standard_errors", torch.zeros(2, 2, 3, 2, dtype=torch.float64)),
        ("evaluations", torch.zeros(1, dtype=torch.int64)),
        ("evaluations", torch.zeros(2)),
    ],
)
def test_errors_that_do_not_fit_are_refused(explanation, name, value):
    with pytest.raises(ValueError, match=name):
        replace(explanation, **{name: value})
