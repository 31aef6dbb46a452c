"""What a replica does with image files, from anybody."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.images import Picture, picture_file
from launch.serving.work import Answer, Job, Work, overlay
from tests.infra.test_images import bomb
from tests.trainer.small import method_config
from trainer.translation import OneGenerator, Translation
from trainer.translator import Translator

PIXELS = 64 * 64


def picture(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(image: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def pixels_of(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    return np.asarray(Image.open(io.BytesIO(answer.body)))


def translation(name: str = "cut") -> Translation:
    torch.manual_seed(0)
    return method_config(name).translation().eval()


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator(translation())


def test_files_come_back_in_their_format_and_size(translator: Translator) -> None:
    work = Work(translator, PIXELS)
    for size in ((12, 20), (13, 7)):
        for format in ("PNG", "JPEG"):
            file = file_of(picture(*size), format)
            (answer,) = work([Job("translation", file)])
            assert (
                answer.media_type == f"image/{format.lower()}" and Image.open(io.BytesIO(answer.body)).format == format
            )
            expected = translator(np.asarray(Image.open(io.BytesIO(file))))
            assert answer.body == picture_file(Picture(expected, format=format))


def test_a_picture_that_was_turned_is_answered_upright(translator: Translator) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (answer,) = Work(translator, PIXELS)([Job("translation", file_of(picture(12, 20), "JPEG", exif=exif))])
    assert pixels_of(answer).shape == (20, 12, 3)


def test_images_of_one_size_go_together_but_never_more_pixels_than_one_may_have(translator: Translator) -> None:
    images = [picture(12, 20, seed) for seed in range(5)] + [picture(8, 8)]
    jobs = [Job("translation", file_of(image)) for image in images]
    for most, batches in ((PIXELS, [5, 5, 5, 5, 5, 1]), (2 * 240 + 1, [2, 2, 2, 2, 1, 1])):
        answers = Work(translator, most)(jobs)
        assert [answer.batch for answer in answers] == batches
        for image, answer in zip(images, answers, strict=True):
            assert np.abs(pixels_of(answer).astype(int) - translator(image)).max() <= 1


def test_a_file_that_cannot_be_used_spoils_no_other(translator: Translator) -> None:
    good = file_of(picture())
    bad = {
        good[:60]: "damaged: send the whole",
        b"hello": "no PNG or JPEG file",
        b"": "no PNG or JPEG file",
        file_of(picture(), "BMP"): "no PNG or JPEG file",
        file_of(picture(65, 64)): "64x65 has more than the 4096 pixels",
        file_of(picture(4, 8)): "8x4 is too small",
    }
    answers = Work(translator, PIXELS)([Job("translation", file) for file in (good, *bad, good)])
    assert np.array_equal(pixels_of(answers[0]), translator(picture()))
    assert answers[-1].body == answers[0].body
    for answer, words in zip(answers[1:-1], bad.values(), strict=True):
        assert answer.status == 422 and words in answer.body.decode() and answer.batch == 0


def test_a_bomb_is_known_by_its_header(translator: Translator) -> None:
    (answer,) = Work(translator, PIXELS)([Job("translation", bomb(20000))])
    assert answer.status == 422 and b"the image has more than 178 million pixels: make it smaller" in answer.body


def test_a_style_is_the_same_picture_wherever_it_is_asked_for() -> None:
    work = Work(Translator(translation("munit")), PIXELS)
    file = file_of(picture(32, 32))
    jobs = [Job("translation", file, style) for style in (0, 1, 0)]
    together = [pixels_of(answer) for answer in work(jobs)]
    alone = [pixels_of(work([job])[0]) for job in jobs]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert np.array_equal(together[0], together[2]) and not np.array_equal(together[0], together[1])


class Painted(OneGenerator):
    """White below, black above."""

    def forward(self, x_NCHW: torch.Tensor, code: torch.Tensor | None = None, direction: str = "AtoB") -> torch.Tensor:
        y = torch.full_like(x_NCHW, -1.0)
        y[:, :, x_NCHW.shape[2] // 2 :] = 1.0
        return y


def by_brightness(image: np.ndarray) -> np.ndarray:
    """Road where it is dark, sky where it is bright."""
    return np.where(image.mean(axis=2) > 127, 10, 0).astype(np.uint8)


def test_flips_are_painted_and_named() -> None:
    generator: Any = method_config("cut").translation()
    segmenter: Any = by_brightness
    work = Work(Translator(Painted(generator.generator)), PIXELS, segmenter)
    dark = np.zeros((8, 8, 3), np.uint8)
    (answer,) = work([Job("flips", file_of(dark, "JPEG"))])
    painted = pixels_of(answer)
    assert answer.media_type == "image/png" and painted.shape == (8, 8, 4)
    assert (painted[:4, :, 3] == 0).all() and (painted[4:, :, 3] == 160).all()
    assert (painted[4:, :, :3] == (70, 130, 180)).all()
    assert answer.headers["X-Flips"] == '{"share": 0.5, "pairs": ["road \\u2192 sky 50.0 %"]}'


def test_the_commonest_pairs_come_first() -> None:
    source, after = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    source[5:], after[:2], after[9, :3] = 10, 8, 255
    after[5:] = np.where(after[5:] == 255, 255, 10)
    _, share, pairs = overlay(source, after)
    assert share == 0.23 and pairs == ["road → vegetation 20.0 %", "sky → none 3.0 %"]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    place=st.integers(0, 10_000), value=st.binary(min_size=1, max_size=8), format=st.sampled_from(["PNG", "JPEG"]),
    keep=st.integers(1, 10_000),
)  # fmt: skip
def test_no_file_raises_what_is_no_sentence(place: int, value: bytes, format: str, keep: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    file = bytearray(file_of(picture(16, 16), format, exif=exif))
    start = place % len(file)
    file[start : start + len(value)] = value
    work = Work(_Echo(), PIXELS)
    (answer,) = work([Job("translation", bytes(file[: max(1, keep % (2 * len(file)))]))])
    assert answer.status in (200, 422)


class _Echo(Translator):
    """Gives back what it gets."""

    def __init__(self) -> None:
        super().__init__(translation())

    def __call__(self, image: np.ndarray, key: str = "", *, example: np.ndarray | None = None) -> np.ndarray:
        return image


def test_palettes_and_grey_become_rgb() -> None:
    grey, palette = Image.fromarray(picture()).convert("L"), Image.fromarray(picture()).quantize(16)
    for image in (grey, palette):
        (answer,) = Work(_Echo(), PIXELS)([Job("translation", file_of(image))])
        assert np.array_equal(pixels_of(answer), np.asarray(image.convert("RGB")))


def test_transparency_and_sixteen_bits_are_kept() -> None:
    image = np.dstack([picture(), picture(seed=1)[:, :, :1]])
    (answer,) = Work(_Echo(), PIXELS)([Job("translation", file_of(image))])
    assert Image.open(io.BytesIO(answer.body)).mode == "RGBA" and np.array_equal(
        pixels_of(answer)[..., 3], image[..., 3]
    )
    deep = np.arange(240, dtype=np.uint16).reshape(12, 20) * 257
    (answer,) = Work(_Echo(), PIXELS)([Job("translation", file_of(Image.fromarray(deep)))])
    assert answer.status == 200 and answer.body[24] == 16  # bits of a channel, in the header of a PNG
