"""The `shapadapter` command: a file for each of its commands."""

from shapadapter.cli.commands import app, main

__all__ = ["app", "main"]
