"""The commands in this process: what they say, and with which code they end."""

import re

from typer.testing import CliRunner

from shapadapter.cli import app

COMMANDS = ("demo", "train", "explain", "evaluate", "report", "export", "card", "push", "space", "inspect")


def run(*arguments, code=0):
    found = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))
    assert found.exit_code == code, f"{found.output}\n{found.exception!r}"
    return found


def error_of(*arguments, code=1) -> str:
    """What is said of an error, on the standard error alone and, if it is no usage, in one line."""
    found = run(*arguments, code=code)
    assert not found.stdout
    assert "Traceback" not in found.stderr
    if code == 1:
        (line,) = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
        return line
    return " ".join(re.sub("[│╭╮╰╯─]", " ", found.stderr).split())
