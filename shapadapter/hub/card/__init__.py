"""The model card, and the registration of this room with those below it, which save adapters and upload them.

Imported as soon as the adapter is, so it imports little itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapadapter.adapter.saving import register_publisher


class _HubPublisher:
    """See `shapadapter.adapter.saving.Publisher`."""

    def write_card(self, folder: Path, config: Mapping[str, Any], tags: Sequence[str] = ()) -> str | None:
        from shapadapter.hub.card.renewal import write_card

        return write_card(folder, config, tags=tags)

    def prepare_upload(self, model: Any, folder: Path, repo_id: str, revision: str | None, token: Any) -> None:
        from shapadapter.hub.card.renewal import prepare_upload

        prepare_upload(model, folder, repo_id, revision, token)

    def copy_files(self, folder: Path, target: Path, patterns: Sequence[str], link: bool = False) -> None:
        from shapadapter.hub.upload import copy_files

        copy_files(folder, target, patterns, link)

    def upload(self, folder: Path, repo_id: str, **options: Any) -> Any:
        from shapadapter.hub.upload import upload

        return upload(folder, repo_id, **options)


register_publisher(_HubPublisher())
