"""The worst images of an evaluation, kept while it runs and drawn as one page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.samples import stack

TITLES = ("source", "translation", "predicted labels", "true labels", "true target")
LEAST_WIDTH = 256  # narrower pictures are enlarged, so that titles fit above them
# Pillow's built-in font lacks "→" and Greek; this one comes with matplotlib.
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@dataclass(frozen=True)
class _Case:
    index: int
    score: float
    caption: str
    source: np.ndarray
    translation: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray
    target: np.ndarray | None


class WorstImages:
    """Keeps the `count` images of the lowest scores; equal scores go by index, so neither the order of arrival nor the
    number of ranks changes which ones are kept.

    palette: uint8 (256, 3), the RGB colour of each label value.
    """

    def __init__(self, count: int, palette: np.ndarray) -> None:
        self.count, self.palette = count, palette
        self.cases: list[_Case] = []

    def update(
        self,
        index: int,
        score: float,
        caption: str,
        *,
        source: np.ndarray,
        translation: np.ndarray,
        predicted: np.ndarray,
        truth: np.ndarray,
        target: np.ndarray | None = None,
    ) -> None:
        """Offer one image.

        index: its place in the evaluated split. score: the lower, the worse. caption: one line of text.
        source, translation, target: uint8 (H, W, 3) RGB. predicted, truth: uint8 (H, W) labels.
        """
        self._keep_worst([_Case(index, score, caption, source, translation, predicted, truth, target)])

    def merge(self, other: "WorstImages") -> None:
        """Take in what another part of the images gave."""
        self._keep_worst(other.cases)

    def _keep_worst(self, cases: Sequence[_Case]) -> None:
        self.cases = sorted([*self.cases, *cases], key=lambda case: (case.score, case.index))[: self.count]

    def page(self) -> np.ndarray:
        """At least one image was added: uint8 (H', W', 3), the worst first, each a caption above its source,
        translation, predicted labels, true labels and, where there is one, true target."""
        rows = [self._pictures(case) for case in self.cases]
        width = rows[0][0].shape[1]
        text_size = max(14, width // 20)
        titles = TITLES[: max(len(row) for row in rows)]
        header = stack([_text(title, width, text_size) for title in titles], axis=1)
        parts = [header]
        for case, row in zip(self.cases, rows, strict=True):
            pictures = stack(row, axis=1)
            parts += [_text(case.caption, pictures.shape[1], text_size), pictures]
        return stack(parts, axis=0)

    def _pictures(self, case: _Case) -> list[np.ndarray]:
        pictures = [case.source, case.translation, self.palette[case.predicted], self.palette[case.truth]]
        if case.target is not None:
            pictures.append(case.target)
        factor = -(-LEAST_WIDTH // case.source.shape[1])
        return [picture.repeat(factor, axis=0).repeat(factor, axis=1) for picture in pictures]


def _text(text: str, width: int, size: int) -> np.ndarray:
    """A line of black text on white, uint8 (1.5 size, W, 3); W is at least `width` and all of the text."""
    font = ImageFont.truetype(FONT, size)
    image = Image.new("RGB", (max(width, int(font.getlength(text)) + 1), size * 3 // 2), "white")
    ImageDraw.Draw(image).text((0, size * 3 // 4), text, fill="black", font=font, anchor="lm")
    return np.asarray(image)
