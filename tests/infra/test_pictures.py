"""Image files of every kind, read with what they have and written again as they were."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from infra import sixteen_bits
from infra.images import DAMAGED, FORMATS, LARGEST, WITH_ALPHA, Picture, open_image, picture_file, read_picture
from pipelines.images import image_size, read_image


def noise(channels: int, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    shape = (6, 9, channels) if channels > 1 else (6, 9)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_is_written_in_the_format_that_it_had(format: str) -> None:
    colours, alpha = noise(3), noise(1)
    again = read_picture(picture_file(Picture(colours, alpha, format)))
    assert again.format == format and again.colours.shape == colours.shape and again.colours.dtype == np.uint8
    assert (again.alpha is not None) == (format in WITH_ALPHA)
    if format in ("PNG", "TIFF"):
        assert again.alpha is not None and np.array_equal(again.alpha, alpha)
    if format in ("BMP", "PPM"):
        assert np.array_equal(again.colours, colours)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("alpha", [None, noise(1, np.uint16, 1)], ids=["opaque", "alpha"])
def test_sixteen_bits_survive(format: str, alpha: np.ndarray | None) -> None:
    picture = Picture(noise(3, np.uint16), alpha, format, b"a profile")
    data = picture_file(picture)
    again = read_picture(data)
    assert again.colours.dtype == np.uint16 and again.format == format and again.profile == b"a profile"
    with Image.open(io.BytesIO(data)) as image:  # which sees the upper bytes
        stored = picture.colours if alpha is None else np.dstack([picture.colours, alpha])
        assert np.array_equal(np.asarray(image), stored >> 8)
    if alpha is None:
        assert again.alpha is None and np.array_equal(again.colours, picture.colours)
    else:
        share = alpha[:, :, None] / 65535
        assert again.alpha is not None and np.array_equal(again.alpha, alpha)
        assert np.abs(again.colours - (65535 * (1 - share) + picture.colours * share)).max() <= 0.5


def test_sixteen_bits_of_a_tiff_that_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels go another way through Pillow."""
    colours = noise(3, np.uint16)
    packed = picture_file(Picture(colours, format="TIFF"))
    monkeypatch.setattr(sixteen_bits.zlib, "compress", bytes)
    plain = picture_file(Picture(colours, format="TIFF"))
    entry = plain.index(b"\x03\x01\x03\x00\x01\x00\x00\x00\x08")
    plain = plain[: entry + 8] + b"\x01" + plain[entry + 9 :]
    assert plain != packed and np.array_equal(read_picture(plain).colours, colours)


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_a_tiff_whose_channels_lie_one_after_the_other(order: str) -> None:
    """Of which Pillow makes noise."""
    height, width, short, long = 6, 9, 3, 4
    colours, plane = noise(3, np.uint16), 2 * 6 * 9
    bits, starts, lengths, first = 8, 14, 26, 38  # where what is pointed to lies
    entries = [
        (256, long, 1, width), (257, long, 1, height), (258, short, 3, bits), (259, short, 1, 1), (262, short, 1, 2),
        (273, long, 3, starts), (277, short, 1, 3), (278, long, 1, height), (279, long, 3, lengths), (284, short, 1, 2),
    ]  # fmt: skip
    data = struct.pack(f"{order}3H3L3L", 16, 16, 16, *(first + number * plane for number in range(3)), *[plane] * 3)
    data += colours.transpose(2, 0, 1).astype(f"{order}u2").tobytes()
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8 + len(data))
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        inline = struct.pack(f"{order}HH", value, 0) if (kind, count) == (short, 1) else struct.pack(f"{order}L", value)
        directory += struct.pack(f"{order}HHL", tag, kind, count) + inline
    file = head + data + directory + bytes(4)
    assert np.array_equal(read_picture(file).colours, colours)
    with open_image(io.BytesIO(file)) as image:  # as training data are read
        assert np.array_equal(np.asarray(image), colours >> 8)


def sixteen_bit_png(values: np.ndarray, colour_type: int, transparent: bytes = b"") -> bytes:
    """Of the type that the PNG standard gives this number."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    chunks += [(b"tRNS", transparent)] if transparent else []
    chunks += [(b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(sixteen_bits._chunk(*chunk) for chunk in chunks)


def test_grey_with_alpha_has_its_sixteen_bits() -> None:
    grey, alpha = noise(1, np.uint16), noise(1, np.uint16, 1)
    picture = read_picture(sixteen_bit_png(np.dstack([grey, alpha]), 4))
    assert picture.alpha is not None and np.array_equal(picture.alpha, alpha)
    over = 65535 + (grey.astype(float) - 65535) * (alpha / 65535)
    assert np.abs(picture.colours - over[:, :, None]).max() <= 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_a_colour_of_sixteen_bits_that_stands_for_the_transparent(channels: int) -> None:
    values = noise(channels, np.uint16)
    file = sixteen_bit_png(values, 0 if channels == 1 else 2, values[2, 3:4].astype(">u2").tobytes())
    picture = read_picture(file)
    assert (
        picture.alpha is not None and picture.alpha[2, 3] == 0 and (np.delete(picture.alpha, 2 * 9 + 3) == 65535).all()
    )
    assert (picture.colours[2, 3] == 65535).all() and np.array_equal(
        picture.colours[0], np.atleast_3d(values)[0] * [1, 1, 1]
    )


def test_grey_of_sixteen_bits_in_a_ppm_file() -> None:
    values = noise(1, np.uint16)
    picture = read_picture(b"P5 9 6 65535\n" + values.astype(">u2").tobytes())
    assert picture.format == "PPM" and np.array_equal(picture.colours, values[:, :, None].repeat(3, axis=2))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "BMP"])
def test_formats_of_eight_bits_get_the_nearest(format: str) -> None:
    grey = np.full((4, 4, 3), 257 * 100 + 120, np.uint16)
    again = read_picture(picture_file(Picture(grey, format=format), quality=100))
    assert again.colours.dtype == np.uint8 and np.abs(again.colours.astype(int) - 100).max() <= 1


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(noise(1)), noise(1)),
        (Image.fromarray(noise(1, np.uint16)), noise(1, np.uint16)),
    ],
    ids=["8 bits", "16 bits"],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_has_three_equal_channels(image: Image.Image, expected: np.ndarray, format: str) -> None:
    picture = read_picture(file_of(image, format))
    assert picture.colours.dtype == expected.dtype and picture.alpha is None
    assert np.array_equal(picture.colours, expected[:, :, None].repeat(3, axis=2))


def test_the_transparent_lies_over_white_and_its_alpha_is_kept() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = 10, 20, 30, 255
    pixels[1] = 10, 20, 30, 0
    picture = read_picture(file_of(Image.fromarray(pixels), "PNG"))
    assert picture.alpha is not None and np.array_equal(picture.alpha, pixels[:, :, 3])
    assert picture.colours[0, 0].tolist() == [10, 20, 30] and picture.colours[1].min() == 255


@pytest.mark.parametrize("deep", [False, True], ids=["8 bits", "16 bits"])
def test_pictures_are_turned_upright(deep: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    stored = noise(3, np.uint16 if deep else np.uint8)
    data = picture_file(Picture(stored))
    # After the header: where a PNG file has its EXIF data.
    data = data[:33] + sixteen_bits._chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[33:]
    assert np.array_equal(read_picture(data).colours, np.rot90(stored, -1))


def test_the_profile_of_colours_stays_with_colours_alone() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for format in ("JPEG", "PNG", "TIFF", "WEBP"):
        picture = read_picture(file_of(Image.fromarray(noise(3)), format, icc_profile=profile))
        assert picture.profile == profile
        assert read_picture(picture_file(picture)).profile == profile
    grey = read_picture(file_of(Image.fromarray(noise(1)), "PNG", icc_profile=profile))
    assert grey.profile is None  # it would be one of grey


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / "x.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    picture = read_picture(path)
    assert picture.animated and picture.colours[0, 0].tolist() == [255, 0, 0]
    assert not read_picture(file_of(frames[0], "GIF")).animated


@pytest.mark.parametrize("cut", [10, 40, 200])
def test_what_is_cut_off_is_damaged(cut: int) -> None:
    for dtype in (np.uint8, np.uint16):
        data = picture_file(Picture(noise(3, dtype)))
        with pytest.raises(DAMAGED):
            read_picture(data[:cut] if cut < len(data) else data[:-40])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01"])
def test_damaged_exif_leaves_an_image_as_it_is_stored(format: str, exif: bytes, tmp_path: Path) -> None:
    image = Image.fromarray(noise(3))
    plain, damaged = file_of(image, format), file_of(image, format, exif=exif)
    assert np.array_equal(read_picture(damaged).colours, read_picture(plain).colours)
    (tmp_path / "image").write_bytes(damaged)
    assert image_size(tmp_path / "image") == image.size == read_image(tmp_path / "image").size


def test_an_orientation_that_there_is_none_of_turns_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    (tmp_path / "a.png").write_bytes(file_of(Image.fromarray(noise(3)), "PNG", exif=exif))
    assert image_size(tmp_path / "a.png") == read_image(tmp_path / "a.png").size == (9, 6)


@pytest.mark.parametrize(("format", "side"), LARGEST.items())
def test_the_largest_side_of_a_format(format: str, side: int) -> None:
    picture_file(Picture(np.zeros((1, side, 3), np.uint8), format=format))
    with pytest.raises((OSError, ValueError, OverflowError)):
        picture_file(Picture(np.zeros((1, side + 1, 3), np.uint8), format=format))
