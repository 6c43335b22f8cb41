"""Small files that unpack to more than a machine can hold."""

import struct
import zlib

import pytest
from PIL import Image

from shapadapter.core.errors import ImageError, UnreadableImageError
from shapadapter.data.images import open_image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(b"\0" * min(height * (3 * width + 1), 10_000))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_too_many_pixels_name_the_file_and_the_remedy(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000))
    with pytest.raises(UnreadableImageError, match=r"bomb\.png.*900000000 pixels.*MAX_IMAGE_PIXELS"):
        open_image(tmp_path / "bomb.png")


def test_the_remedy_works(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(png(50, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="MAX_IMAGE_PIXELS"):
        open_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert open_image(tmp_path / "large.png").size == (50, 60)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_texts_and_profiles_that_unpack_to_too_much(kind):
    bomb = chunk(kind, b"a\0\0" + zlib.compress(b"x" * (1 << 26)))
    with pytest.raises(UnreadableImageError, match="Decompressed data too large"):
        open_image(png(4, 4, bomb))


def test_an_image_in_letters_is_not_quoted_at_length():
    with pytest.raises(ImageError, match="data:image/png") as caught:
        open_image("data:image/png;base64," + "A" * 5_000)
    assert len(str(caught.value)) < 1000
