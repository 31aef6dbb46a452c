"""What `mlflow.pyfunc.load_model` and `mlflow models serve` call: a trained network that takes images in several forms."""

import base64
import binascii
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
from mlflow import MlflowException
from PIL import Image

from infra.errors import UserError
from infra.images import DAMAGED, STORED, open_image
from infra.orientation import turn_upright
from trainer.checkpoint import NETWORK

Apply = Callable[[np.ndarray], np.ndarray]

MODES = ("L", "P", "RGB")  # of Pillow: 8 bits a channel without transparency


class ImageModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """load: makes of a checkpoint folder what is applied to one image, uint8 RGB (H, W, 3); such as `load_translator`. A
    function of this package, so that the pickled model refers to it by name."""

    def __init__(self, load: Callable[[Path], Apply]) -> None:
        self.load = load

    def load_context(self, context: Any) -> None:
        self.apply = self.load(Path(context.artifacts[NETWORK]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """One image (H, W, 3) or several (N, H, W, 3), whole numbers in 0..255, to uint8 arrays of what `load` made of
        each; or N base64 texts of PNG or JPEG files, of any sizes, to N base64 texts of PNG files.

        MlflowException (HTTP status 400) with a sentence for anything else.
        """
        given = np.asarray(model_input)
        try:
            if given.size and all(isinstance(item, str) for item in given.flat):
                return np.array([encoded(self.apply(decoded(text))) for text in given.flat], dtype=object)
            images = _as_uint8(given)
            return np.stack([self.apply(image) for image in images]) if images.ndim == 4 else self.apply(images)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


def _as_uint8(given: np.ndarray) -> np.ndarray:
    """Lists of JSON arrive as arrays of objects."""
    try:
        images = np.asarray(given.tolist()) if given.dtype == object else given
    except ValueError:  # lists of different lengths
        images = given
    whole = images.size > 0 and images.dtype.kind in "iu" and images.min() >= 0 and images.max() <= 255
    if not whole or images.ndim not in (3, 4):
        raise UserError(f"an input of type {images.dtype} and shape {images.shape} is no RGB image: give whole numbers in "
                        "0..255 of shape (H, W, 3) or (N, H, W, 3), or base64 texts of PNG or JPEG files")  # fmt: skip
    return images.astype(np.uint8)


def decoded(text: str) -> np.ndarray:
    """The uint8 RGB (H, W, 3) image of a PNG or JPEG file in base64, upright as its EXIF orientation says. UserError for
    anything else."""
    try:
        with open_image(io.BytesIO(base64.b64decode(text, validate=True)), STORED) as image:
            if image.mode not in MODES:
                raise UserError(f"an image of mode {image.mode} cannot be used: give 8 bits a channel, grey or RGB, "
                                "without transparency")  # fmt: skip
            turn_upright(image)
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except (binascii.Error, *DAMAGED):
        raise UserError(f"the text {text[:20]!r}… is no PNG or JPEG file in base64: encode the file's bytes") from None


def encoded(image: np.ndarray) -> str:
    """A PNG file in base64 of uint8 RGB (H, W, 3) or of labels (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
