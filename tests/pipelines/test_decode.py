import dataclasses
import importlib.util
import io
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.errors import UserError
from pipelines.decode import DaliDecoder, Decoder, EncodedCrop, PillowDecoder, Undecodable, make_decoder
from tests.infra.test_images import bomb
from tests.pipelines.shardmaker import smooth_image

CPU = torch.device("cpu")
CROP = 48
JPEG_TOLERANCE = 2 * 2 / 255  # two of 256 levels, on the scale [-1, 1]

has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not has_dali, reason="DALI is not installed")
kinds = pytest.mark.parametrize("kind", ["pillow", pytest.param("dali", marks=needs_dali)])


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def crops(images: list[bytes]) -> list[EncodedCrop]:
    places = [(0, 0, False), (80, 48, True), (33, 17, False), (7, 40, True)]
    return [EncodedCrop(data, *places[i], name=f"image {i}") for i, data in enumerate(images)]


@pytest.fixture
def images() -> list[Image.Image]:
    return [smooth_image(np.random.default_rng(i), (128, 96)) for i in range(4)]


def decoder(kind: str, device: torch.device = CPU, crop: int = CROP) -> Decoder:
    return make_decoder(kind, crop=(crop, crop), device=device, threads=1, batch=4)


@kinds
def test_a_batch_stays_as_it_is_while_others_are_decoded(kind: str, images: list[Image.Image]) -> None:
    used = decoder(kind)
    encoded = [encode(image, "PNG") for image in images]
    first = used.decode(crops(encoded))
    before = first.clone()
    for _ in range(4):  # more than a pipeline has buffers in turn
        used.decode(crops(encoded[::-1]))
    assert torch.equal(first, before)


@kinds
def test_png_pixels_are_exact(kind: str, images: list[Image.Image]) -> None:
    decoded = decoder(kind).decode(crops([encode(image, "PNG") for image in images]))
    assert decoded.shape == (4, 3, CROP, CROP) and decoded.dtype == torch.float32
    assert decoded.is_contiguous(memory_format=torch.channels_last)
    pixels = np.asarray(images[0])[:CROP, :CROP], np.asarray(images[1])[48:96, 80:128][:, ::-1]
    for image, expected_HWC in zip(decoded, pixels, strict=False):
        pixels_CHW = torch.from_numpy(expected_HWC.copy()).permute(2, 0, 1).float()
        assert torch.equal(image, (pixels_CHW - 127.5) * (1 / 127.5))  # to the last bit, from either decoder
        assert torch.allclose(image, pixels_CHW / 127.5 - 1, rtol=0, atol=2e-7)


@kinds
def test_black_and_white_are_the_ends_of_the_range(kind: str) -> None:
    black, white = (encode(Image.new("RGB", (48, 48), colour), "PNG") for colour in ("black", "white"))
    decoded = decoder(kind).decode([EncodedCrop(data, 0, 0, False, "") for data in (black, white)])
    assert decoded[0].unique().tolist() == [-1.0] and decoded[1].unique().tolist() == [1.0]


@needs_dali
@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 2}, {"subsampling": 2, "quality": 60}, {"progressive": True}]
)
def test_dali_and_pillow_agree_on_jpeg(images: list[Image.Image], options: dict[str, Any]) -> None:
    encoded = crops([encode(image, "JPEG", **{"quality": 95} | options) for image in images])
    difference = decoder("dali").decode(encoded) - decoder("pillow").decode(encoded)
    assert difference.abs().max() <= JPEG_TOLERANCE


@kinds
def test_grayscale_jpeg_has_three_equal_channels(kind: str, images: list[Image.Image]) -> None:
    gray = [image.convert("L") for image in images]
    decoded = decoder(kind).decode(crops([encode(image, "JPEG", quality=100) for image in gray]))
    assert torch.equal(decoded[:, 0], decoded[:, 1]) and torch.equal(decoded[:, 0], decoded[:, 2])
    expected = torch.from_numpy(np.asarray(gray[0])[:CROP, :CROP].copy()).float() / 127.5 - 1
    assert (decoded[0, 0] - expected).abs().max() < 6 / 127.5


@needs_dali
def test_dali_and_pillow_agree_on_real_photographs(shared_data: Path) -> None:
    folders = shared_data / "camvid/train/img", shared_data / "facades/train"
    photos = [path for folder in folders for path in sorted(folder.glob("*.*"))[:2]]
    encoded = crops([path.read_bytes() for path in photos])
    difference = decoder("dali").decode(encoded) - decoder("pillow").decode(encoded)
    assert difference.abs().max() <= JPEG_TOLERANCE


@kinds
@pytest.mark.parametrize("damage", ["truncated jpg", "truncated png", "text", "empty"])
def test_a_damaged_image_is_named(kind: str, damage: str, images: list[Image.Image]) -> None:
    format = "PNG" if "png" in damage else "JPEG"
    encoded = [encode(image, format) for image in images]
    encoded[2] = {"text": b"not an image", "empty": b""}.get(damage, encoded[2][: len(encoded[2]) // 2])
    with pytest.raises(UserError, match=r"^image 2 cannot be decoded"):
        decoder(kind).decode(crops(encoded))


@kinds
@pytest.mark.parametrize("value", [0, 18, 19, 20, 254, 255])
def test_a_label_holds_trainids_and_what_to_ignore_and_nothing_else(kind: str, value: int) -> None:
    """19 is one past the last class."""
    used = make_decoder(kind, crop=(CROP, CROP), device=CPU, threads=1, batch=2, labels=True)
    plain, marked = np.full((2, 96, 128), 7, np.uint8)
    marked[50, 85] = value  # inside the second crop, and outside the first
    for place, label, fine in ((0, marked, True), (1, marked, value <= 18 or value == 255)):
        batch = crops([encode(Image.fromarray(each), "PNG") for each in (plain, label)])
        batch[1] = dataclasses.replace(batch[1], x=batch[place].x, y=batch[place].y)
        if fine:
            assert set(used.decode(batch)[1].unique().tolist()) == ({7, value} if place else {7})
        else:
            with pytest.raises(Undecodable, match=f"^image 1 holds {value}, which is no trainId") as error:
                used.decode(batch)
            assert error.value.faults.keys() == {1}
    used.close()


@kinds
def test_an_image_smaller_than_its_crop_is_named(kind: str, images: list[Image.Image]) -> None:
    encoded = [encode(image, "JPEG") for image in images]
    encoded[1] = encode(images[1].resize((100, 96)), "JPEG")
    with pytest.raises(UserError, match=r"^image 1 is 100x96, too small for its crop of 48x48 pixels at \(80, 48\)"):
        decoder(kind).decode(crops(encoded))


@kinds
@pytest.mark.parametrize("content", ["bomb", "tiff"])
def test_what_is_too_large_or_of_another_format_is_not_decoded(
    kind: str, content: str, images: list[Image.Image]
) -> None:
    """30000x30000 pixels in a file of a tenth of a megabyte would be 2.7 GB."""
    encoded = [encode(image, "PNG") for image in images]
    used = decoder(kind)
    expected = used.decode(crops(encoded))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hostile = bomb(30000) if content == "bomb" else encode(images[1], "TIFF")
    words = "more than 178 million pixels" if content == "bomb" else "no JPEG or PNG file"
    with pytest.raises(Undecodable, match=rf"^image 1 cannot be decoded \(.*{words}\)") as error:
        used.decode(crops([encoded[0], hostile, *encoded[2:]]))
    assert error.value.faults.keys() == {1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert torch.equal(used.decode(crops(encoded)), expected)


@kinds
def test_every_damaged_image_is_told_and_the_decoder_goes_on(kind: str, images: list[Image.Image]) -> None:
    encoded = [encode(image, "PNG") for image in images]
    used = decoder(kind)
    expected = used.decode(crops(encoded))
    damaged = [encoded[0], b"not an image", encoded[2], encode(images[3].resize((50, 50)), "PNG")]
    for _ in range(2):
        with pytest.raises(Undecodable) as error:
            used.decode(crops(damaged))
        assert error.value.faults.keys() == {1, 3} and "image 3 is 50x50, too small" in error.value.faults[3]
        assert torch.equal(used.decode(crops(encoded)), expected)
        assert torch.equal(used.decode(crops(encoded)[:1]), expected[:1])


@needs_dali
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_many_damaged_headers_in_one_call_do_not_crash(format: str) -> None:
    """DALI reads the headers of more than a few files in all threads, and those go on when one has failed."""
    encoded = [encode(smooth_image(np.random.default_rng(i), (48, 32)), format) for i in range(32)]
    whole = [EncodedCrop(data, 0, 0, False, f"image {i}") for i, data in enumerate(encoded)]
    damaged = [
        dataclasses.replace(crop, encoded=bytes(64) + crop.encoded[64:]) if i % 3 == 1 else crop
        for i, crop in enumerate(whole)
    ]
    used = make_decoder("dali", crop=(16, 16), device=CPU, threads=2, batch=32)
    expected = used.decode(whole)
    for _ in range(3):
        with pytest.raises(Undecodable) as error:
            used.decode(damaged)
        assert error.value.faults.keys() == set(range(1, 32, 3))
    assert torch.equal(used.decode(whole), expected)


@kinds
def test_several_may_be_under_way_and_a_damaged_image_costs_only_its_own(kind: str, images: list[Image.Image]) -> None:
    encoded = crops([encode(image, "PNG") for image in images])
    damaged = [encoded[0], dataclasses.replace(encoded[1], encoded=b"not an image"), *encoded[2:]]
    used = decoder(kind)
    expected = used.decode(encoded)
    results = [used.begin(batch) for batch in (encoded, damaged, encoded[::-1], damaged[:2])]
    time.sleep(0.1)  # what has failed knows it by now
    results.append(used.begin(encoded[:1]))
    assert torch.equal(results[2](), expected.flip(0))  # before its turn
    assert torch.equal(results[0](), expected)
    for number in (1, 3):
        with pytest.raises(Undecodable) as error:
            results[number]()
        assert error.value.faults.keys() == {1}
    assert torch.equal(results[4](), expected[:1])


@needs_dali
def test_what_dali_alone_cannot_decode_is_named_with_the_other_decoder(
    monkeypatch: pytest.MonkeyPatch, images: list[Image.Image]
) -> None:
    monkeypatch.setattr("pipelines.decode._decode_one", lambda *_: None)
    encoded = [encode(images[0], "PNG"), encode(images[1], "PNG")[:200]]
    with pytest.raises(UserError, match=r"^image 1 cannot be decoded by DALI \(.+\): pass --data.decoder pillow"):
        decoder("dali").decode(crops(encoded))


@needs_dali
def test_an_error_of_dali_that_is_no_image_s_fault_is_not_hidden(images: list[Image.Image]) -> None:
    used = make_decoder("dali", crop=(CROP, CROP), device=CPU, threads=1, batch=2)
    with pytest.raises(RuntimeError):
        used.decode(crops([encode(image, "PNG") for image in images]))


@kinds
def test_batches_may_be_smaller_than_announced(kind: str, images: list[Image.Image]) -> None:
    encoded = crops([encode(image, "PNG") for image in images])
    used = decoder(kind)
    assert torch.equal(used.decode(encoded)[:2], used.decode(encoded[:2]))
    used.close()


def test_auto_falls_back_to_pillow_and_an_absent_dali_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(decoder("auto"), DaliDecoder if has_dali else PillowDecoder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(decoder("auto"), PillowDecoder)
    with pytest.raises(UserError, match="not installed"):
        decoder("dali")


@pytest.mark.gpu
@needs_dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_decodes_like_the_cpu(images: list[Image.Image]) -> None:
    device = torch.device("cuda")
    png, jpeg = (crops([encode(image, f, quality=95) for image in images]) for f in ("PNG", "JPEG"))
    on_gpu = decoder("dali", device)
    decoded = on_gpu.decode(png)
    assert decoded.is_cuda and decoded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(decoded.cpu(), decoder("pillow").decode(png))
    difference = (on_gpu.decode(jpeg).cpu() - decoder("pillow").decode(jpeg)).abs()
    assert difference.mean() < 1 / 127.5 and difference.max() < 8 / 127.5
    with pytest.raises(Undecodable) as error:
        on_gpu.decode([*png[:3], dataclasses.replace(png[3], encoded=jpeg[3].encoded[:100])])
    assert error.value.faults.keys() == {3} and torch.equal(on_gpu.decode(png), decoded)
