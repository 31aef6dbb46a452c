"""What a replica does with requests: image files in, image files out. It knows neither HTTP nor Ray."""

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from infra.errors import UserError
from infra.images import DAMAGED, STORED, Picture, TooLarge, eight_bits, open_image, picture_file, read_picture
from pipelines.labels import CLASSES, colourise
from trainer.segmentation.segmenter import IGNORE, Segmenter
from trainer.translator import Translator

OPACITY = 160  # of the colour of a pixel whose class has changed, of 255
NAMED = 5  # pairs of classes that are named

Kind = Literal["translation", "flips"]


@dataclass(frozen=True)
class Job:
    """file: the bytes of a PNG or JPEG file. style: which of the styles or noises of N(0, 1), where the method has them."""

    kind: Kind
    file: bytes
    style: int = 0


@dataclass(frozen=True)
class Answer:
    """status: as of HTTP. body: an image file, or a sentence where the status is no 200. batch: images translated at once."""

    status: int
    body: bytes
    media_type: str = "text/plain; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)
    batch: int = 0


@dataclass(frozen=True)
class _Opened:
    place: int
    job: Job
    picture: Picture


class Work:
    """Translates jobs, those of one size together, but never more pixels at once than one image may have.

    max_pixels: of one image. segmenter: what flips are seen by.
    """

    def __init__(self, translator: Translator, max_pixels: int, segmenter: Segmenter | None = None) -> None:
        self.translator, self.max_pixels, self.segmenter = translator, max_pixels, segmenter

    def __call__(self, jobs: Sequence[Job]) -> list[Answer]:
        """An answer to each; a file that cannot be used spoils no other."""
        answers: dict[int, Answer] = {}
        groups: dict[tuple[tuple[int, ...], np.dtype], list[_Opened]] = {}
        for place, job in enumerate(jobs):
            try:
                opened = _Opened(place, job, self._opened(job.file))
                groups.setdefault((opened.picture.colours.shape, opened.picture.colours.dtype), []).append(opened)
            except UserError as error:
                answers[place] = refusal(error)
        for (shape, _), group in groups.items():
            at_once = max(1, self.max_pixels // (shape[0] * shape[1]))
            for first in range(0, len(group), at_once):
                answers |= self._translated(group[first : first + at_once])
        return [answers[place] for place in range(len(jobs))]

    def _opened(self, file: bytes) -> Picture:
        header_of(file, self.max_pixels).close()
        try:
            picture = read_picture(file, STORED)
        except DAMAGED:
            raise UserError("the file is damaged: send the whole of a PNG or JPEG file") from None
        self.translator.check_size(*picture.colours.shape[1::-1])
        return picture

    def _translated(self, group: Sequence[_Opened]) -> dict[int, Answer]:
        keys = [str(opened.job.style) for opened in group]
        translations = self.translator.each([opened.picture.colours for opened in group], keys)
        return {
            opened.place: self._answer(opened, translation, len(group))
            for opened, translation in zip(group, translations, strict=True)
        }

    def _answer(self, opened: _Opened, translation: np.ndarray, batch: int) -> Answer:
        picture = opened.picture
        if opened.job.kind == "translation":
            body = picture_file(dataclasses.replace(picture, colours=translation))
            return Answer(200, body, f"image/{picture.format.lower()}", batch=batch)
        assert self.segmenter is not None
        seen = [self.segmenter(eight_bits(each)) for each in (picture.colours, translation)]
        painted, share, pairs = overlay(*seen)
        found = json.dumps({"share": round(share, 4), "pairs": pairs})
        return Answer(200, _png(painted), "image/png", {"X-Flips": found}, batch)


def refusal(error: UserError, status: int = 422) -> Answer:
    return Answer(status, f"{error}\n".encode())


def header_of(file: bytes, max_pixels: int) -> Image.Image:
    """What a file's first bytes say. UserError for what is neither PNG nor JPEG, or too large to be decoded."""
    try:
        image = open_image(io.BytesIO(file), STORED)
    except TooLarge as error:
        raise UserError(f"the image has {error}: make it smaller") from None
    except DAMAGED:
        raise UserError("this is no PNG or JPEG file: send the bytes of one") from None
    if image.width * image.height > max_pixels:
        raise UserError(f"an image of {image.width}x{image.height} has more than the {max_pixels} pixels that are taken "
                        "here: make it smaller")  # fmt: skip
    return image


def _png(rgba: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def overlay(source: np.ndarray, translation: np.ndarray) -> tuple[np.ndarray, float, list[str]]:
    """Where a segmenter sees another class in the translation than in the source: uint8 RGBA (H, W, 4) in the colours of what it
    sees there now, transparent elsewhere; the share of such pixels, and the commonest pairs as "sky → vegetation 18.0 %".

    source, translation: its trainIds, uint8 (H, W).
    """
    changed = source != translation
    picture = np.dstack([colourise(translation), np.where(changed, OPACITY, 0).astype(np.uint8)])
    counts = Counter(zip(source[changed].tolist(), translation[changed].tolist(), strict=True))
    pairs = [
        f"{_name(before)} → {_name(after)} {100 * pixels / source.size:.1f} %"
        for (before, after), pixels in counts.most_common(NAMED)
    ]
    return picture, float(changed.mean()), pairs


def _name(trainid: int) -> str:
    return "none" if trainid == IGNORE else CLASSES[trainid]
