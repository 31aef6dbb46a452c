"""Opening image files, which may come from anybody, and writing what was made of them in the form they had.

H height, W width, in pixels.
"""

import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from infra.orientation import turn_upright
from infra.sixteen_bits import HOLDS_SIXTEEN, has_low_bytes, low_bytes, mend_planes, sixteen_bit_file

# What Pillow and its libraries decode within this process. EPS, for one, it hands to Ghostscript, a whole interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
STORED = ("JPEG", "PNG")  # in shards, and as what a model is sent
WITH_ALPHA = ("PNG", "WEBP", "TIFF", "GIF")
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; Pillow's own limit
LARGEST = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535}  # pixels of a side that these can have
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels"
# What Pillow raises on files that are not images, are cut off, or claim to be enormous.
DAMAGED = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


class TooLarge(ValueError):
    """An image of more than MAX_PIXELS, which is not decoded."""


class UnknownRange(ValueError):
    """An image of 32 bits a pixel, of which nobody can say what is white."""


def open_image(file: Path | BytesIO, formats: tuple[str, ...] = FORMATS) -> ImageFile.ImageFile:
    """An image file, of which only the header is read yet. Nothing else in this project opens one.

    Raises one of DAMAGED for what is no image of these formats; TooLarge, which is a ValueError, by the header alone.
    """
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError:
        raise TooLarge(TOO_LARGE) from None
    if image.width * image.height > MAX_PIXELS:  # Pillow's own limit is a global variable, which other code may lift
        image.close()
        raise TooLarge(TOO_LARGE)
    mend_planes(image)
    return image


def format_of(name: str | Path) -> str | None:
    """The format, one of FORMATS, of files whose names end like this one; None for other names."""
    format = Image.registered_extensions().get(Path(name).suffix.lower())
    return format if format in FORMATS else None


@dataclass(frozen=True)
class Picture:
    """What an image file shows, upright as its EXIF orientation says.

    colours: RGB (H, W, 3), uint8, or uint16 where the file has 16 bits a channel. Grey files have three equal channels,
    transparent ones lie over white, as in training. alpha: (H, W) of the same type, None where there is none.
    format: one of FORMATS. profile: the ICC profile of its colours. animated: this is the first of several frames.
    """

    colours: np.ndarray
    alpha: np.ndarray | None = None
    format: str = "PNG"
    profile: bytes | None = None
    animated: bool = False


def read_picture(file: Path | bytes, formats: tuple[str, ...] = FORMATS) -> Picture:
    """The first frame of an image file, given by its path or content. Raises one of DAMAGED for what cannot be read, among them
    UnknownRange for 32-bit grey."""
    with _opened(file, formats) as image:
        format = image.format if image.format in FORMATS else "JPEG"  # a JPEG file may call itself MPO
        animated = format != "JPEG" and getattr(image, "is_animated", False)
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
        low = _low_bytes(file, formats) if has_low_bytes(image) else None
        turn_upright(image)
        if _is_sixteen_bit_grey(image):
            stored = np.repeat(np.asarray(image).astype(np.uint16)[:, :, None], 3, axis=2)
            stored = _with_key(stored, image.info.get("transparency"))
        elif low is not None:
            stored = np.asarray(image).astype(np.uint16) << 8 | low
            stored = _with_key(stored, image.info.get("transparency"))
        elif image.has_transparency_data:
            stored = np.asarray(image.convert("RGBA"))
        else:
            stored = np.asarray(to_rgb(image))
    if stored.shape[2] == 3:
        return Picture(stored, None, format, profile, animated)
    return Picture(_over_white(stored), stored[:, :, 3].copy(), format, profile, animated)


def _opened(file: Path | bytes, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    return open_image(BytesIO(file) if isinstance(file, bytes) else file, formats)


def _low_bytes(file: Path | bytes, formats: tuple[str, ...]) -> np.ndarray:
    with _opened(file, formats) as image:
        return low_bytes(image)


def _is_sixteen_bit_grey(image: Image.Image) -> bool:
    """In a PPM file, too, of which Pillow makes 32 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _with_key(colours: np.ndarray, key: int | tuple[int, ...] | None) -> np.ndarray:
    """uint16 colours with an alpha channel where one of them, if any, stands for what is transparent."""
    if key is None:
        return colours
    seen = (colours != key).any(axis=2, keepdims=True)
    return np.concatenate([colours, seen * np.uint16(65535)], axis=2)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    if rgba.dtype == np.uint8:
        over = Image.alpha_composite(Image.new("RGBA", rgba.shape[1::-1], "white"), Image.fromarray(rgba))
        return np.asarray(over.convert("RGB"))
    share = rgba[:, :, 3:] / 65535
    return (65535 + (rgba[:, :, :3].astype(float) - 65535) * share).round().astype(np.uint16)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB with 8 bits a channel, transparency over white. UnknownRange for 32-bit gray."""
    if _is_sixteen_bit_grey(image):
        return Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnknownRange("32 bits have no agreed range of values")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.uint8 else (values / 257).round().astype(np.uint8)


def picture_file(picture: Picture, quality: int = 95) -> bytes:
    """The bytes of a picture in its format. quality: of JPEG and WebP, 1 to 100.

    What the format cannot hold is left out: alpha in JPEG, BMP and PPM, 16 bits in all but PNG and TIFF. Of what the file
    said beside, the profile of its colours is kept.
    """
    layers = [picture.colours]
    if picture.alpha is not None and picture.format in WITH_ALPHA:
        layers.append(picture.alpha[:, :, None])
    values = np.concatenate(layers, axis=2)
    if values.dtype == np.uint16 and picture.format in HOLDS_SIXTEEN:
        return sixteen_bit_file(values, picture.format, picture.profile)
    buffer = BytesIO()
    options: dict[str, object] = {"quality": quality} if picture.format in ("JPEG", "WEBP") else {}
    if picture.format == "TIFF":
        options["compression"] = "tiff_adobe_deflate"
    Image.fromarray(eight_bits(values)).save(buffer, picture.format, icc_profile=picture.profile, **options)
    return buffer.getvalue()
