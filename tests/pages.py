"""The code blocks of README and documentation."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Block:
    """One fenced block: the language named at its fence, its code without indentation, and where it begins."""

    page: str
    language: str
    code: str
    line: int

    def __str__(self):
        return f"{self.page}:{self.line}"


def pages():
    """README and everything under docs, as paths from the root of the repository."""
    found = [path.relative_to(ROOT) for path in DOCS.rglob("*.md") if "_build" not in path.parts]
    return ["README.md", *sorted(path.as_posix() for path in found)]


def blocks(page, *languages):
    """The blocks of a page (a path from the root), of these languages or of all."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^( *)```([\w{}-]*)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        block = Block(page, match[2], textwrap.dedent(match[3]), text.count("\n", 0, match.start()) + 1)
        if not languages or block.language in languages:
            found.append(block)
    return found


def run(page, names, here=None, skip=()):
    """Execute the Python blocks of a page, in order and in one namespace.

    Args:
        page: a path from the root.
        names: the namespace, with what the page takes for granted.
        here: replacements that make the example small; one that no longer applies is an error.
        skip: blocks that hold one of these words stay out.
    """
    chosen = [block for block in blocks(page, "python") if not any(word in block.code for word in skip)]
    for old in here or {}:
        assert any(old in block.code for block in chosen), f"{page} no longer says {old}"
    for block in chosen:
        code = block.code
        for old, new in (here or {}).items():
            code = code.replace(old, new)
        # Empty lines in front, so that an error names the line of the page.
        exec(compile("\n" * block.line + code, page, "exec"), names)
    return names
