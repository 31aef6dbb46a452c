"""Files that only look like images, or claim to be enormous, and what opens them."""

import io
import re
import zlib
from pathlib import Path

import pytest
from PIL import Image

from infra.images import DAMAGED, FORMATS, TooLarge, open_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n"  # never ends


def bomb(side: int) -> bytes:
    """A black PNG file of a thousandth of its pixels in bytes, or less."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # one bit a pixel
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_no_format_is_opened_that_needs_another_program(tmp_path: Path) -> None:
    with Image.open(io.BytesIO(EPS)) as image:
        assert image.format == "EPS"  # it is one, for whoever opens everything
    path = tmp_path / "photo.jpg"
    path.write_bytes(EPS)
    with pytest.raises(DAMAGED):
        open_image(path)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_that_is_named_can_be_had(format: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, format)
    assert open_image(file).size == (4, 3)


@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_too_many_pixels_are_refused_by_the_header(pillow_limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    with pytest.raises(TooLarge, match="more than 178 million pixels"):
        open_image(io.BytesIO(bomb(14000)))
    if pillow_limit is None:  # with a limit Pillow warns of half of it
        assert open_image(io.BytesIO(bomb(12000))).size == (12000, 12000)


def test_one_function_opens_images() -> None:
    root = Path(__file__).parents[2]
    folders = ("infra", "pipelines", "trainer", "launch", "tuning")
    files = [path for name in folders for path in (root / name).rglob("*.py")]
    opening = re.compile(r"Image\.open\(")
    assert [path.name for path in files if opening.search(path.read_text())] == ["images.py"]
