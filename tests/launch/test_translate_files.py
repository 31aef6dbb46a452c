"""launch/translate.py on images and folders, as a person types it."""

import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.images import Picture, picture_file, read_picture
from infra.storage import StorageUnavailable
from launch.translating import files
from launch.translating.files import CLAIM, Folder, Form, Names, Pictures
from pipelines.ranks import Ranks
from tests.infra.test_images import bomb
from tests.launch.translating import contents, in_ranks, make_run, noise, refused, translate
from trainer.checkpoint import write_checkpoint
from trainer.translator import load_translator


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def munit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("munit"), "munit")


def save(path: Path, pixels: np.ndarray, format: str = "PNG", alpha: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_file(Picture(pixels, alpha, format)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three sizes, in folders, of several kinds."""
    root = tmp_path / "images"
    for number in range(3):
        save(root / f"{number}.png", noise(16, 24, number))
    save(root / "far" / "a.jpg", noise(13, 21), "JPEG")
    save(root / "far" / "deep.png", noise(16, 24).astype(np.uint16) * 257)
    save(root / "far" / "off" / "clear.png", noise(9, 10), alpha=noise(9, 10)[:, :, 0])
    (root / "notes.txt").write_text("no image")
    return root


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Up to the rounding of images that were translated together."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other).max()) <= 1


def test_a_folder_has_the_same_names_and_sizes(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "TOGETHER", 2)
    out, translator = tmp_path / "out", load_translator(run)
    assert translate(monkeypatch, run, folder, out) == 0
    names = {name for name in contents(folder) if name != "notes.txt"}
    assert contents(out).keys() == {*names, CLAIM}
    for name in names:
        source, made = read_picture(folder / name), read_picture(out / name)
        expected = translator(source.colours)
        assert made.format == source.format and made.colours.dtype == expected.dtype
        if name == "far/deep.png":
            assert np.abs(made.colours.astype(int) - expected).max() <= 257
        elif name.endswith(".png") and source.alpha is None:
            assert near(made.colours, expected)
        elif source.alpha is not None:
            assert made.alpha is not None and np.array_equal(made.alpha, source.alpha)
            with Image.open(out / name) as stored:
                assert near(np.asarray(stored)[:, :, :3], expected)
        else:
            assert (out / name).read_bytes() == picture_file(Picture(expected, format="JPEG"))


def test_the_same_command_goes_on_and_then_changes_nothing(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert translate(monkeypatch, run, folder, out) == 0
    whole = contents(out)
    (out / "far/a.jpg").unlink()
    (out / ".tmp-of-a-killed-writer").write_bytes(b"half")
    kept = {name: (out / name).stat().st_mtime_ns for name in whole if name != "far/a.jpg"}
    assert translate(monkeypatch, run, folder, out) == 0
    assert contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    save(folder / "1.png", noise(16, 24, 9))
    later = (out / "1.png").stat().st_mtime_ns + 10**9
    os.utime(folder / "1.png", ns=(later, later))
    assert translate(monkeypatch, run, folder, out) == 0
    changed = {name for name, data in contents(out).items() if data != whole[name]}
    assert changed == {"1.png"}
    save(folder / "0.png", noise(16, 24, 8))
    os.utime(folder / "0.png", ns=(10**9, 10**9))  # as a copy that keeps its time
    whole = contents(out)
    assert translate(monkeypatch, run, folder, out) == 0
    assert {name for name, data in contents(out).items() if data != whole[name]} == {"0.png"}


def test_ranks_share_a_folder(run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "TOGETHER", 1)
    (folder / "3.png").write_bytes(b"no image")
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert translate(monkeypatch, run, folder, whole, "--on-bad-sample", "skip") == 0
    form, translator, written = Form(skip=True), load_translator(run), list[list[str]]()

    def share(ranks: Ranks) -> int:
        work = Folder(translator, folder, shared, form, ranks)
        write, mine = work._write, list[str]()
        written.append(mine)

        def noted(names: Names, made: Pictures) -> None:
            mine.extend(names)
            write(names, made)

        monkeypatch.setattr(work, "_write", noted)
        return work.translate()

    assert in_ranks(2, share)[0] == 1  # left out
    assert contents(shared) == contents(whole)
    assert sorted(map(len, written)) == [3, 3] and len(set().union(*written)) == 6


def test_formats_are_chosen(run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for quality in (30, 90):
        out = tmp_path / str(quality)
        assert translate(monkeypatch, run, folder, out, "--format", "jpg", "--quality", quality) == 0
        assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".jpg", ".json"}
        assert {read_picture(path).format for path in out.rglob("*.jpg")} == {"JPEG"}
        sizes.append(sum(path.stat().st_size for path in out.rglob("*.jpg")))
    assert sizes[0] < sizes[1]
    single = tmp_path / "single.webp"
    assert translate(monkeypatch, run, folder / "0.png", single) == 0
    assert read_picture(single).format == "WEBP"
    for options, format in (([], "PNG"), (["--format", "tiff"], "TIFF")):  # a name without an ending
        assert translate(monkeypatch, run, folder / "0.png", tmp_path / "single", *options) == 0
        assert read_picture(tmp_path / "single").format == format


def test_an_image_is_turned_upright_and_translated(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source, out = tmp_path / "a.png", tmp_path / "out" / "b.png"
    Image.fromarray(noise(12, 20)).save(source, exif=exif)
    assert translate(monkeypatch, run, source, out) == 0
    assert np.array_equal(read_picture(out).colours, load_translator(run)(np.rot90(noise(12, 20), -1)))


def test_of_an_animation_the_first_frame_is_translated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Image.fromarray(noise(16, 24, seed)) for seed in (0, 1))
    source, out = tmp_path / "in" / "a.png", tmp_path / "out"
    source.parent.mkdir()
    first.save(source, save_all=True, append_images=[second])
    for given, made in ((source, tmp_path / "b.png"), (source.parent, out)):
        caplog.clear()
        assert translate(monkeypatch, run, given, made) == 0
        assert f"{source} is an animation: its first frame is translated" in caplog.text
    for made in (tmp_path / "b.png", out / "a.png"):
        assert np.array_equal(read_picture(made).colours, load_translator(run)(noise(16, 24, 0)))


def test_styles_are_drawn_by_a_number_or_taken_from_an_image(
    munit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, example = save(tmp_path / "a.png", noise(64, 64)), save(tmp_path / "example.png", noise(64, 64, 1))
    made = {}
    for style in ("3", "4", str(example)):
        out = tmp_path / f"{Path(style).stem}.out.png"
        assert translate(monkeypatch, munit, source, out, "--style", style, "--direction", "BtoA") == 0
        made[style] = read_picture(out).colours
    translator = load_translator(munit, direction="BtoA", seed=3)
    assert np.array_equal(made["3"], translator(noise(64, 64), "a.png"))
    assert np.array_equal(made[str(example)], translator(noise(64, 64), example=noise(64, 64, 1)))
    assert not np.array_equal(made["3"], made["4"])


def test_variants_are_styles_side_by_side(munit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "in" / "a.png", noise(64, 64))
    assert translate(monkeypatch, munit, source, tmp_path / "b.png", "--variants", 2) == 0
    assert translate(monkeypatch, munit, source.parent, tmp_path / "out", "--variants", 2, "--style", 5) == 0
    for number in range(2):
        for seed, path in ((0, tmp_path / f"b_{number + 1}.png"), (5, tmp_path / f"out/variant_{number + 1}/a.png")):
            expected = load_translator(munit, seed=seed + number)(noise(64, 64), "a.png")
            assert np.array_equal(read_picture(path).colours, expected)


def test_large_images_are_translated_in_tiles(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save(tmp_path / "a.png", noise(70, 100)), tmp_path / "b.png"
    assert translate(monkeypatch, run, source, out, "--tile", 64) == 0
    assert near(read_picture(out).colours, load_translator(run)(noise(70, 100)))
    assert "100.0%  tile " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}  # the files of tiles are gone
    assert "mostly edge: give 64 or more" in refused(monkeypatch, capsys, tmp_path, run, source, out, "--tile", "8")


def test_less_precision_is_for_eight_bits(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never mixed with more."""
    pixels, out = noise(16, 16), tmp_path / "out"
    save(tmp_path / "in" / "8.png", pixels)
    save(tmp_path / "in" / "16.png", pixels.astype(np.uint16) * 257)
    assert translate(monkeypatch, run, tmp_path / "in", out, "--precision", "bf16") == 0
    translator = load_translator(run)
    difference = np.abs(read_picture(out / "8.png").colours.astype(int) - translator(pixels)).max()
    assert 1 < difference < 32
    exact = translator(pixels.astype(np.uint16) * 257)
    assert np.abs(read_picture(out / "16.png").colours.astype(int) - exact).max() <= 1
    assert translate(monkeypatch, run, tmp_path / "in", out) == 2


def test_one_of_a_runs_checkpoints_translates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, source = make_run(tmp_path / "run"), save(tmp_path / "a.png", noise(12, 12))
    make_run(run, seed=1, step=9)
    (run / "checkpoints" / "best").symlink_to("step_7")
    for options, step in (([], 7), (["--checkpoint", "latest"], 9), (["--checkpoint", "step_9", "--no-averaged"], 9)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert translate(monkeypatch, run, source, tmp_path / "b.png", *options) == 0
        folder = run / "checkpoints" / f"step_{step}"
        assert f"translating with {folder}" in caplog.text
        assert np.array_equal(read_picture(tmp_path / "b.png").colours, load_translator(folder)(noise(12, 12)))


# ---- mistakes ---------------------------------------------------------------------------------------------------------


def test_damaged_images_stop_before_anything_is_written_or_are_left_out(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    bad = {"bomb.png": bomb(30000), "text.jpg": b"no image", "small.png": picture_file(Picture(noise(4, 9)))}
    words = {
        "bomb.png": "is too large",
        "text.jpg": "cannot be read as an image",
        "small.png": "9x4 is too small: give 5",
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
        sentence = refused(monkeypatch, capsys, tmp_path, run, folder, out)
        assert name in sentence and words[name] in sentence
        (folder / name).unlink()
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])  # whose header is good
    assert translate(monkeypatch, run, folder, out, "--on-bad-sample", "skip") == 0
    lines = capsys.readouterr().err
    assert all(f"{name}" in lines for name in (*bad, "cut.png")) and "4 images left out" in lines
    assert {name for name in contents(out) if "/" not in name} == {"0.png", "1.png", "2.png", CLAIM}
    assert translate(monkeypatch, run, folder, tmp_path / "other") == 2
    capsys.readouterr()
    assert "cut.png" in refused(monkeypatch, capsys, tmp_path, run, folder / "cut.png", tmp_path / "x.png")


def test_a_full_disk_is_an_outage_and_leaves_no_image_out(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files._write

    def full(path: Path, data: bytes, changed: int | None = None) -> None:
        if changed is not None:
            raise StorageUnavailable("no space left")
        write(path, data)

    monkeypatch.setattr(files, "_write", full)
    assert (
        translate(monkeypatch, run, folder, tmp_path / "out", "--on-bad-sample", "skip") == StorageUnavailable.exit_code
    )


def test_places_that_cannot_be_written_to(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "other" / "photo.png", noise(8, 8)).parent
    (tmp_path / "link").symlink_to(folder)
    image = folder / "0.png"
    for arguments, words in (
        ((folder, folder / "out"), "lies in .*images, where its images would be translated again"),
        ((tmp_path / "link", folder / "out"), "would be translated again: name another OUTPUT"),
        ((folder, folder), "would be translated again"),
        ((folder, other), r"holds other files .photo.png.: name another OUTPUT"),
        ((folder, other / "photo.png"), "is a file: name a folder"),
        ((image, image), "is the image that is to be translated: name another file"),
        ((image, other), "is an image and .*other a folder: name a file, such as .*other/translated.png"),
        ((image, image.parent), "name a file, such as .*images/translated.png"),
        (
            (image, tmp_path / "x.mp4"),
            "x.mp4 does not end as an image that can be written: give it an ending such as .png",
        ),
        ((image, tmp_path / "x.jpg", "--format", "png"), "x.jpg does not end as --format png: name it otherwise"),
        ((tmp_path / "nothing", tmp_path / "out"), "nothing does not exist"),
        ((folder, "s3://bucket/out"), "s3://bucket/out is a place in a store, where prepared data alone go"),
        ((image, "s3://bucket/a.png"), "s3://bucket/a.png is a place in a store"),
        ((other, tmp_path / "out", "--quality", "101"), "the quality 101 is impossible"),
        ((other, tmp_path / "out", "--style", "4"), "this method has no styles to draw: leave out --style"),
        ((other, tmp_path / "out", "--style", image), "no styles to take from an example"),
        ((other, tmp_path / "out", "--style", "blue"), "--style blue is neither a whole number nor an image file"),
        ((other, tmp_path / "out", "--variants", "2"), "no styles to draw: leave out --variants"),
        ((other, tmp_path / "out", "--variants", "0"), "0 variants are none"),
        ((other, tmp_path / "out", "--variants", "2", "--style", image), "the style of an image is one"),
        ((other, tmp_path / "out", "--direction", "BtoA"), "this method translates AtoB, not BtoA"),
        ((other, tmp_path / "out", "--averaged"), "has no moving average: leave out --averaged"),
        ((other, tmp_path / "out", "--checkpoint", "best"), "has no checkpoint best"),
    ):
        sentence = refused(monkeypatch, capsys, tmp_path, run, *arguments)
        assert re.search(words, sentence), sentence
    (folder / "0.jpg").write_bytes(image.read_bytes())
    sentence = refused(monkeypatch, capsys, tmp_path, run, folder, tmp_path / "out", "--format", "png")
    assert "0.jpg and 0.png of" in sentence and "would both become 0.png" in sentence


def test_translations_of_another_run_are_not_mixed_with_these(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, another = tmp_path / "out", make_run(tmp_path / "another", seed=1)
    assert translate(monkeypatch, run, folder, out) == 0
    for arguments, name in (
        ((another,), "weights"),
        ((run, "--format", "webp"), "format"),
        ((run, "--quality", 50), "quality"),
    ):
        sentence = refused(monkeypatch, capsys, tmp_path, arguments[0], folder, out, *arguments[1:])
        assert (
            f"holds translations with {name} = " in sentence and "name another OUTPUT, or delete it first" in sentence
        )


def test_translations_of_another_folder_are_not_mixed_with_these(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other, moved = (tmp_path / name for name in ("out", "other", "moved"))
    other.mkdir()
    save(other / "1.png", noise(16, 24, 9))
    assert translate(monkeypatch, run, folder, out) == 0
    whole = contents(out)
    assert f"holds the translations of {folder}" in refused(monkeypatch, capsys, tmp_path, run, other, out)
    folder.rename(moved)
    assert translate(monkeypatch, run, moved, out) == 0
    assert {name for name, data in contents(out).items() if data != whole[name]} == {files.CLAIM}
    assert translate(monkeypatch, run, moved, out) == 0
    assert "holds the translations of" in refused(monkeypatch, capsys, tmp_path, run, other, out)


def test_images_that_a_format_cannot_hold(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    save(tmp_path / "in/long.png", noise(16, 16400))
    save(tmp_path / "in/short.png", noise(16, 24))
    words = "WEBP holds no image of 16400x16, since its sides end at 16383: write another format, such as PNG"
    for place, out, *options in (("in/long.png", "long.webp"), ("in", "out", "--format", "webp")):
        assert words in refused(monkeypatch, capsys, tmp_path, run, tmp_path / place, tmp_path / out, *options)
    skipping = ("--format", "webp", "--on-bad-sample", "skip")
    assert translate(monkeypatch, run, tmp_path / "in", tmp_path / "out", *skipping) == 0
    assert contents(tmp_path / "out").keys() == {"short.webp", files.CLAIM}


def test_variants_of_one_image_go_into_no_folder(
    munit: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(monkeypatch, capsys, tmp_path, munit, folder / "1.png", tmp_path, "--variants", 2)
    assert "1.png is one file and" in sentence and "a folder: name a file" in sentence


def test_a_segmenters_run_translates_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "step_1", {}, {"step": 1, "config": {"model.network": "drn"}})
    assert "holds no translator" in refused(
        monkeypatch, capsys, tmp_path, tmp_path / "step_1", folder, tmp_path / "out"
    )
