"""launch/prepare.py as a person types it: output, exit codes, and a run that is killed half way."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.storage import LocalStorage
from launch import prepare as cli
from pipelines.dataset import ImageDataset
from pipelines.manifest import load_manifest
from tests.conftest import S3Server

pytestmark = pytest.mark.slow

SCRIPT = Path(cli.__file__)


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """The exit code of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def scenes(out: object, *more: str) -> list[str]:
    return [
        "street-scenes",
        "--count",
        "2",
        "--test-count",
        "1",
        "--size",
        "64x32",
        "--workers",
        "1",
        "--out",
        str(out),
        *more,
    ]


def test_prepare_then_inspect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *scenes(tmp_path, "--source-layout", "street_trees=0.9", "--quality", "80")) == 0
    manifest = load_manifest(LocalStorage(tmp_path))
    assert manifest.provenance["source_layout"]["street_trees"] == 0.9
    assert manifest.provenance["quality"] == 80
    assert run(monkeypatch, "inspect", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "train/source: 2 images of 64x32 in 1 shard" in printed
    assert "vegetation" in printed and "every shard is complete" in printed


def test_maps_are_split_and_charted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        both = np.full((16, 32, 3), 250 - 5 * number, np.uint8)
        (tmp_path / "maps" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(both).save(tmp_path / "maps" / "train" / f"{number}.png")
    out = tmp_path / "out"
    options = ["--direction", "BtoA", "--mismatch", "--add-opposite", "25", "--seed", "3", "--workers", "1"]
    assert run(monkeypatch, "paired", str(tmp_path / "maps"), *options, "--size", "16x16", "--out", str(out)) == 0
    manifest = load_manifest(LocalStorage(out))
    assert (manifest.provenance["add_opposite"], manifest.provenance["seed"]) == (25, 3)
    # 4 of its own, and of the other 4 a tenth and a quarter, which is one
    assert [manifest.splits[f"train/{domain}"].samples for domain in ("source", "target")] == [5, 5]
    assert run(monkeypatch, "inspect", str(out)) == 0
    printed = capsys.readouterr().out
    assert f"the same as a chart: {out}/distributions.png" in printed and (out / "distributions.png").is_file()
    assert "250-255" in printed and "(total variation)" in printed


def test_folders_to_s3_and_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("trainA", "trainB"):
        (tmp_path / side).mkdir()
        Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(tmp_path / side / "x.bmp")
    url = f"s3://{s3_server.make_bucket()}/prefix"
    assert run(monkeypatch, "folders", str(tmp_path), "--out", url) == 0
    assert run(monkeypatch, "inspect", url) == 0
    assert "train/target: 1 images of 256x256" in capsys.readouterr().out


@pytest.mark.usefixtures("s3_server")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["folders", "/no/such/folder", "--out", "OUT"], "/no/such/folder/trainA does not exist"),
        (["cityscapes", "/no/such/folder", "--out", "OUT"], "/no/such/folder/leftImg8bit/train does not exist"),
        (["gta5", "/no/such/folder", "--out", "OUT"], "/no/such/folder/images does not exist"),
        (["paired", "/no/such/folder", "--out", "OUT"], "/no/such/folder/train does not exist"),
        (
            ["folders", "/no/such/folder", "--domains", "cat", "dog", "--out", "OUT"],
            "train/cat: check the path, or name",
        ),
        (["cityscapes", "X", "--domain", "target", "--mismatch", "--out", "OUT"], "--mismatch splits pairs in two"),
        (["cityscapes", "X", "--add-opposite", "50", "--out", "OUT"], "change what --mismatch does: add it"),
        (["cityscapes", "X", "--mismatch", "--add-opposite", "101", "--out", "OUT"], "101 % of the opposite"),
        (["paired", "X", "--seed", "1", "--out", "OUT"], "change what --mismatch does: add it"),
        (["paired", "X", "--mismatch", "--seed", "-1", "--out", "OUT"], "the seed -1 is impossible"),
        (["paired", "X", "--mismatch", "--distinct", "--out", "OUT"], "leave out one of them"),
        (["folders", "X", "--mismatch", "--out", "OUT"], "unrecognized arguments: --mismatch"),
        (["gta5", "X", "--mismatch", "--out", "OUT"], "--mismatch"),
        (scenes("OUT", "--size", "64*32"), "'64*32' is not an image size"),
        (scenes("OUT", "--size", "0x32"), "'0x32' is not an image size"),
        (scenes("OUT", "--size", "8x8"), "too small"),
        (scenes("OUT", "--quality", "0"), "quality 0"),
        (scenes("OUT", "--workers", "0"), "0 workers"),
        (scenes("OUT", "--shard-size", "0"), "0 samples a shard"),
        (scenes("OUT", "--source-layout", "clouds=1"), "no 'clouds'"),
        (scenes("s3://no-such-bucket/x"), "bucket no-such-bucket does not exist"),
        (["inspect", "OUT"], "no prepared data at"),
        (["inspect", "s3://no-such-bucket/x"], "bucket no-such-bucket does not exist"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "SOURCE"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_the_users_mistakes_exit_with_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    out = str(tmp_path / "out")
    assert run(monkeypatch, *[out if arg == "OUT" else arg for arg in args]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert not list(Path(tmp_path).rglob("*.tar"))


def test_inspect_names_a_damaged_shard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *scenes(tmp_path)) == 0
    shard = tmp_path / "train" / "target" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert run(monkeypatch, "inspect", str(tmp_path)) == 2
    assert "train/target/000000.tar is damaged" in capsys.readouterr().err


def test_every_command_explains_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    overview = capsys.readouterr().out
    assert "examples:" in overview
    (commands,) = (a.choices for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert len(commands) >= 9
    for command in commands:
        assert command in overview
        assert run(monkeypatch, command, "--help") == 0
        assert ("--out ROOT" in capsys.readouterr().out) == (command not in ("inspect", "match"))


def test_a_killed_preparation_is_continued_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def args(out: Path, workers: int) -> list[str]:
        sizes = ["--count", "60", "--test-count", "2", "--size", "96x64", "--shard-size", "2"]
        return ["street-scenes", *sizes, "--workers", str(workers), "--out", str(out)]

    process = subprocess.Popen(
        [sys.executable, SCRIPT, *args(killed, 2)], stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while not list(killed.rglob("*.index.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists()
    time.sleep(0.5)  # the workers see that their parent is gone
    finished = {index.with_name(index.name.replace(".index.json", ".tar")) for index in killed.rglob("*.index.json")}
    times = {path: path.stat().st_mtime_ns for path in finished}
    assert 0 < len(times) < 62

    assert run(monkeypatch, *args(killed, 1)) == 0
    assert run(monkeypatch, *args(whole, 1)) == 0
    files = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert {path.relative_to(killed): path.read_bytes() for path in killed.rglob("*") if path.is_file()} == files
    assert {path: path.stat().st_mtime_ns for path in finished} == times


def test_two_images_keep_their_sizes_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (width, height) in (("painting.png", (90, 60)), ("photo.png", (40, 70))):
        Image.fromarray(np.full((height, width, 3), width, np.uint8)).save(tmp_path / name)
    files = [str(tmp_path / name) for name in ("painting.png", "photo.png")]
    for limit, source, target in ((None, (90, 60), (40, 70)), (80, (80, 53), (40, 70)), (45, (45, 30), (26, 45))):
        out = str(tmp_path / f"out{limit}")
        options = ["--limit", str(limit)] if limit else []
        assert run(monkeypatch, "images", *files, *options, "--format", "png", "--workers", "1", "--out", out) == 0
        splits = load_manifest(LocalStorage(Path(out))).splits
        for split in ("train", "test"):
            sizes = [splits[f"{split}/{domain}"].image_size for domain in ("source", "target")]
            assert sizes == [source, target] and splits[f"{split}/source"].samples == 1
        assert ImageDataset(out, "train", "source").read(0)[0].shape == (source[1], source[0], 3)
    assert run(monkeypatch, "images", *files, "--limit", "45", "--format", "png", "--out", out) == 0  # the same again
    assert "already prepared" in capsys.readouterr().out
    assert run(monkeypatch, "images", *files, "--limit", "46", "--format", "png", "--out", out) == 2
    assert "was prepared with limit = 45, not 46" in capsys.readouterr().err
    assert run(monkeypatch, "images", *files, "--limit", "0", "--out", str(tmp_path / "x")) == 2
    assert run(monkeypatch, "images", files[0], str(tmp_path / "none.png"), "--out", str(tmp_path / "x")) == 2
    assert "none.png does not exist" in capsys.readouterr().err


def test_a_street_is_painted_and_photographed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "painting", "--size", "96x64", "--workers", "1", "--out", str(tmp_path)) == 0
    manifest = load_manifest(LocalStorage(tmp_path))
    assert manifest.paired and all(split.samples == 1 for split in manifest.splits.values())
    pictures = [ImageDataset(str(tmp_path), "train", domain).read(0)[0] for domain in ("source", "target")]
    assert all(np.ptp(picture, axis=2).mean() > 0 for picture in pictures)
    assert np.ptp(pictures[0], axis=2).mean() > 2 * np.ptp(pictures[1], axis=2).mean()  # in stronger colours
