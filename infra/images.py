"""Opening image files, which may come from anybody, and writing what was made of them in the form they had.

H height, W width, in pixels.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from infra.sixteen_bits import HOLDS_SIXTEEN, has_low_bytes, sixteen_bit_file, take_low_bytes

# What Pillow and its libraries decode within this process. EPS, for one, it hands to Ghostscript, a whole interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
STORED = ("JPEG", "PNG")  # in shards, and as what a model is sent
WITH_ALPHA = ("PNG", "WEBP", "TIFF", "GIF")
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; Pillow's own limit
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels"
# What Pillow raises on files that are not images, are cut off, or claim to be enormous.
DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class TooLarge(ValueError):
    """An image of more than MAX_PIXELS, which is not decoded."""


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
    """The first frame of an image file, given by its path or content. Raises one of DAMAGED for what cannot be read, and
    ValueError for 32-bit grey, whose range is unknown."""
    with _opened(file, formats) as image:
        format = image.format if image.format in FORMATS else "JPEG"  # a JPEG file may call itself MPO
        animated = format != "JPEG" and getattr(image, "is_animated", False)
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
        low = _low_bytes(file, formats) if has_low_bytes(image) else None
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            stored = np.repeat(np.asarray(image).astype(np.uint16)[:, :, None], 3, axis=2)
        elif low is not None:
            stored = np.asarray(image).astype(np.uint16) << 8 | low
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
        take_low_bytes(image)
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    if rgba.dtype == np.uint8:
        over = Image.alpha_composite(Image.new("RGBA", rgba.shape[1::-1], "white"), Image.fromarray(rgba))
        return np.asarray(over.convert("RGB"))
    share = rgba[:, :, 3:] / 65535
    return (65535 + (rgba[:, :, :3].astype(float) - 65535) * share).round().astype(np.uint16)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB with 8 bits a channel, transparency over white. ValueError for 32-bit gray, whose range is
    unknown."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit images have no agreed range of values")
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
