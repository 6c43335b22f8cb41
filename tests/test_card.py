"""The model card: what it says, what of the user's survives, and that hostile words do nothing."""

import copy
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from shapadapter.adapter.saving import record_for, write_pictures
from shapadapter.hub.card import content
from shapadapter.hub.card.document import edited, renewed, untouched, write_card
from shapadapter.hub.card.facts import Facts
from shapadapter.hub.card.facts import words as escaped

EVIL = (
    "<script>alert(1)</script> [click](http://evil.test) ![see](http://evil.test/x.png) `code` ``more`` | bar \\| \n"
    "---\nlicense: evil\n# head\n<!-- shapadapter:end card -->\n{{ 7*7 }} {% raw %} &lt;b&gt; <img src=x onerror=alert(1)> "
    "http://evil.test *bold* _it_ ~~no~~ $x$ \u202egnp.exe \udc80"
)
EVALUATION = {
    "images": 32,
    "data": 360,
    "truth": "kernel_shap",
    "truth_evaluations": 2048,
    "truth_error": 0.05,
    "removal": "drop",
    "players": [14, 14],
    "data_name": "test",
    "curves_read": "probability",
    "task": {"accuracy": [0.917, 0.889, 0.942, 360]},
    "methods": {
        "shapadapter": {
            "error": [0.46, 0.43, 0.49, 32],
            "insertion": [0.8, 0.7, 0.9, 32],
            "time": [1.04, None, None, 1],
        },
        "random": {"insertion": [0.5, 0.4, 0.6, 32]},
        "leave_one_out": {"error": [0.7, 0.6, 0.8, 32]},
    },
    "equivalent": {"evaluations": 260, "bound": "=", "low": 210, "high": 320},
}
RECORD = {
    "kind": "classifier",
    "players": [14, 14],
    "data": {"name": "beans", "id": "AI-Lab/beans", "train_images": 1034, "eval_images": 133},
    "training": {
        "epochs": 3.0,
        "steps": 1200,
        "minutes": 12.3,
        "hardware": "CPU",
        "settings": {"learning_rate": 5e-4, "optim": "adamw"},
    },
    "versions": {"torch": "2.13.0"},
    "evaluation": EVALUATION,
    "pictures": [{"file": "explanation-1.png", "alt": "Attribution maps"}],
    "about": {"license": "apache-2.0", "tags": ["leaves"]},
    "weights": "0" * 16,
}
CONFIG = {
    "peft_type": "SHAPLEY",
    "base_model_name_or_path": "google/vit-base-patch16-224",
    "revision": "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
    "auto_mapping": {"base_model_class": "ViTForImageClassification"},
    "prediction": "vote",
    "tune": "lora",
    "r": 16,
    "removal": "drop",
    "mechanism": "sequence",
    "num_classes": 3,
    "id2label": {"0": "healthy", "1": "rust", "2": "spot"},
    "shapadapter_version": "0.1.0",
    "record": RECORD,
}


def facts(config=None, name="ada/leaves", **changes) -> Facts:
    config = copy.deepcopy(CONFIG if config is None else config)
    config["record"] = {**config["record"], **changes} if changes else config["record"]
    return Facts(config, name, None, ["explanation-1.png"])


def updated(card, facts, tags=()) -> str:
    return renewed(card, content.markdown(facts), content.metadata(facts), tags)


def metadata_of(card) -> dict:
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1]
    assert ModelCard(card).data.to_dict() is not None
    return yaml.safe_load(block)


def section(card, name) -> str:
    return re.search(rf"^## {name}\n.*?(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)[0]


# -- what it says ----------------------------------------------------------------------------------------------------


def test_a_card_says_what_is_known_and_writing_it_again_changes_nothing():
    card = updated(None, facts())
    for words in (
        "[google/vit-base-patch16-224](https://huggingface.co/google/vit-base-patch16-224), `ViTForImageClassification`",
        "**3 classes**: `healthy`, `rust`, `spot`.",
        "14 x 14 patches",
        "| Accuracy ↑ | 0.917 (0.889 to 0.942) | 360 |",
        "| Relative L2 error to the true Shapley values ↓ | 0.460 (0.430 to 0.490) | 32 |",
        "| KernelSHAP needs for the same error ↑ | 260 evaluations (210 to 320) | 32 |",
        "| Insertion ↑ | 0.800 (0.700 to 0.900) · random order 0.500 | 32 |",
        "| Time, over the plain forward pass ↓ | 1.040 times |  |",
        "3 epochs, 1,200 steps in 12 minutes on `CPU`",
        "`AI-Lab/beans`: 1,034 training images, 133 held-out images.",
        "KernelSHAP with 2,048 evaluations, its own error 0.05",
        'shapadapter.load("ada/leaves")',
        "Red speaks for the class below the map, blue with a dash against it",
        "![Attribution maps](explanations/explanation-1.png)",
        "arXiv:2512.14354",
    ):
        assert words in card, words
    assert updated(card, facts()) == card
    assert untouched(card)
    order = [
        card.index(head)
        for head in ("# leaves", "## What it sees", "## Use", "## Results", "## Training", "## Citation")
    ]
    assert order == sorted(order)


def test_a_card_names_the_level_of_its_pictures_and_how_to_get_the_others():
    card = updated(None, facts())
    assert "Their level: one forward pass." in card
    assert "with a backward pass" not in card
    assert '`explain(..., refine="gradient")`, a forward and a backward pass, and `refine=256`' in card
    evaluation = copy.deepcopy(RECORD["evaluation"])
    evaluation["methods"]["gradient"] = {"error": [0.31, 0.28, 0.34, 32]}
    picture = {"file": "explanation-1.png", "alt": "Maps", "level": "forward and backward pass"}
    card = updated(None, facts(evaluation=evaluation, pictures=[picture]))
    assert "Their level: forward and backward pass." in card
    assert "| ... with a backward pass, too ↓ | 0.310 (0.280 to 0.340) | 32 |" in card
    assert '`explain(..., refine="gradient")`, a forward and a backward pass (31% here), and' in card


def test_metadata_are_what_the_hub_reads():
    found = metadata_of(updated(None, facts()))
    assert found["base_model"] == "google/vit-base-patch16-224"
    assert (found["base_model_relation"], found["library_name"]) == ("adapter", "peft")
    assert (found["pipeline_tag"], found["license"]) == ("image-classification", "apache-2.0")
    assert {"shapadapter", "leaves", "lora", "base_model:adapter:google/vit-base-patch16-224"} <= set(found["tags"])
    assert found["datasets"] == ["AI-Lab/beans"]
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    metrics = {metric["type"]: metric for metric in result["metrics"]}
    assert entry["name"] == "leaves"
    assert metrics["accuracy"]["value"] == 0.917
    assert metrics["shapley_relative_error"]["args"] == {
        "images": 32,
        "removal": "drop",
        "truth": "kernel_shap",
        "truth_evaluations": 2048,
    }
    assert all(metric["verified"] is False for metric in result["metrics"])
    assert found["metrics"] == list(metrics)


def test_a_round_trip_through_the_client_is_no_edit():
    card = ModelCard(updated(None, facts()))
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "insertion_auc"}
    again = updated(card.content, facts())
    assert metadata_of(again) == metadata_of(card.content)
    assert untouched(card.content)


def test_where_nothing_is_known_the_card_says_so():
    card = updated(None, facts({**CONFIG, "record": None, "id2label": None}))
    assert "Nothing is measured yet" in card
    assert "shapadapter evaluate CHECKPOINT --data FOLDER" in card
    assert "not trained by `ShapleyTrainer`" in card
    assert "model-index" not in metadata_of(card)


def test_what_the_trainer_measured_stands_where_there_is_no_evaluation():
    values = {
        "eval_accuracy": 0.9,
        "eval_error": 0.5,
        "eval_equivalent_evaluations": 200.0,
        "eval_runtime": 1.0,
        "eval_f1": 0.8,
    }
    card = updated(None, facts(evaluation=None, metrics={"step": 40, "values": values, "evaluator_images": 16}))
    assert "| Accuracy ↑ | 0.900 | 133 |" in card
    assert "| Relative L2 error to the true Shapley values ↓ | 0.500 | 16 |" in card
    assert "| KernelSHAP needs for the same error ↑ | 200 evaluations | 16 |" in card
    assert "| `f1` | 0.800 | 133 |" in card
    assert "runtime" not in card
    assert "at step 40" in card


def test_of_many_classes_a_few_are_named():
    names = {str(index): f"class {index}" for index in range(1000)}
    card = updated(None, facts({**CONFIG, "id2label": names, "num_classes": 1000}))
    assert "**1,000 classes**: `class 0`, `class 1`" in card
    assert "and 988 more" in card
    assert "class 500" not in card


def test_paths_of_this_computer_are_not_told(tmp_path):
    base = tmp_path / "secret-user" / "base"
    base.mkdir(parents=True)
    card = updated(None, facts({**CONFIG, "base_model_name_or_path": str(base), "record": None}, name="out"))
    assert "secret-user" not in card
    assert "base_model" not in metadata_of(card)
    assert "`base`" in card


# -- hostile words ---------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """All tags and addresses of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses |= {value for key, value in attributes if key in ("href", "src")}
        assert not any(key.startswith("on") for key, _ in attributes), attributes


def filled_with(value, words):
    """The same structure with every text in it, and every name of a measure, method or setting, replaced."""
    if isinstance(value, dict):
        return {key: filled_with(one, words) for key, one in value.items()}
    if isinstance(value, list):
        return [filled_with(one, words) for one in value]
    return words if isinstance(value, str) else value


def test_hostile_words_do_nothing(tmp_path):
    markdown = pytest.importorskip("markdown_it")
    config = filled_with(CONFIG, EVIL)
    config |= {"prediction": "vote", "tune": "lora", "removal": "drop", "mechanism": "sequence"}
    record = config["record"]
    record["pictures"] = [
        {"file": "explanation-1.png", "alt": EVIL, "level": EVIL},
        {"file": "../../evil.png", "alt": ""},
    ]
    record["evaluation"]["methods"][EVIL] = {"error": [1.0, 0.0, 2.0, 3]}
    record["training"]["settings"][EVIL] = EVIL
    record["versions"][EVIL] = EVIL
    record["metrics"] = {"values": {EVIL: 1.0, f"eval_{EVIL}": 2.0}}
    for shown in (record, {**record, "evaluation": None}):
        card = updated(None, Facts({**config, "record": shown}, EVIL, None, ["explanation-1.png", "../../evil.png"]))
        card.encode()  # a lone surrogate could not be written
        found = metadata_of(card)
        assert "evil" not in str(found.get("license", "")).split("\n")[0][:4]
        assert not {"evil"} & set(found)
        body = card[card.index("\n---\n") + 5 :]
        page = Tags(markdown.MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").render(body))
        allowed = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "strong", "code", "pre", "ul", "li"}
        assert page.tags <= allowed | {"details", "summary", "img", "a", "em"}, page.tags
        assert page.addresses == {"explanations/explanation-1.png"}, page.addresses
        columns = {line.count("|") for line in section(card, "Results").split("\n") if line.startswith("|")}
        assert columns <= {4, 6}  # no bar of theirs ends a cell
        assert updated(card, Facts({**config, "record": shown}, EVIL, None, ["explanation-1.png"])) is not None
        assert len(re.findall("shapadapter:begin", card)) == 1
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        compile(code, "snippet", "exec")


RUBBISH = [None, 0, -1.5, "text", [], ["a"], {}, {"a": {"b": []}}, True, [[]], float("nan")]


@pytest.mark.parametrize("first", [0, 5])
def test_a_spoilt_record_cannot_stop_a_save(first):
    """Each place holds rubbish of two kinds, by turns of all."""
    turns = itertools.cycle(RUBBISH[first:] + RUBBISH[:first])

    def variants(value):
        yield next(turns)
        if isinstance(value, dict):
            for key, one in value.items():
                for other in variants(one):
                    yield {**value, key: other}
        if isinstance(value, list):
            yield [next(turns)] * 4

    for config in variants(CONFIG):
        if isinstance(config, dict):
            metadata_of(updated(None, Facts(config, "out", None, ["explanation-1.png"])))


# -- what survives ---------------------------------------------------------------------------------------------------

LATER = {"evaluation": {**EVALUATION, "task": {"accuracy": [0.5, 0.4, 0.6, 99]}}}


def test_words_around_the_block_stay_where_they_are():
    card = updated(None, facts())
    mine = (
        card.replace("<!-- shapadapter:begin", "My own words.\n\n<!-- shapadapter:begin") + "\n## Thanks\n\nTo all.\n"
    )
    again = updated(mine, facts(**LATER))
    assert "My own words.\n\n<!-- shapadapter:begin" in again
    assert again.endswith("\n## Thanks\n\nTo all.\n")
    assert "| Accuracy ↑ | 0.500 (0.400 to 0.600) | 99 |" in again
    assert "0.917" not in again
    assert not untouched(again)
    assert not edited(again)


def test_an_edited_block_is_the_user_s_until_it_is_emptied(tmp_path):
    card = updated(None, facts()).replace("## Data\n", "## Our leaves\n")
    assert updated(card, facts(**LATER)) != updated(None, facts(**LATER))
    (tmp_path / "README.md").write_text(card)
    with pytest.warns(UserWarning, match="between the marks .* was edited and is left as it is"):
        again = write_card(tmp_path, {**CONFIG, "record": {**RECORD, **LATER}})
    assert "## Our leaves" in again
    assert "0.917" in again
    emptied = re.sub(r"(begin card \w+ -->\n).*(<!-- shapadapter:end)", r"\1\2", again, flags=re.DOTALL)
    (tmp_path / "README.md").write_text(f"{emptied}\nTo all.\n")
    again = write_card(tmp_path, {**CONFIG, "record": {**RECORD, **LATER}})
    assert "0.917" not in again
    assert "0.500 (0.400 to 0.600)" in again
    assert again.endswith("To all.\n")


def test_a_deleted_block_does_not_come_back():
    card = updated(None, facts())
    mine = f"{card[: card.index('<!--')]}# Mine\n"
    assert updated(mine, facts(**LATER)).endswith("---\n\n# Mine\n")


@pytest.mark.parametrize("damage", ["end", "sign"])
def test_a_broken_mark_makes_the_block_the_user_s(damage):
    card = updated(None, facts())
    mark = "<!-- shapadapter:end card -->" if damage == "end" else re.search("<!-- shapadapter:begin.*?-->", card)[0]
    again = updated(card.replace(mark, ""), facts(data={"name": "others"}))
    assert "`AI-Lab/beans`" in again
    assert again.count("## Data") == 1
    assert "0.917" in again


# Of an earlier version, which had a pair of marks for each section, and its note of the metadata at the end.
SAVED_BEFORE = (Path(__file__).parent / "fixtures" / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_card_saved_before_becomes_one_block():
    assert untouched(SAVED_BEFORE)
    card = updated(f"{SAVED_BEFORE}\nMy words.\n", facts())
    assert card.count("<!-- shapadapter:begin") == card.count("<!-- shapadapter:end") == 1
    assert card.count("<!-- shapadapter:metadata") == 1
    assert re.search(r"<!-- shapadapter:end card -->\s+My words\.\s*$", card)
    assert [card.count(f"## {name}\n") for name in ("Use", "Results", "Citation")] == [1, 1, 1]
    assert "0.917" in card
    assert updated(card, facts()) == card
    assert metadata_of(card)["base_model"] == "google/vit-base-patch16-224"
    assert untouched(updated(SAVED_BEFORE, facts()))


def test_an_edited_section_of_a_card_saved_before_stays():
    mine = SAVED_BEFORE.replace("## Data\n", "## Our leaves\n").replace(
        "<!-- shapadapter:begin usage", "Words.\n\n<!-- shapadapter:begin usage"
    )
    card = updated(mine, facts())
    assert "## Our leaves" in card
    assert "Words." in card
    assert "shapadapter:begin data" not in card
    again = updated(card, facts(**LATER))
    assert "## Our leaves" in again
    assert "Words." in again
    assert "0.500 (0.400" in again


def test_line_ends_of_windows_stay_and_are_no_edit():
    card = updated(None, facts()).replace("\n", "\r\n")
    again = updated(card, facts(**LATER))
    assert "0.500 (0.400" in again
    assert "\n" not in again.replace("\r\n", "")


def test_the_user_s_metadata_stay_letter_by_letter():
    card = updated(None, facts())
    head = "# about the licence: ask Ada\nlicense: mit  # not apache\nlanguage: no\nmine:\n- {deep: [1, 2]}\nwhen: 2026-11-22\n"
    card = (
        card.replace("license: apache-2.0\n", head)
        .replace("- leaves\n", "- theirs\n")
        .replace("pipeline_tag: image-classification\n", "")
    )
    again = updated(card, facts(**LATER))
    assert head in again
    found = metadata_of(again)
    assert "pipeline_tag" not in found  # deleted by the user
    assert "theirs" in found["tags"]
    assert "leaves" not in found["tags"]
    assert found["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5


def test_what_is_no_longer_true_goes_from_the_metadata():
    card = updated(None, facts())
    moved = {**CONFIG, "base_model_name_or_path": "ada/other", "record": {**RECORD, "evaluation": None, "data": {}}}
    found = metadata_of(updated(card, facts(moved)))
    assert found["base_model"] == "ada/other"
    assert "base_model:adapter:google/vit-base-patch16-224" not in found["tags"]
    assert not {"datasets", "metrics", "model-index"} & set(found)


def test_of_the_model_index_only_our_entry_is_renewed():
    card = ModelCard(updated(None, facts())).content
    data = metadata_of(card)
    other = {"name": "theirs", "results": [{**copy.deepcopy(data["model-index"][0]["results"][0])}]}
    data["model-index"].append(other)
    body = card[card.index("\n---\n") + 5 :]
    again = metadata_of(updated(f"---\n{yaml.safe_dump(data)}---\n{body}", facts(**LATER)))["model-index"]
    assert [entry["name"] for entry in again] == ["theirs", "leaves"]
    assert again[0] == other
    data["model-index"][0]["results"][0]["dataset"]["name"] = "my leaves"
    again = metadata_of(updated(f"---\n{yaml.safe_dump(data)}---\n{body}", facts(**LATER)))["model-index"]
    assert again == data["model-index"]


def test_a_card_of_the_user_s_own_keeps_its_text():
    own = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nWords.\n"
    card = updated(own, facts())
    assert card.endswith("---\n\n# My model\n\nWords.\n")
    found = metadata_of(card)
    assert (found["license"], found["tags"]) == ("mit", ["mine"])
    assert found["base_model"] == "google/vit-base-patch16-224"
    assert updated(card, facts()) == card
    assert metadata_of(updated(own, facts(), ["asked"]))["tags"] == ["mine", "asked"]
    assert updated("# Only words\n", facts()).endswith("---\n# Only words\n")


def test_an_empty_form_is_no_card():
    form = ModelCard.from_template(ModelCardData(library_name="transformers", tags=["mine"]))
    form.text += "\n### Framework versions\n\n- PEFT 0.21.2"
    form.data.license = "mit"
    card = updated(form.content, facts())
    assert "More Information Needed" not in card
    found = metadata_of(card)
    assert (found["license"], found["library_name"]) == ("mit", "peft")
    assert "mine" in found["tags"]


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path):
    for given in (b"---\nlicense: [mit\n---\n# Mine\n", b"---\n- a\n---\n", b"\xff\xfe# Mine"):
        (tmp_path / "README.md").write_bytes(given)
        with pytest.warns(UserWarning, match="is left as it is"):
            assert write_card(tmp_path, CONFIG) is None
        assert (tmp_path / "README.md").read_bytes() == given


def test_tags_that_were_asked_for_stay_on_later_saves():
    card = updated(updated(None, facts(), ["asked"]), facts())
    assert "asked" in metadata_of(card)["tags"]


# -- files -----------------------------------------------------------------------------------------------------------


def test_only_pictures_that_exist_are_shown(tmp_path):
    config = {
        **CONFIG,
        "record": {**RECORD, "pictures": [{"file": f"explanation-{n}.png", "alt": ""} for n in (1, 2)]},
    }
    config["record"]["pictures"].append({"file": "../out.png", "alt": ""})
    (tmp_path / "explanations").mkdir()
    (tmp_path / "explanations" / "explanation-9.png").write_bytes(b"old")
    (tmp_path / "explanations" / "mine.png").write_bytes(b"mine")
    write_pictures(tmp_path, {"explanation-1.png": b"png", "../out.png": b"png"}, config["record"])
    card = write_card(tmp_path, config)
    assert re.findall(r"\]\((explanations/.*?)\)", card) == ["explanations/explanation-1.png"]
    assert {path.name for path in (tmp_path / "explanations").iterdir()} == {"explanation-1.png", "mine.png"}
    assert not (tmp_path / "out.png").exists()
    assert "explanation-2.png" in write_card(tmp_path, config, remote=["explanation-2.png"])


def test_a_crash_leaves_the_old_card(tmp_path, monkeypatch):
    write_card(tmp_path, CONFIG)
    before = (tmp_path / "README.md").read_bytes()
    monkeypatch.setattr("shapadapter.core.files.fsync_file", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_card(tmp_path, {**CONFIG, "r": 99})
    assert (tmp_path / "README.md").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_results_belong_to_weights(tmp_path):
    record = {"evaluation": EVALUATION, "training": {"steps": 3}, "weights": "a"}
    assert record_for(record, "a", tmp_path) == record
    assert record_for(record, None, tmp_path) == record
    assert record_for(record, "b", tmp_path) == {"training": {"steps": 3}, "weights": "b", "changed": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"record": record}))
    # What was added to the folder since these weights were saved there stays; of other weights it does not.
    assert record_for({"training": {"steps": 4}}, "a", tmp_path) == {**record, "training": {"steps": 4}}
    assert record_for({"training": {"steps": 4}}, "b", tmp_path) == {"training": {"steps": 4}, "weights": "b"}


def test_every_character_of_markdown_is_escaped_in_ordinary_text():
    assert escaped("a*b_c [d](e) `f` <g> | #h ~i!") == r"a\*b\_c \[d\](e) \`f\` &lt;g&gt; \| \#h \~i\!"
