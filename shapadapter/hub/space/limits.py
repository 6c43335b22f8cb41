"""What strangers can make the app's machine take in and keep."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from shapadapter.core.errors import ImageError
from shapadapter.data.images import DECODING_ERRORS, open_image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000  # of a photograph as telephones take them; decoded, it needs 160 MB


def open_upload(path: Path) -> Image.Image:
    """Open a file that may be anything, as an upright RGB image.

    Only the decoders of `FORMATS` are tried, and none before the sizes are known. Messages name no path of the server.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ImageError(
            f"The file has {size / 2**20:.1f} MB, the most is {MAX_BYTES // 2**20} MB. Upload a smaller one."
        )
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"The image has {width} x {height} = {width * height / 1e6:.0f} million pixels, the most is "
                    f"{MAX_PIXELS / 1e6:.0f} million. Upload a smaller one."
                )
            file.load()
            return open_image(file)
    except Image.DecompressionBombError as error:
        raise ImageError(f"The image has far more than {MAX_PIXELS / 1e6:.0f} million pixels.") from error
    except ImageError:
        raise
    except (*DECODING_ERRORS, ValueError) as error:
        raise ImageError(
            "This file is not a PNG, JPEG or WebP image, or it is damaged. Upload another one."
        ) from error


MAX_REQUEST = MAX_BYTES + 2**20
"""Bytes of one request in all: an upload and what is around it, however many files it is cut into."""

MAX_SECONDS = 120.0  # for a request to arrive: so long there is room for it
MAX_DISK = 2**30  # bytes of uploads and pictures that are kept; the oldest go first
_BLOCK = 4096  # a file takes no less of a disk
_PICTURES = 4 * 2**20  # what the answer to one request may leave, in pictures
KEPT = 1800  # seconds after which an upload, its pictures and its explanation are gone
_IN_USE = 60.0  # seconds after which a file is no longer in use by the request that brought it

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Limits:
    """ASGI middleware of an app that counts what comes in, and makes room for it in the folder of uploads before it does."""

    def __init__(self, app: Any, folder: Path) -> None:
        self.app, self.folder = app, folder
        self.own = {path for path, *_ in _files(folder)}  # samples, which are there from the beginning
        self.used = self.awaited = 0
        self.looked = float("-inf")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, unless it is too large or there is no room."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif "=http" in scope["path"] or "process_recording" in scope["path"]:
            # Gradio would fetch pages of other servers for strangers, and convert their films.
            await PlainTextResponse("There is no such thing here.", 403)(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
        else:
            announced = dict(scope["headers"]).get(b"content-length", b"")
            size = int(announced) if announced.isdigit() and len(announced) < 20 else 0
            needed = (size or MAX_REQUEST) + _PICTURES
            if size > MAX_REQUEST:
                await PlainTextResponse(_TOO_LARGE, 413)(scope, receive, send)
            elif not self._has_room(needed):
                await PlainTextResponse(_FULL, 503)(scope, receive, send)
            else:
                self.awaited += needed
                try:
                    await self.app(scope, _counted(receive, size or MAX_REQUEST), send)
                finally:
                    self.awaited -= needed
                    self.used += needed  # until it is looked at

    def _has_room(self, needed: int) -> bool:
        """Whether there is room for a request, beside those that are on their way."""
        if self.used + self.awaited + needed > MAX_DISK or time.monotonic() > self.looked + _IN_USE:
            self.used = self._make_room(MAX_DISK // 2)
        return self.used + self.awaited + needed <= MAX_DISK

    def _make_room(self, most: int) -> int:
        """Delete what is too old, and the oldest files until the rest is so large at most; what the rest is then.

        Gradio deletes an upload when its time has come, but not what came of one that was broken off.
        """
        self.looked = time.monotonic()
        files = sorted(_files(self.folder), key=lambda file: file[1])
        used = sum(size for *_, size in files)
        for path, since, size in files:
            age = time.time() - since
            if age < _IN_USE or (used <= most and age < KEPT + _IN_USE):
                break
            if path not in self.own:
                with suppress(OSError):  # gradio has deleted it
                    path.unlink()
                    path.parent.rmdir()
                used -= size
        return used


def _counted(receive: Receive, most: int) -> Receive:
    """What brings the parts of a request, until they are more than they may be or take too long."""
    came, ends, complete = 0, time.monotonic() + MAX_SECONDS, False

    async def counted() -> Message:
        nonlocal came, complete
        if complete:  # what comes now is word that the visitor has left
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(ends - time.monotonic(), 0.001))
        except TimeoutError:
            raise HTTPException(408, f"A request may take {MAX_SECONDS:.0f} seconds to arrive.") from None
        came, complete = came + len(message.get("body", b"")), not message.get("more_body", False)
        if came > most:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return counted


_FULL = "There is no room for uploads now. Try it again in a minute."
_TOO_LARGE = f"A request may have {MAX_REQUEST // 2**20} MB in all."


def _files(folder: Path) -> list[tuple[Path, float, int]]:
    """All files below a folder, since when they are there, and how much of the disk they take."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gradio has deleted it
                about = (path := Path(place, name)).stat()
                found.append((path, about.st_mtime, max(about.st_size, _BLOCK)))
    return found
