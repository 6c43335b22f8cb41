"""`shapadapter push`."""

from __future__ import annotations

from typing import Annotated

import typer

from shapadapter.cli.messages import reporting
from shapadapter.cli.options import OUTPUT, Config, Folder, Json

EXAMPLE = "shapadapter push out you/vit-beans --private"


def command(
    context: typer.Context,
    checkpoint: Folder,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, e.g. you/vit-beans.", show_default=False)],
    base_repo: Annotated[
        str | None,
        typer.Option(help="Repository for the base model, if it is a folder of your own; pushed beside it."),
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a repository that is made now.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.", rich_help_panel=OUTPUT)] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.", rich_help_panel=OUTPUT)] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", rich_help_panel=OUTPUT)] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Push an adapter to the Hub, with its card, pictures and processor.

    The token is that of `hf auth login`, or of the variable HF_TOKEN; it is never an option, where others could read it.
    """
    with reporting(context, json, "Run the command again: what was uploaded is not uploaded twice.") as say:
        from shapadapter.hub.upload import push

        url = push(
            checkpoint,
            repo,
            base_repo_id=base_repo,
            private=private,
            revision=revision,
            create_pr=pr,
            commit_message=message,
        )
        say({"url": url}, url)
