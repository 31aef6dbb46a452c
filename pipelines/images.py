"""Reading, resizing and encoding single images. An image is a PIL image in mode RGB, 8 bits a channel."""

import io
import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from infra.errors import UserError
from infra.images import DAMAGED, Picture, TooLarge, UnknownRange, format_of, open_image, read_picture, to_rgb
from infra.orientation import changes_sides, turn_upright


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, by extension, sorted by path; links are followed, but not those that lead back up.

    UserError if the folder does not exist or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist: check the path")
    paths, above = list[Path](), dict[str, frozenset[str]]()
    for root, folders, files in os.walk(folder, followlinks=True):
        here, before = os.path.realpath(root), above.get(os.path.dirname(root), frozenset())
        if here in before:
            folders.clear()
        else:
            above[root] = before | {here}
            paths += [Path(root) / file for file in files]
    images = sorted(path for path in paths if format_of(path))
    if not images:
        raise UserError(f"the folder {folder} holds no images: put some there, or check the path")
    return images


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) as `read_image` would return it, from the file's header alone. UserError if it is not an image."""
    try:
        with open_image(path) as image:
            return (image.height, image.width) if changes_sides(image) else image.size
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def stored_size(path: Path) -> tuple[int, int]:
    """(width, height) as an image is stored, before it is turned upright: of a PNG file `image_size` takes much longer, since
    its orientation may come last. UserError if it is not an image."""
    try:
        with open_image(path) as image:
            return image.size
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def encoded_size(encoded: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG or PNG file by its header; None if that is damaged. Takes a sixth of Pillow's time."""
    if encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[12:16] == b"IHDR" and len(encoded) >= 33:
        width, height = struct.unpack_from(">II", encoded, 16)
        return width, height
    size, place = None, 2 if encoded[:2] == b"\xff\xd8" else len(encoded)
    while place + 9 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker == 0xDA:  # start of the scan: the header ends
            return size
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of the frame
            height, width = struct.unpack_from(">HH", encoded, place + 5)
            size = width, height
        place += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    return None


def read_image(path: Path) -> Image.Image:
    """The first frame of an image file as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is laid over white, 16-bit gray is scaled down to 8 bits. UserError names a file that is not an image.
    """
    try:
        with open_image(path) as image:
            turn_upright(image)
            return to_rgb(image)
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def picture_of(path: Path) -> Picture:
    """The first frame of an image file with its depth and transparency, upright. UserError as `read_image`."""
    try:
        return read_picture(path)
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def read_stored(path: Path) -> np.ndarray:
    """A label file as it is stored: (H, W) of ids or palette indices, or (H, W, 3 or 4) of colours."""
    try:
        with open_image(path) as image:
            return np.asarray(image)
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    if not path.exists():
        return UserError(f"the file {path} does not exist: check the path")
    if isinstance(error, TooLarge):
        return UserError(f"{path} is too large ({error}): make it smaller, or remove it")
    if isinstance(error, UnknownRange):
        return UserError(f"{path} is no picture ({error}): convert it to 8 or 16 bits, or remove it")
    return UserError(f"{path} cannot be read as an image ({type(error).__name__}): repair or remove it")


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at (width, height) in pixels, bicubic with Pillow's anti-aliasing, as CUT resizes."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A uint8 (H, W) label map at (width, height) in pixels, by nearest neighbour."""
    return np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))


def multiple_of(image: Image.Image, base: int = 4) -> Image.Image:
    """The image with width and height rounded to the nearest multiples of `base`, bicubic (CUT's preprocess "none").

    A half rounds to the even multiple, as Python rounds; no side becomes smaller than `base`.
    """
    width, height = (max(base, round(side / base) * base) for side in image.size)
    return resize(image, (width, height))


def to_array(image: Image.Image) -> np.ndarray:
    """RGB image to float32 (3, H, W) in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    array_HWC = np.asarray(image, np.float32)
    return np.ascontiguousarray(((array_HWC / 255 - 0.5) / 0.5).transpose(2, 0, 1))


def encode(image: Image.Image, format: str, quality: int = 95) -> bytes:
    """The bytes of a "jpg" (quality 1 to 100) or of a lossless "png" file."""
    buffer = io.BytesIO()
    if format == "jpg":
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from "WIDTHxHEIGHT" in pixels. UserError if it is anything else."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < int(width) <= 16384 and 0 < int(height) <= 16384):
        raise UserError(f"{text!r} is not an image size: write WIDTHxHEIGHT in pixels, for example 512x256")
    return int(width), int(height)
