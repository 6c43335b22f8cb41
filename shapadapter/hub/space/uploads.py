"""What strangers upload: looked at here, whatever their browser let through."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from shapadapter.errors import ImageError
from shapadapter.images import DECODING_ERRORS, open_image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
"""Of a photograph as telephones take them; decoded, it needs 160 MB."""


def open_upload(path: Path) -> Image.Image:
    """Open a file that may be anything, as an upright RGB image.

    Only the decoders of `FORMATS` are tried, and none before the sizes are known. Messages name no path of the server.

    Args:
        path: of the uploaded file.

    Raises:
        ImageError: it is too large, or not an image of these formats.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ImageError(
            f"The file has {size / 2**20:.1f} MB, the most is {MAX_BYTES // 2**20} MB. Upload a smaller one."
        )
    try:
        with Image.open(path, formats=FORMATS) as file:
            _check_pixels(*file.size)
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


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"The image has {width} x {height} = {width * height / 1e6:.0f} million pixels, the most is "
            f"{MAX_PIXELS / 1e6:.0f} million. Upload a smaller one."
        )
