"""Opening image files, which may come from anybody."""

from io import BytesIO
from pathlib import Path

from PIL import Image

# What Pillow and its libraries decode within this process. EPS, for one, it hands to Ghostscript, a whole interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
STORED = ("JPEG", "PNG")  # in shards, and as what a model is sent
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; Pillow's own limit
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels"
# What Pillow raises on files that are not images, are cut off, or claim to be enormous.
DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class TooLarge(ValueError):
    """An image of more than MAX_PIXELS, which is not decoded."""


def open_image(file: Path | BytesIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
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
