"""Reading whatever image files people have, and the sizes and values that come out."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.errors import UserError
from pipelines.images import (
    encode,
    encoded_size,
    find_images,
    image_size,
    multiple_of,
    parse_size,
    read_image,
    read_stored,
    resize,
    resize_label,
    to_array,
)
from tests.infra.test_images import EPS, bomb


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pixel(path: Path) -> tuple[int, ...]:
    image = read_image(path)
    assert image.mode == "RGB"
    colour = image.getpixel((0, 0))
    assert isinstance(colour, tuple)
    return colour


@pytest.mark.parametrize(
    ("mode", "colour", "file", "expected"),
    [
        ("RGB", (10, 20, 30), "x.png", (10, 20, 30)),
        ("L", 77, "x.png", (77, 77, 77)),
        ("1", 1, "x.png", (255, 255, 255)),
        ("LA", (77, 255), "x.png", (77, 77, 77)),
        ("RGBA", (10, 20, 30, 255), "x.png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "x.png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 127), "x.webp", (128, 128, 128)),
        ("CMYK", (0, 0, 0, 0), "x.tiff", (255, 255, 255)),
        ("I;16", 65535, "x.png", (255, 255, 255)),
        ("I;16", 257 * 100, "x.tiff", (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, colour: Any, file: str, expected: tuple[int, ...], tmp_path: Path) -> None:
    options = {"lossless": True, "exact": True} if file.endswith("webp") else {}
    assert pixel(saved(Image.new(mode, (4, 4), colour), tmp_path / file, **options)) == expected


def test_palettes_are_looked_up_and_may_be_transparent(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    assert pixel(saved(image, tmp_path / "p.png")) == (40, 50, 60)
    assert pixel(saved(image, tmp_path / "t.png", transparency=1)) == (255, 255, 255)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image = Image.new("RGB", (30, 20), "black")
    image.paste("white", (0, 10, 30, 20))  # the lower half, which comes to lie on the left
    path = saved(image, tmp_path / "x.jpg", exif=exif)
    assert image_size(path) == read_image(path).size == (20, 30)
    assert np.asarray(read_image(path))[:, :5].min() > 200


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "32-bit", "absent"])
def test_what_is_not_an_image_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "broken one.png"
    if kind == "32-bit":
        Image.new("F", (4, 4), 0.5).save(path, "TIFF")
    elif kind != "absent":
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        path.write_bytes({"text": b"hello", "empty": b"", "truncated": encode(noise, "png")[:5000]}[kind])
    with pytest.raises(UserError, match="broken one.png"):
        read_image(path)
    if kind == "32-bit":
        with pytest.raises(
            UserError, match="is no picture .32 bits have no agreed range of values.: convert it to 8 or 16"
        ):
            read_image(path)


def test_images_are_found_below_links_in_order_and_other_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "c.JPEG").touch()
    (tmp_path / "here").mkdir()
    for name in ("b.png", "a.webp", "notes.txt", ".DS_Store"):
        (tmp_path / "here" / name).touch()
    (tmp_path / "here" / "aa").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "here")  # round and round
    found = [path.relative_to(tmp_path / "here").as_posix() for path in find_images(tmp_path / "here")]
    assert found == ["a.webp", "aa/c.JPEG", "b.png"]


@pytest.mark.parametrize(("size", "expected"), [((7, 9), (8, 8)), ((10, 14), (8, 16)), ((1, 256), (4, 256))])
def test_sides_become_multiples_of_four(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert multiple_of(Image.new("RGB", size), 4).size == expected  # 2.5 and 3.5 round to even, as in CUT


def test_sizes_are_width_by_height() -> None:
    gradient = Image.fromarray(np.arange(0, 256, 8, dtype=np.uint8)[None].repeat(16, 0)).convert("RGB")
    assert resize(gradient, (64, 8)).size == (64, 8)
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    enlarged = resize_label(label, (8, 6))
    assert np.array_equal(enlarged, label.repeat(2, 0).repeat(2, 1))


def test_values_run_from_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    array_CHW = to_array(image)
    assert array_CHW.shape == (3, 1, 1) and array_CHW.dtype == np.float32
    np.testing.assert_allclose(array_CHW[:, 0, 0], [-1, 1, -0.6], atol=1e-7)


def test_a_size_is_parsed() -> None:
    assert parse_size("512x256") == (512, 256)


@pytest.mark.parametrize("text", ["", "512", "0x4", "-4x4", "4x", "axb", "4x4x4", "1.5x2", "99999x2"])
def test_an_impossible_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="512x256"):
        parse_size(text)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"comment": b"c" * 300, "quality": 30})],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_size_in_a_header_is_told_while_the_header_is_whole(
    format: str, options: dict[str, Any], mode: str
) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (300, 20)).save(buffer, format, **options)
    encoded = buffer.getvalue()
    assert encoded_size(encoded) == (300, 20)
    header = 33 if format == "PNG" else encoded.index(b"\xff\xda")  # of the first scan
    assert all(encoded_size(encoded[:end]) is None for end in range(header))
    assert encoded_size(bytes(8) + encoded[8:]) is None


def test_real_photographs_have_the_size_in_their_headers(shared_data: Path) -> None:
    for folder in (shared_data / "camvid/train/img", shared_data / "facades/train"):
        for path in sorted(folder.glob("*.*"))[:5]:
            with Image.open(path) as image:
                assert encoded_size(path.read_bytes()) == image.size


def test_what_would_start_another_program_or_fill_the_memory_is_named_before_it_is_read(tmp_path: Path) -> None:
    hostile = {
        "eps": (EPS, "cannot be read as an image"),
        "bomb": (bomb(30000), "too large .more than 178 million pixels"),
    }
    for name, (content, words) in hostile.items():
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(content)
        for read in (image_size, read_image, read_stored):
            with pytest.raises(UserError, match=f"{name}.jpg .*{words}"):
                read(path)
    (tmp_path / "drawing.eps").write_bytes(EPS)
    assert tmp_path / "drawing.eps" not in find_images(tmp_path)
