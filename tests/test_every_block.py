"""Every code block of README and documentation is run by a test, or named here with the reason; every link leads somewhere."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pages
import pytest

TESTS = Path(__file__).parent

PYTHON = {
    "README.md": "test_pages_that_run.py",
    "docs/add-a-family.md": "test_register_family.py",
    "docs/add-a-figure.md": "test_pages_that_run.py",
    "docs/add-a-metric.md": "test_pages_that_run.py",
    "docs/compare-methods.md": "test_compare_methods_page.py",
    "docs/concepts/removal-operators.md": "test_pages_that_run.py",
    "docs/deploy.md": "test_deploy_page.py",
    "docs/evaluate.md": "evaluation/test_evaluate_page.py",
    "docs/faq.md": "test_pages_that_run.py",
    "docs/figures.md": "test_pages_that_run.py",
    "docs/get-started.md": "test_pages_that_run.py",
    "docs/index.md": "test_pages_that_run.py",
    "docs/match-texts.md": "test_match_texts_page.py",
    "docs/model-card.md": "test_model_card_page.py",
    "docs/page.md": "test_pages_that_run.py",
    "docs/read-attributions.md": "test_pages_that_run.py",
    "docs/reference.md": "test_pages_that_run.py",
    "docs/share.md": "hub/test_share_page.py",
    "docs/space.md": "test_space_page.py",
    "docs/train-at-scale.md": "test_pages_that_run.py",
    "docs/tutorials/audit-a-cheater.md": "test_audit_page.py",
    "docs/tutorials/clip-texts.md": "test_tutorials.py",
    "docs/tutorials/cnn.md": "test_tutorials.py",
    "docs/tutorials/existing-classifier.md": "test_tutorials.py",
    "docs/tutorials/from-the-hub.md": "hub/test_from_the_hub_page.py",
    "docs/tutorials/your-own-folder.md": "test_tutorials.py",
    "docs/vote-or-classifier.md": "test_pages_that_run.py",
}
"""The test that executes the Python blocks of a page, in order."""

NOT_RUN = {
    ("docs/train-at-scale.md", "BitsAndBytesConfig"): "8 and 4 bits are run by test_quantised.py; this is parsed",
    (
        "docs/train-at-scale.md",
        "torchvision",
    ): "torchvision is no dependency of the tests; Augmented is run by test_mixing.py",
    ("docs/train-at-scale.md", "albumentations"): "albumentations is no dependency of the tests",
}
"""Python blocks that no test executes: a page, a word of the block, and why. They are parsed."""

SHELL = {
    r"pip install ": "installs; .ci/run installs the package with its extras, which are looked up here",
    r"apt-get install ": "needs a network and root",
    r"export |cd |git ": "belongs to the shell",
    r"pre-commit |ruff |mypy|lint-imports|sphinx-build|pytest": "a developer's tool; .ci/run calls it",
    r"\.ci/run": "is the CI",
    r"hf auth login": "asks for a token",
    r"shapadapter ": "its words are parsed here; tests/cli runs the commands",
    r"python examples/audit.py": "test_audit_page.py runs it",
    r"python examples/benchmarks/": "minutes to hours; the script's options are looked up here",
    r"(\w+=\S+ )?(python|accelerate launch|torchrun)\b.* ?examples/": "run by the tests of the examples; options are looked up here",
    r"python space/app.py": "waits for visitors; test_space_browser.py runs it",
    r"python docs/models.py": "test_models_page.py runs it",
}
"""What a line in a shell block may begin with, and why it is not run as it stands."""


def blocks(*languages):
    return [block for page in pages.pages() for block in pages.blocks(page, *languages)]


def commands(block):
    """The lines of a shell block: continued ones joined, without comments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    parts = [shlex.join(shlex.split(line, comments=True)).replace("'&&'", "&&") for line in lines]
    return [part.strip() for line in parts for part in line.split(" && ") if part.strip()]


# -- Python -----------------------------------------------------------------------------------------------------------


def test_every_python_block_is_run_or_has_a_reason():
    homeless = [str(block) for block in blocks("python") if block.page not in PYTHON]
    assert not homeless, f"no test runs {homeless}: write one with pages.run, and name it in PYTHON"
    left_out = dict.fromkeys(NOT_RUN, 0)
    for block in blocks("python"):
        ast.parse(block.code, filename=str(block))
        for page, word in NOT_RUN:
            left_out[page, word] += block.page == page and word in block.code
    assert all(count == 1 for count in left_out.values()), left_out


def test_the_tests_named_do_run_their_pages():
    assert {block.page for block in blocks("python")} == set(PYTHON), "a page is gone, or has no Python any more"
    for page, test in PYTHON.items():
        text = (TESTS / test).read_text(encoding="utf-8")
        assert Path(page).stem in text, f"{test} does not speak of {page}"
        assert "exec(" in text or f'pages.run("{page}"' in text, f"{test} executes nothing of {page}"
        skipped = {word for named, word in NOT_RUN if named == page}
        assert all(f'"{word}"' in text for word in skipped)


def test_blocks_say_their_language():
    """Else nobody would know that there is something to run."""
    known = {"python", "bash", "text", "yaml", "json", "html", "toml", "bibtex", "{toctree}", "{eval-rst}"}
    assert not {f"{block}: {block.language!r}" for block in blocks() if block.language not in known}


# -- shell ------------------------------------------------------------------------------------------------------------


def test_every_shell_block_is_bash_and_each_line_has_a_reason():
    for block in blocks("bash"):
        checked = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, f"{block}: {checked.stderr}"
        for line in commands(block):
            assert any(re.match(start, line) for start in SHELL), f"{block}: no reason is known for: {line}"


def test_every_command_line_parses():
    from typer.main import get_command

    from shapadapter.cli import app

    known = get_command(app).commands
    lines = [(str(block), line) for block in blocks("bash") for line in commands(block)]
    parsed = 0
    for where, line in lines:
        program, *words = shlex.split(line)
        words = [word for word in words if word != "..."]
        if program != "shapadapter" or words[0].startswith("--"):
            continue
        assert words[0] in known, f"{where}: there is no command {words[0]!r}"
        if "--config" not in words:
            known[words[0]].make_context(words[0], words[1:])
            parsed += 1
    assert parsed > 20


def test_the_scripts_and_options_of_every_command_exist():
    from shapadapter.training.script import parser

    options = {option for action in parser()._actions for option in action.option_strings}
    extras = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\n", (pages.ROOT / "pyproject.toml").read_text(), re.S
    )
    for block in blocks("bash"):
        for line in commands(block):
            for name in re.findall(r"(?<![\w/])(examples/[\w./-]+|docs/[\w./-]+\.py)", line):
                assert (pages.ROOT / name).exists(), f"{block}: {name} is gone"
            for extra in re.findall(r"(?:shapadapter|\.)\[([\w,]+)\]", line):
                assert all(f"\n{one} = " in f"\n{extras[1]}" for one in extra.split(",")), f"{block}: extra {extra}"
            script = re.search(r"(examples/[\w/]+\.py)(.*)", line)
            if script is None:
                continue
            source = (pages.ROOT / script[1]).read_text(encoding="utf-8")
            for option in re.findall(r"(?<=\s)--[\w-]+", script[2]):
                known = option in options if script[1] == "examples/finetune.py" else f'"{option}"' in source
                assert known, f"{block}: {script[1]} has no {option}"


# -- links ------------------------------------------------------------------------------------------------------------


def prose(page):
    return re.sub(r"^( *)```.*?^\1```", "", (pages.ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)


def links(page):
    return re.findall(r"\]\(([^()\s]+)\)", prose(page))


def anchors(path):
    """As GitHub and myst make them."""
    found = set()
    for title in re.findall(r"^#+ (.*)", prose(path.relative_to(pages.ROOT)), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        found.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [*pages.pages(), "examples/README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_inside_the_repository_lead_somewhere(page):
    if not (pages.ROOT / page).exists():
        pytest.skip(f"there is no {page}")
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            # Not asked for: tests have no network. What can be seen offline is whether it is one that may be followed.
            assert re.match(r"https://[\w.-]+\.\w+(/|$)|mailto:", link), f"{page}: {link}"
            continue
        name, _, anchor = link.partition("#")
        target = (pages.ROOT / page).parent / name if name else pages.ROOT / page
        assert target.exists(), f"{page}: there is no {link}"
        if anchor:
            assert anchor in anchors(target.resolve()), f"{page}: there is no section {link}"


def test_the_reference_names_everything_public():
    import shapadapter
    from shapadapter import hub, metrics, visual
    from shapadapter.hub import space

    overview, api = ((pages.DOCS / name).read_text(encoding="utf-8") for name in ("reference.md", "api.md"))
    named = set(re.findall(r"`(?:\w+\.)*(\w+)`", overview))
    missing = {name for name in shapadapter.__all__ if not name.startswith("__")} - named
    assert not missing, f"docs/reference.md does not name {sorted(missing)}"
    documented = set(re.findall(r"auto\w+:: (?:\w+\.)*(\w+)", api))
    missing = {name for name in shapadapter.__all__ if not name.startswith("__")} - documented
    for room in (metrics, hub, space, visual):
        if f"automodule:: {room.__name__}\n   :members:\n   :imported-members:" not in api:
            missing |= set(room.__all__) - documented
    assert not missing, f"docs/api.md does not document {sorted(missing)}"
