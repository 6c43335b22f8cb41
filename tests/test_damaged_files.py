"""Files that are damaged, forged or none at all: each gives one sentence of ours, or still works; nothing hangs."""

import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import pytest
import torch
import typer
from families import base, stir
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from shapadapter import CheckpointError, Evaluation, Explanation, ShapleyConfig, ShapleyError, load
from shapadapter.cli import options as cli_config
from shapadapter.core.documents import Between, FileName, fault, read_json
from shapadapter.core.errors import FieldError
from shapadapter.core.statistics import Interval
from shapadapter.evaluation.records import Records
from shapadapter.hub.card.renewal import update_card
from shapadapter.training.checkpoints import damage_in

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000
VALUES = ["null", "true", "-1", "0", "1e400", "NaN", f"1{'0' * 400}", f"1{'0' * 5000}", '"x"', "[]", "{}", "[[[1]]]"]
VALUES += [DEEP, '"\\ud800"', '["\\ud800"]', '{"0": "\\ud800"}', f'"{"a" * 100_000}"']


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model, an adapter of it, and one that brings its classifier along."""
    folder = tmp_path_factory.mktemp("made")
    base("vit").save_pretrained(folder / "base")
    for name, options in {
        "adapter": {},
        "head": {"prediction": "classifier", "modules_to_save": ["classifier"]},
    }.items():
        plain = AutoModelForImageClassification.from_pretrained(folder / "base")
        stir(get_peft_model(plain, ShapleyConfig(r=4, **options))).save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the adapter, to be damaged."""
    return shutil.copytree(made / "adapter", tmp_path / "adapter")


def bare(made):
    return AutoModelForImageClassification.from_pretrained(made / "base")


def sentence(error):
    """What an error says, which must be one line that can be printed."""
    told = str(error.value)
    told.encode()
    assert "\n" not in told
    assert 10 < len(told) < 900
    return told


def refused(action, match=""):
    with pytest.raises(ShapleyError, match=match) as error:
        action()
    return sentence(error)


# -- values -----------------------------------------------------------------------------------------------------------


class Thing(TypedDict):
    kind: Literal["a", "b"]
    sizes: list[Annotated[int, Between(1, 9)]]
    place: tuple[float, float] | None
    names: dict[int, str]
    file: NotRequired[Annotated[str, FileName]]


GOOD = {"kind": "a", "sizes": [1, 9], "place": (0.5, 1), "names": {0: "é"}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"file": "caf\udce9"}, None),
        ({"more": object()}, None),
        ({"kind": "c"}, "kind must be one of ['a', 'b'], got 'c'"),
        ({"sizes": [1, 10]}, "sizes[1] must be a whole number 1 to 9, got 10"),
        ({"sizes": [True]}, "sizes[0] must be a whole number, got True"),
        ({"sizes": "12"}, "sizes must be a list whose items are each a whole number 1 to 9, got '12'"),
        ({"place": [1.0]}, "place must be (a finite number, a finite number), got [1.0]"),
        ({"place": (1.0, float("inf"))}, "place[1] must be a finite number, got inf"),
        ({"place": (1.0, 10**400)}, "place[1] must be a finite number, got a whole number of more than 64 bits"),
        ({"names": {"0": "a"}}, "a key of names must be a whole number, got '0'"),
        ({"names": {0: "\ud800"}}, "names[0] must be a text in UTF-8, got '\\ud800'"),
        ({"file": "\ud800"}, "file must be a text in UTF-8, got '\\ud800'"),
    ],
)
def test_a_fault_is_named_with_its_place(change, told):
    assert fault({**GOOD, **change}, Thing, "") == told


def test_what_is_missing_is_named():
    assert fault({"kind": "a"}, Thing, "") == "it lacks 'sizes'"
    assert fault([], Thing, "") == "it must be a mapping, got []"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", None),
        ("r", 0),
        ("r", 10**400),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 2.0),
        ("rank_pattern", {"a": True}),
        ("bias", "x"),
        ("grid", (1, 1)),
        ("grid", [2]),
        ("head_width", "256"),
        ("id2label", {"a": "b"}),
        ("id2label", {0: "\ud800"}),
        ("fill_color", "red"),
        ("shapley_token", 1),
        ("num_classes", -1),
        ("auto_mapping", {}),
        ("base_fingerprint", {"dtype": "float32", "values": [[1.0]]}),
        ("base_model_name_or_path", "a" * 5000),
        ("record", []),
    ],
)
def test_a_configuration_names_the_field(field, value):
    with pytest.raises(FieldError, match=field) as error:
        ShapleyConfig(**{field: value})
    assert isinstance(error.value, ValueError)
    sentence(error)


# -- adapter_config.json ----------------------------------------------------------------------------------------------


def test_every_field_with_every_kind_of_value(folder):
    """A seeded part of them; the rest was tried by hand."""
    whole, draw = json.loads((folder / CONFIG).read_text()), random.Random(0)
    counts = {"works": 0, "refused": 0}
    for name in whole:
        for value in draw.sample(VALUES, 4):
            text = json.dumps({**whole, name: "@@"}).replace('"@@"', value)
            (folder / CONFIG).write_text(text)
            try:
                ShapleyConfig.from_pretrained(str(folder)).to_dict()
                counts["works"] += 1
            except CheckpointError as error:
                counts["refused"] += str(folder) in str(error) and len(str(error)) < 900
    assert sum(counts.values()) == 4 * len(whole)
    assert counts["refused"] > 3 * counts["works"] > 30


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", '"x"'),
        ("r", "8"),
        ("num_classes", "6"),
        ("head_width", "99999999999"),
        ("peft_type", "[]"),
        ("record", DEEP),
        ("target_modules", '["nope"]'),
        ("target_modules", '"["'),
        ("alpha_pattern", '{"[": 1}'),
        ("use_dora", "true"),
        ("fill_color", "[1, 2]"),
        ("mechanism", '"latents"'),
        ("trainable_token_indices", "[1]"),
        ("id2label", '{"0": "\\ud800"}'),
    ],
)
def test_every_road_says_it_in_one_sentence(made, folder, field, value):
    whole = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**whole, field: "@@"}).replace('"@@"', value))
    for road in (
        lambda: load(folder),
        lambda: PeftModel.from_pretrained(bare(made), folder),
        lambda: AutoPeftModel.from_pretrained(folder),
    ):
        refused(road)


def test_a_value_of_the_right_kind_still_loads(made, folder):
    """Nothing that PEFT or we write is refused."""
    whole = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(
        json.dumps({**whole, "lora_alpha": 2.5, "record": {"metrics": {"loss": float("nan")}}})
    )
    model, _ = load(folder)
    assert model.peft_config["default"].lora_alpha == 2.5


def test_adapters_of_others_are_left_to_peft(tmp_path):
    from peft import LoraConfig, PeftConfig

    LoraConfig(target_modules=["a"]).save_pretrained(tmp_path)
    about = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**about, "r": "x"}))
    assert PeftConfig.from_pretrained(str(tmp_path)).r == "x"


# -- weights ----------------------------------------------------------------------------------------------------------

HEAD = "base_model.model.shapley.lora_shapley_"
LORA = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"


def rewritten(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("road", ["load", "peft", "card"])
@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("key", [HEAD + "vote.weight", LORA])
def test_numbers_of_another_kind_are_refused(made, folder, key, kind, road):
    if road != "peft" and kind is not torch.int8:
        pytest.skip("the same check")
    rewritten(folder, lambda tensors: tensors.update({key: tensors[key].to(kind)}))
    roads = {"load": load, "card": update_card, "peft": lambda place: PeftModel.from_pretrained(bare(made), place)}
    refused(lambda: roads[road](folder), r"holds .* as ")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read(made, folder, kind):
    expected = load_file(folder / WEIGHTS)[LORA].to(kind)
    rewritten(folder, lambda tensors: tensors.update({key: value.to(kind) for key, value in tensors.items()}))
    model, _ = load(folder)
    own = dict(model.named_parameters())[LORA.replace("lora_A", "lora_A.default")]
    assert torch.equal(own.to(kind), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["adapter", "head"])
def test_weights_that_are_not_finite_are_said(made, tmp_path, value, place):
    folder = shutil.copytree(made / place, tmp_path / "adapter")
    key = "base_model.model.classifier.weight" if place == "head" else LORA
    rewritten(folder, lambda tensors: tensors[key].view(-1)[3:4].fill_(value))
    refused(lambda: PeftModel.from_pretrained(bare(made), folder), "not finite.*diverged")
    refused(lambda: load(folder), "not finite")


@pytest.mark.parametrize(
    ("key", "change", "told"),
    [
        (HEAD + "vote.weight", lambda t: t[:3], r"of shape \(3, 32\).*asks for \(5, 32\)"),
        (HEAD + "null", lambda t: t[None], r"of shape \(1, 5\)"),
        (HEAD + "token", lambda t: t[0, 0], r"of shape \(32,\)"),
        (LORA, lambda t: t[:2], r"of shape \(2, 32\), the model expects \(4, 32\)"),
        (LORA, lambda t: t.T, r"of shape \(32, 4\)"),
        (LORA, None, "lacks 1 of"),
        (HEAD + "gate.bias", None, "lacks 1 of"),
    ],
)
def test_tensors_of_other_shapes_or_missing(made, folder, key, change, told):
    def damage(tensors):
        tensor = tensors.pop(key)
        if change is not None:
            tensors[key] = change(tensor).contiguous().clone()

    rewritten(folder, damage)
    refused(lambda: PeftModel.from_pretrained(bare(made), folder), told)
    refused(lambda: load(folder), told)


@pytest.mark.parametrize("key", ["x", HEAD + "foo.weight", LORA.replace("layers.0", "layers.7")])
def test_tensors_without_a_place_are_refused(made, folder, key):
    rewritten(folder, lambda tensors: tensors.update({key: torch.zeros(2)}))
    refused(lambda: PeftModel.from_pretrained(bare(made), folder), "no place")


@pytest.mark.parametrize("shape", [None, (3, 32)])
def test_a_module_that_is_brought_along_is_whole(made, tmp_path, shape):
    folder, key = shutil.copytree(made / "head", tmp_path / "adapter"), "base_model.model.classifier.weight"
    rewritten(folder, lambda tensors: tensors.pop(key) if shape is None else tensors.update({key: torch.zeros(shape)}))
    model = bare(made)
    refused(lambda: PeftModel.from_pretrained(model, folder), "brings classifier along, with weight")
    assert not any("lora_" in name for name, _ in model.named_modules())


def test_cut_off_weights_everywhere(made, folder):
    whole, draw = (folder / WEIGHTS).read_bytes(), random.Random(0)
    header = struct.unpack("<Q", whole[:8])[0]
    contents = [whole[: draw.randrange(len(whole))] for _ in range(12)]
    contents += [b"", struct.pack("<Q", 2**43) + whole[8:], struct.pack("<Q", 2**64 - 1) + whole[8:]]
    huge = json.dumps({LORA: {"dtype": "F32", "shape": [2**40, 2], "data_offsets": [0, 2**43]}}).encode()
    contents += [struct.pack("<Q", len(huge)) + huge + whole[8 + header :]]
    for content in contents:
        (folder / WEIGHTS).write_bytes(content)
        refused(lambda: load(folder), "damaged")
        refused(lambda: update_card(folder), "damaged")


# -- explanations -----------------------------------------------------------------------------------------------------


def explanation(**changes):
    parts = {
        "attributions": torch.zeros(1, 2, 2, 2),
        "classes": torch.tensor([[0, 1]]),
        "logits": torch.zeros(1, 3),
        "null_values": torch.zeros(1, 3),
        "probabilities": torch.full((1, 3), 1 / 3),
        "labels": ("a", "b", "c"),
        "images": torch.zeros(1, 4, 4, 3, dtype=torch.uint8),
    }
    return Explanation(**{**parts, **changes})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attributions", None),
        ("attributions", [[1.0]]),
        ("attributions", torch.zeros(1, 2, 2, 2, dtype=torch.complex64)),
        ("attributions", torch.zeros(1, 2, 2, 2, dtype=torch.bool)),
        ("logits", torch.zeros(1, 3).to_sparse()),
        ("logits", torch.zeros(1, 3, device="meta")),
        ("classes", torch.zeros(1, 2)),
        ("images", "x"),
        ("labels", "abc"),
        ("labels", 5),
        ("labels", (1, 2, 3)),
        ("labels", ("a", "b", "\ud800")),
        ("standard_errors", 1.0),
        ("evaluations", [3]),
        ("method", None),
        ("method", "\ud800"),
    ],
)
def test_fields_of_an_explanation(field, value):
    with pytest.raises(FieldError, match=field) as error:
        explanation(**{field: value})
    sentence(error)


def test_damaged_explanations(tmp_path):
    saved = explanation().save(tmp_path / "saved")
    words, tensors = json.loads((saved / "explanation.json").read_text()), load_file(saved / "explanation.safetensors")
    for field in ("format", "format_version", "labels", "method", "sha256", "shapadapter_version"):
        for value in VALUES:
            (saved / "explanation.json").write_text(json.dumps({**words, field: "@@"}).replace('"@@"', value))
            if field not in ("method", "shapadapter_version"):  # a name may be any text, but none of half characters
                refused(lambda: Explanation.load(saved))
    for name, tensor in tensors.items():
        for changed in (None, tensor[:0], tensor.to(torch.float16), tensor[..., None], torch.zeros(())):
            own = {key: value for key, value in tensors.items() if key != name}
            data = save({**own, **({} if changed is None else {name: changed.contiguous()})})
            told = {**words, "sha256": hashlib.sha256(data).hexdigest()}
            (saved / "explanation.json").write_text(json.dumps(told))
            (saved / "explanation.safetensors").write_bytes(data)
            refused(lambda: Explanation.load(saved))


# -- evaluations, records and seals -----------------------------------------------------------------------------------

ONE = Interval(0.5, 0.4, 0.6, 8)
ABOUT = {
    "model": "ViT", "prediction": "vote", "removal": "drop", "players": [4, 4], "explained": "the class", "value": "logit",
    "curves_read": "probability", "truth": "exact", "truth_evaluations": 65536, "truth_error": 0.0, "top_k": 3,
    "removed_counts": [2, 4], "removal_draws": 16, "seed": 0, "data": 8, "images": 8, "groups": None, "area": None,
}  # fmt: skip


def evaluated(**about):
    methods = {"shapadapter": {"error": ONE, "insertion": ONE}}
    return Evaluation(
        {**ABOUT, **about}, {"accuracy": ONE}, methods, {64: ONE}, {}, {"shapadapter": {"insertion": (ONE,)}}
    )


def test_an_evaluation_without_a_part(folder, tmp_path):
    path = evaluated().save(tmp_path / "evaluation.json")
    whole = json.loads(path.read_text())
    assert "0.500" in update_card(folder, evaluation=path).read_text()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    optional = {"cost_curve", "smoothness"}  # not in files of earlier versions
    for name in set(whole) - optional:
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        refused(lambda: update_card(folder, evaluation=path))
    for name in ABOUT:
        path.write_text(json.dumps({**whole, "about": {key: v for key, v in whole["about"].items() if key != name}}))
        refused(lambda: update_card(folder, evaluation=path), name)
        partial = Evaluation.load(path)
        for use in (partial.table, partial.markdown, partial.metrics):
            refused(use, name)
    path.write_text(json.dumps({**whole, "methods": {}}))
    refused(lambda: update_card(folder, evaluation=path), "shapadapter")
    for name in whole:
        for value in VALUES:
            path.write_text(json.dumps({**whole, name: "@@"}).replace('"@@"', value))
            if (name, value) not in {
                ("notes", "[]"),
                ("cost_curve", "[]"),
                ("smoothness", "null"),
                *((key, "{}") for key in whole),
            }:
                refused(lambda: Evaluation.load(path))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", DEEP, '{"sha256": "x", "record": {}}', "\xff"])
def test_a_damaged_record_is_measured_again(tmp_path, content):
    kept = Records(tmp_path, {"seed": 0}, torch.nn.Linear(1, 1))
    kept.keep("image-0", {"index": 0, "methods": {"shapadapter": {"error": 0.25}}})
    file = next(tmp_path.rglob("image-0.json"))
    assert kept.find("image-0")["methods"]["shapadapter"]["error"] == 0.25
    assert kept.find("image-1") is None
    other = file.read_text().replace("0.25", "0.75")
    for damaged in (content, other):
        file.write_text(damaged, encoding="latin-1")
        assert kept.find("image-0") is None
    kept.keep("image-0", {"index": 0})
    assert kept.find("image-0") == {"index": 0}


def test_deep_json_in_a_checkpoint(tmp_path):
    (tmp_path / "trainer_state.json").write_text(DEEP)
    assert "trainer_state.json cannot be read" in damage_in(tmp_path)


# -- what is no file --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "device", "folder"])
def none(request, tmp_path):
    """Makes, in the place of a file, what never ends or never begins."""

    def put(path):
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        return path

    return put


@pytest.mark.timeout(60)
def test_pipes_devices_and_folders_in_the_place_of_files(made, folder, none, tmp_path):
    saved = explanation().save(tmp_path / "saved")
    none(folder / WEIGHTS)
    for road in (load, update_card, lambda place: PeftModel.from_pretrained(bare(made), place)):
        refused(lambda road=road: road(folder))
    shutil.rmtree(folder)
    shutil.copytree(made / "adapter", folder)
    none(folder / CONFIG)
    refused(lambda: load(folder))
    refused(lambda: update_card(folder))
    for name in ("explanation.safetensors", "explanation.json"):
        none(saved / name)
        refused(lambda: Explanation.load(saved))
    with pytest.raises(FileExistsError):
        explanation().save(saved)
    refused(lambda: Evaluation.load(none(tmp_path / "evaluation.json")))
    with pytest.raises(typer.BadParameter, match="cannot be read"):
        cli_config._load(none(tmp_path / "options.yaml"))
    (tmp_path / "checkpoint-1").mkdir()
    none(tmp_path / "checkpoint-1" / "trainer_state.json")
    assert "trainer_state.json is missing" in damage_in(tmp_path / "checkpoint-1")


# -- yaml and json ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        f"top-k: 1{'0' * 400}",
        f"top-k: 1{'0' * 5000}",
        f"top-k: 1{':0' * 3000}",
        f"top-k: {'[' * 100_000}",
        f"{'- ' * 5000}x",
        "top-k: 2020-13-45",
        'title: "\\ud800"',
        "? [a]\n: b",
        "a: *b",
        "\x00",
    ],
    ids=range(10),
)
def test_yaml_that_no_option_can_hold(tmp_path, text):
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(typer.BadParameter, match=r"options\.yaml") as error:
        cli_config._load(tmp_path / "options.yaml")
    str(error.value).encode()


def test_aliases_are_looked_at_once(tmp_path):
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    (tmp_path / "options.yaml").write_text(bomb + "b: &b [*b]\n")
    assert set(cli_config._load(tmp_path / "options.yaml")) == {*(f"a{n}" for n in range(60)), "b"}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b'"\xed\xa0\x80"', b"[1]", DEEP.encode(), b"1e999999"])
def test_json_that_is_none(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    assert str(path) in refused(lambda: read_json(path), "damaged")


def test_json_that_is_there(tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1.5, "\\ud83d\\ude00", "caf\\udce9"], "b": ' + b"[" * 60 + b"]" * 60 + b"}")
    assert read_json(path)["a"] == [1.5, "\U0001f600", "caf\udce9"]
    refused(lambda: read_json(Path("nowhere.json")), "no file nowhere.json")


# -- everything at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_bits_that_flip(made, folder, name):
    """A seeded few of the thousands that were tried by hand."""
    whole, draw = (folder / name).read_bytes(), random.Random(1)
    reach = len(whole) if name == CONFIG else 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(reach)] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(content)
        try:
            update_card(folder)
        except ShapleyError as error:
            assert "\n" not in str(error)  # noqa: PT017 - most are refused, some change a letter of a name
