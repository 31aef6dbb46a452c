"""Images with 16 bits a channel and several channels, of which Pillow reads the upper 8 and writes none.

PNG: W3C, "Portable Network Graphics", sections 5, 9 and 11. TIFF: Adobe, "TIFF Revision 6.0", sections 2 and 8.
"""

import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ImageFile

from infra.orientation import turn_upright

HOLDS_SIXTEEN = ("PNG", "TIFF")
# How Pillow calls what it takes the first or the second byte of each number of, by what it calls the order of the bytes.
_OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_GREY_ALPHA = "LA;16B"
_SIXTEEN = ("RGB;16", "RGBA;16", "R;16", "G;16", "B;16", "A;16", _GREY_ALPHA[:-1])
_PLANES = ("R", "G", "B", "A")
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_PNG_COLOURS = {3: 2, 4: 6}  # the colour type of so many channels


def mend_planes(image: ImageFile.ImageFile) -> None:
    """Have a TIFF file of RGB whose channels lie one after the other, with 16 bits each, decode to the upper 8 of them: where it
    is not compressed, Pillow takes each byte for a pixel."""
    if image.format == "TIFF" and set(image.tag_v2.get(_BITS_PER_SAMPLE, ())) == {16}:  # type: ignore[attr-defined]
        order = "L" if image.tag_v2.prefix == b"II" else "B"  # type: ignore[attr-defined]
        _replace_ways(image, lambda way: f"{way};16{order}" if way in _PLANES else way)


def has_low_bytes(image: ImageFile.ImageFile) -> bool:
    """Whether an image that is not decoded yet is RGB or RGBA, or grey with alpha, with 16 bits a channel, of which Pillow takes
    the upper 8."""
    ways = [_raw_mode(tile.args) for tile in image.tile]
    return image.mode in ("RGB", "RGBA") and bool(ways) and all(way[:-1] in _SIXTEEN for way in ways)


def low_bytes(image: ImageFile.ImageFile) -> np.ndarray:
    """Of such an image the lower 8 bits of each number, (H, W, 3 or 4), turned upright as its EXIF orientation says."""
    grey = _raw_mode(image.tile[0].args) == _GREY_ALPHA
    # For grey with alpha Pillow knows no lower bytes; as four channels of 8 bits it gives all bytes of a pixel.
    _replace_ways(image, lambda way: "RGBA" if grey else way[:-1] + _OTHER[way[-1]])
    turn_upright(image)
    values = np.asarray(image)
    return values[:, :, [1, 1, 1, 3]] if grey else values


def _replace_ways(image: ImageFile.ImageFile, new: Callable[[str], str]) -> None:
    for number, tile in enumerate(image.tile):
        args: Any = tile.args
        way = new(_raw_mode(args))
        image.tile[number] = tile._replace(args=way if isinstance(args, str) else (way, *args[1:]))


def _raw_mode(args: Any) -> str:
    """Of what a tile says to its decoder."""
    return args if isinstance(args, str) else str(args[0] if args else "")


def sixteen_bit_file(values: np.ndarray, format: str, profile: bytes | None) -> bytes:
    """A PNG or TIFF file of uint16 (H, W, 3 or 4), RGB with or without alpha. profile: an ICC profile."""
    return _png(values, profile) if format == "PNG" else _tiff(values, profile)


def _png(values: np.ndarray, profile: bytes | None) -> bytes:
    height, width, channels = values.shape
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
    # Filter 1: each byte without that of the pixel before it, which is smaller when packed.
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1:] = rows
    filtered[:, 1 + 2 * channels :] -= rows[:, : -2 * channels]
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOURS[channels], 0, 0, 0)
    chunks = [_chunk(b"IHDR", header)]
    if profile:
        chunks.append(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
    chunks += [_chunk(b"IDAT", zlib.compress(filtered.tobytes())), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tiff(values: np.ndarray, profile: bytes | None) -> bytes:
    """One strip, deflated; the directory comes last."""
    height, width, channels = values.shape
    strip = zlib.compress(values.astype("<u2").tobytes())
    content = b"II*\0" + struct.pack("<I", 0) + strip

    def place(data: bytes) -> int:
        nonlocal content
        content += bytes(-len(content) % 2)  # what is pointed to begins at an even byte
        content += data
        return len(content) - len(data)

    short, long, undefined = 3, 4, 7
    bits = place(struct.pack(f"<{channels}H", *[16] * channels))
    entries = [
        (256, long, 1, width), (257, long, 1, height), (258, short, channels, bits), (259, short, 1, 8),
        (262, short, 1, 2), (273, long, 1, 8), (277, short, 1, channels), (278, long, 1, height), (279, long, 1, len(strip)),
    ]  # fmt: skip
    if channels == 4:
        entries.append((338, short, 1, 2))  # alpha that the colours were not multiplied with
    if profile:
        entries.append((34675, undefined, len(profile), place(profile)))
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    at = place(directory)
    return content[:4] + struct.pack("<I", at) + content[8:]
