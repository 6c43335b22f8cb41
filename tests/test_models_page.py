"""The page on models says what wrapping finds."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.families
def test_the_page_is_up_to_date():
    page = runpy.run_path(str(DOCS / "models.py"))["render"]()
    assert (DOCS / "models.md").read_text(encoding="utf-8") == page, "run: python docs/models.py --write"
