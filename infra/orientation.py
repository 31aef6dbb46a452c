"""Turning images upright, as their EXIF orientation says.

Pillow's reader of EXIF raises errors of many kinds where that is damaged. The pixels are not, so such an image stays as it is
stored, which is what browsers show.
"""

import logging

from PIL import Image, ImageOps

log = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # the tag
_TURNED = (5, 6, 7, 8)  # its values by which width and height change places


def turn_upright(image: Image.Image) -> None:
    """Decode the image and turn it. Errors are those of its pixels alone."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:
        log.debug("an EXIF orientation that cannot be read: %r", error)


def changes_sides(image: Image.Image) -> bool:
    """Whether `turn_upright` exchanges width and height."""
    try:
        return image.getexif().get(_ORIENTATION) in _TURNED
    except Exception as error:
        log.debug("an EXIF orientation that cannot be read: %r", error)
        return False
