"""`pipeline("image-attribution")`: what `explain` says, by every road to a model and for every kind of input."""

import json
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import families
import forks
import matching
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from transformers import ViTImageProcessorPil as Processor
from transformers.pipelines.pt_utils import KeyDataset

import shapadapter
from shapadapter import ClassNotFoundError, ImageError, ShapleyConfig, ShapleyError, explain
from shapadapter.data import download as fetching

TASK = "image-attribution"
SIZE = {"height": families.SIDE, "width": families.SIDE}
# The adapter was trained with other settings than the base model came with.
OWN, BASES = (Processor(size=SIZE, image_mean=[mean] * 3, image_std=[0.2] * 3) for mean in (0.4, 0.6))

pipe_of = partial(pipeline, TASK, device="cpu")


def pictures(count=5):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a base model and of an adapter on it, each with an image processor of its own."""
    root = tmp_path_factory.mktemp("pipeline")
    families.base("vit").save_pretrained(root / "base")
    BASES.save_pretrained(root / "base")
    model = families.wrap(AutoModelForImageClassification.from_pretrained(root / "base"))
    model.save_pretrained(root / "adapter")
    OWN.save_pretrained(root / "adapter")
    return root


@pytest.fixture(scope="module")
def model(folders):
    return families.wrap(AutoModelForImageClassification.from_pretrained(folders / "base"))


@pytest.fixture(scope="module")
def pipe(folders):
    return pipe_of(model=str(folders / "adapter"))


def maps(answer):
    """The attributions (rows, cols, C) of one image's answer."""
    return torch.tensor([one["attributions"] for one in answer]).permute(1, 2, 0)


def assert_as_explained(answers, explanation):
    for index, answer in enumerate(answers):
        assert torch.equal(maps(answer), explanation.attributions[index])
        shown = explanation.classes[index]
        assert [one["label"] for one in answer] == [explanation.labels[c] for c in shown]
        for key, values in (
            ("score", explanation.probabilities),
            ("logit", explanation.logits),
            ("null_value", explanation.null_values),
        ):
            assert torch.equal(torch.tensor([one[key] for one in answer]), values[index, shown])
        for one in answer:
            assert np.sum(one["attributions"]) + one["null_value"] == pytest.approx(one["logit"], abs=1e-4)


# -- the numbers, and the roads to a model ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_numbers_are_those_of_explain_bit_for_bit(pipe, model, size):
    answers = pipe(pictures(), batch_size=size, top_k=3)
    assert_as_explained(answers, explain(model, pictures(), OWN, top_k=3, batch_size=size))
    assert json.loads(json.dumps(answers)) == answers


@pytest.mark.parametrize("size", [1, 2])
def test_a_backward_pass_where_it_is_asked_for(pipe, model, size):
    answers = pipe(pictures(3), batch_size=size, top_k=2, refine="gradient")
    expected = explain(model, pictures(3), OWN, top_k=2, refine="gradient", batch_size=size)
    assert_as_explained(answers, expected)
    errors = torch.tensor([[one["expected_error"] for one in answer] for answer in answers])
    torch.testing.assert_close(errors.double(), expected.relative_errors, check_dtype=False, rtol=1e-5, atol=0)
    assert "expected_error" not in pipe(pictures(1), refine=0)[0][0]
    assert pipe_of(model=model, image_processor=OWN, refine="gradient")(pictures(1)) == pipe(
        pictures(1), refine="gradient"
    )
    with pytest.raises(ValueError, match="refine=256"):
        pipe(pictures(1), refine=16)


def test_every_road_to_a_model_gives_the_same(pipe, folders, model):
    expected = pipe(pictures(2))
    assert len(expected[0]) == 5
    assert pipe_of(model=folders / "adapter")(pictures(2)) == expected
    for given in (model, model.get_base_model()):
        assert pipe_of(model=given, image_processor=OWN)(pictures(2)) == expected
    assert pipe_of(model=model, image_processor=str(folders / "adapter"))(pictures(2)) == expected


def test_plain_image_classification_keeps_working(pipe, folders, model):
    expected = [[(one["label"], pytest.approx(one["score"], abs=1e-6)) for one in a] for a in pipe(pictures(3))]
    # By name, transformers would take the processor of the base model.
    name = str(folders / "adapter")
    for given, processor in ((name, name), (model, OWN), (model.get_base_model(), OWN)):
        plain = pipeline("image-classification", model=given, image_processor=processor, device="cpu")
        for size in (1, 2):
            answers = plain(pictures(3), batch_size=size)
            assert [[(one["label"], one["score"]) for one in answer] for answer in answers] == expected


@pytest.mark.parametrize(
    "options", [{"prediction": "vote"}, {"prediction": "classifier", "modules_to_save": ["classifier"]}]
)
def test_other_classes_than_those_of_the_base(folders, tmp_path, options):
    names = {0: "yes", 1: "no", 2: "<b>maybe</b>"}
    room = {"num_labels": 3, "id2label": names, "ignore_mismatched_sizes": True}
    base = AutoModelForImageClassification.from_pretrained(folders / "base", **room)
    if options["prediction"] == "vote":
        base.save_pretrained(tmp_path / "base")  # whose new classifier is part of the base
        base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = families.stir(get_peft_model(base, ShapleyConfig(r=4, head_width=64, **options))).eval()
    model.save_pretrained(tmp_path / "adapter")
    OWN.save_pretrained(tmp_path / "adapter")
    answers = pipe_of(model=str(tmp_path / "adapter"))(pictures(2))
    assert_as_explained(answers, explain(model, pictures(2), OWN, top_k=5, batch_size=1))
    assert {one["label"] for one in answers[0]} == set(names.values())


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype(folders, name):
    pipe = pipe_of(model=str(folders / "adapter"), **{name: torch.bfloat16})
    assert pipe.dtype == torch.bfloat16
    assert len(pipe(pictures(1)[0])) == 5


def test_by_its_name_on_the_hub(folders, pipe, tmp_path):
    sys.path.append(str(Path(__file__).parent / "hub"))
    server = pytest.importorskip("server")

    def ask():
        server.point_at(hub.url, tmp_path / "home", pytest.MonkeyPatch())
        one = pipe_of(model="ada/adapter", token=server.TOKEN)("picture.png")
        model, processor = shapadapter.load("ada/adapter", revision="second", token=server.TOKEN)
        other = pipe_of(model=model, image_processor=processor)("picture.png")
        Path("answers.json").write_text(json.dumps([one, other]))

    with server.LocalHub() as hub:
        hub.add("ada/base", folders / "base", private=True)
        config = json.loads((folders / "adapter" / "adapter_config.json").read_text())
        named = {path.name: path.read_bytes() for path in (folders / "adapter").iterdir() if path.is_file()}
        named["adapter_config.json"] = json.dumps({**config, "base_model_name_or_path": "ada/base"}).encode()
        hub.add("ada/adapter", named, private=True)
        other = {"preprocessor_config.json": (folders / "base" / "preprocessor_config.json").read_bytes()}
        hub.add("ada/adapter", {**named, **other}, revision="second")
        pictures(1)[0].save(tmp_path / "picture.png")
        forks.run_whole(ask, tmp_path, **hub.environment(tmp_path / "home", token=""))
    found = json.loads((tmp_path / "answers.json").read_text())
    assert found[0] == pipe(pictures(1)[0])
    assert found[1] == pipe_of(model=pipe.model, image_processor=BASES)(pictures(1)[0])


def test_no_code_is_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"adapter_model.safetensors", "preprocessor_config.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".pkl", ".bin"))]
    assert not hasattr(pipe.model.config, "custom_pipelines")
    assert pipe_of(model=str(tmp_path))(pictures(1)) == pipe(pictures(1))


# -- inputs ----------------------------------------------------------------------------------------------------------


class _Web(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/0.png")
            self.end_headers()
            return
        file = Path(self.server.folder, path[1:])
        self.send_response(200 if file.is_file() else 404)
        self.end_headers()
        self.wfile.write(file.read_bytes() if file.is_file() else b"no such page")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    for index, picture in enumerate(pictures(3)):
        picture.save(folder / f"{index}.png")
    (folder / "page.html").write_text("<html>no picture</html>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    server.folder = folder
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
        yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_paths_lists_generators_and_data_sets(pipe, web):
    folder, url = web
    expected = pipe(pictures(3), top_k=2)
    names = [f"{index}.png" for index in range(3)]
    assert pipe([f"{url}/{name}" for name in names], top_k=2, timeout=10) == expected
    assert pipe([str(folder / name) for name in names], top_k=2) == expected
    assert pipe(folder / "0.png", top_k=2) == pipe(f"{url}/moved.png", top_k=2) == expected[0]
    assert pipe(np.asarray(pictures(1)[0]), top_k=2) == expected[0]
    assert list(pipe((picture for picture in pictures(3)), top_k=2)) == expected
    rows = [{"image": picture} for picture in pictures(3)]
    assert list(pipe(KeyDataset(rows, "image"), top_k=2, batch_size=1)) == expected


def test_what_cannot_be_fetched_or_read_is_named(pipe, web, tmp_path):
    _, url = web
    with pytest.raises(ImageError, match=r"Cannot fetch image .*/none\.png: the server answered 404") as caught:
        pipe(f"{url}/none.png?signature=secret")
    assert "secret" not in str(caught.value)
    with pytest.raises(ImageError, match=r"Cannot fetch image http://127\.0\.0\.1:9/a\.png: Connection refused"):
        pipe("http://me:secret@127.0.0.1:9/a.png", timeout=5)
    with pytest.raises(ImageError, match=r"127\.0\.0\.2.*: it is on this computer or in a private network"):
        pipe(f"{url}/0.png".replace("127.0.0.1", "127.0.0.2"))
    with pytest.raises(ImageError, match="Cannot read image"):
        pipe(f"{url}/page.html")
    with pytest.raises(ImageError, match=r"none\.png"):
        pipe(str(tmp_path / "none.png"))


# -- arguments -------------------------------------------------------------------------------------------------------


def test_targets_take_the_place_of_top_k(folders, pipe, model):
    picture = pictures(1)[0]
    answer = pipe(picture, targets=["eel", 0])
    assert [one["label"] for one in answer] == ["eel", "ant"]
    assert torch.equal(maps(answer), explain(model, picture, OWN, targets=["eel", 0]).attributions[0])
    always = pipe_of(model=model, image_processor=OWN, top_k=1)
    assert len(always(picture)) == 1
    assert [one["label"] for one in always(picture, targets="bee")] == ["bee"]
    with pytest.raises(ClassNotFoundError, match="no class 'be'"):
        pipe(picture, targets="be")
    with pytest.raises(ValueError, match="either targets or top_k"):
        pipe(picture, targets="bee", top_k=1)


def test_functions(pipe, model):
    picture = pictures(1)[0]
    logits = explain(model, picture, OWN).logits[0].sort(descending=True).values
    for name, function in {"softmax": lambda x: x.softmax(0), "sigmoid": torch.sigmoid, "none": lambda x: x}.items():
        scores = torch.tensor([one["score"] for one in pipe(picture, function_to_apply=name)])
        torch.testing.assert_close(scores, function(logits), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="function_to_apply must be one of"):
        pipe(picture, function_to_apply="tanh")


@pytest.mark.parametrize(("kind", "function"), [("multi_label_classification", torch.sigmoid), ("regression", None)])
def test_scores_are_of_the_models_kind(kind, function):
    model = families.wrap(families.build("vit", problem_type=kind))
    for one in pipe_of(model=model, image_processor=OWN)(pictures(1)[0]):
        logit = torch.tensor(one["logit"])
        assert one["score"] == pytest.approx(float(logit if function is None else function(logit)), abs=1e-6)


def test_overlays_show_what_the_model_saw_on_one_scale(pipe):
    plain, drawn = pipe(pictures(2), top_k=2), pipe(pictures(2), top_k=2, overlay=True, batch_size=2)
    for answer, with_pictures in zip(plain, drawn, strict=True):
        largest = max(np.abs(one["attributions"]).max() for one in answer)
        for one, other in zip(answer, with_pictures, strict=True):
            pixels = np.asarray(other.pop("overlay"))
            assert other.keys() == one.keys()
            assert pixels.shape == (families.SIDE, families.SIDE, 3)
            tiles = pixels.reshape(4, 8, 4, 8, 3)
            # The largest number of both maps has the full colour, and no other map does.
            full = [(tiles[i, :, j] == tiles[i, 0, j, 0]).all() for i in range(4) for j in range(4)]
            assert any(full) == (np.abs(one["attributions"]).max() == largest)


# -- images and texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_candidate_labels(family):
    model, processor = matching.wrapped(family), matching.processor(family)
    labels = ["one", "two", "six"]
    pipe = pipe_of(model=model, processor=processor, candidate_labels=labels, hypothesis_template="a photo of a {}")
    answers = pipe(matching.pictures(3), batch_size=2)
    texts = [f"a photo of a {label}" for label in labels]
    expected = explain(model, matching.pictures(3), processor, texts=texts, top_k=5, batch_size=2)
    for index, answer in enumerate(answers):
        assert torch.equal(maps(answer), expected.attributions[index])
        assert [one["label"] for one in answer] == [labels[c] for c in expected.classes[index]]
        shown = expected.probabilities[index, expected.classes[index]]
        assert [one["score"] for one in answer] == shown.tolist()
    with pytest.raises(ShapleyError, match=r"pass candidate_labels=\[\.\.\.\]"):
        pipe_of(model=model, processor=processor)(matching.pictures(1)[0])


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_missing_or_unknown_is_named(folders, pipe, model):
    with pytest.raises(ShapleyError, match="needs the image processor"):
        pipe_of(model=model)
    with pytest.raises(ShapleyError, match="holds no adapter"):
        pipe_of(model=str(folders / "base"))
    with pytest.raises(ShapleyError, match="active Shapley adapter"):
        pipe_of(model=families.base("vit"), image_processor=OWN)
    with pytest.raises(ShapleyError, match="attn_implementation"):
        pipe_of(model=str(folders / "adapter"), model_kwargs={"attn_implementation": "eager"})
    with pytest.raises(ShapleyError, match="classes of its own"):
        pipe(pictures(1)[0], candidate_labels=["a", "b"])
    with pytest.raises(TypeError, match="top"):
        pipe(pictures(1)[0], top=3)
