"""Cards of others that are made to stop their reader: they cost little time, and stay as they are."""

import time

import pytest
from spaces import write_checkpoint

from shapadapter.hub import update_card
from shapadapter.hub.card.document import card_metadata, read_card, renewed, untouched
from shapadapter.hub.space import write_space

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}], k{n}: 1}}\n" for n in range(1, 40))
COUNT = 100_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize(
    ("yaml", "why"),
    [
        (LAUGHS, "aliases make it too large"),
        (MERGES, "aliases make it too large"),
        ("a: &a [*a]\n", "stands for itself"),
        ("a: &a {b: *a}\n", "stands for itself"),
        ("a: " + "[" * 20_000 + "\n", "nested more than 100 deep"),
        ("a:\n" + "- " * 20_000 + "\n", "recursion"),
        ("a: 'b'\n" * 20_000, "more than 50,000 characters"),
    ],
)
def test_yaml_that_grows_is_left_as_it_is(checkpoint, tmp_path, yaml, why):
    card = checkpoint / "README.md"
    text = f"---\nlicense: mit\n{yaml}---\n# Mine\n"
    card.write_text(text)
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=rf"README\.md is left as it is, because .*{why}"):
        update_card(checkpoint)
    assert card_metadata(checkpoint) == {}
    assert "license" not in (write_space(checkpoint, tmp_path / "space", copy_base=True) / "README.md").read_text()
    assert time.monotonic() - begin < 10
    assert card.read_text() == text


def test_anchors_are_no_bomb(checkpoint):
    card = checkpoint / "README.md"
    card.write_text("---\nx: &x [mit, bsd]\ny: [*x, *x]\nz: {<<: &m {a: 1}, b: *m}\nlicense: mit\n---\n# Mine\n")
    update_card(checkpoint)
    found = card_metadata(checkpoint)
    assert found["y"] == [["mit", "bsd"], ["mit", "bsd"]]
    assert found["z"] == {"a": 1, "b": {"a": 1}}
    assert (found["license"], found["library_name"]) == ("mit", "peft")


@pytest.mark.parametrize(
    "text",
    [
        "<!--" * COUNT,
        "<!--\n" * COUNT,
        "<!-- x -->" * COUNT,
        "<!-- shapadapter:metadata {" * (COUNT // 3),
        "<!-- shapadapter:metadata {x} " * (COUNT // 4),
        "<!-- shapadapter:begin summary 0123456789ab -->\n" * (COUNT // 6),
        "<!-- shapadapter:begin summary 0123456789ab -->\nx\n" * (COUNT // 6),
        "<!-- shapadapter:begin summary 0123456789ab -->\n" + "<!-- shapadapter:end other -->\n" * (COUNT // 4),
        "<!-- shapadapter:begin " + "a" * 8 * COUNT,
        "---\n" * COUNT,
        "### Framework versions\n" * (COUNT // 3),
    ],
)
def test_text_that_begins_and_does_not_end_takes_no_time(checkpoint, text):
    card = checkpoint / "README.md"
    card.write_text(f"# Mine\n{text}")
    begin = time.monotonic()
    update_card(checkpoint)
    untouched(text)
    renewed(text, "", {})
    assert time.monotonic() - begin < 5
    assert text.strip() in card.read_text()


def test_a_card_of_a_gigabyte_is_not_read(checkpoint):
    card = checkpoint / "README.md"
    with card.open("wb") as file:
        file.truncate(2**30)
    with pytest.warns(UserWarning, match="because it has more than 1,000,000 characters"):
        update_card(checkpoint)
    assert card.stat().st_size == 2**30
    assert len(read_card(card)) < 5_000_000
    card.unlink()


def test_comments_of_others_in_the_block_are_edits(checkpoint):
    card = checkpoint / "README.md"
    card.unlink(missing_ok=True)
    update_card(checkpoint)
    assert untouched(card.read_text())
    edited = card.read_text().replace("## Training", "## Training <!-- mine -->\n<!-- two\nlines -->")
    card.write_text(edited)
    with pytest.warns(UserWarning, match="was edited"):
        update_card(checkpoint)
    assert card.read_text() == edited
