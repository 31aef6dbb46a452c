"""launch/prepare.py match as a person types it: what it leaves, the same to the byte, and what bad input gets."""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import UserError
from infra.storage import LocalStorage, open_storage
from infra.views import LabelledCrop, Tiles, View
from launch import prepare as cli
from launch.runs.data import data_identity
from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.manifest import MANIFEST, load_manifest
from pipelines.matching import describe, make, search
from pipelines.matching.match import load_facts
from tests.conftest import S3Server
from tests.launch.evaluating import make_scenes, make_segmenter
from tests.pipelines.shardmaker import write_root

pytestmark = pytest.mark.slow

REPOSITORY = Path(cli.__file__).parents[1]
CPU = torch.device("cpu")
KINDS = ("npy", "json", "png")


def run(*arguments: object) -> int:
    """The exit code of the command line, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def match(root: object, *options: object, by: str = "labels", workers: int = 1) -> int:
    return run("match", root, "--by", *by.split(), "--crop", "16", "--k", "3", "--workers", workers, *options)


def files(root: str, name: str) -> list[bytes]:
    storage = open_storage(root)
    return [storage.read(f"matches/{name}.{kind}") for kind in KINDS]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture(scope="module")
def segmenter(scenes: Path) -> Path:
    return make_segmenter(scenes.parent / "segmenter", scenes)


@pytest.fixture(scope="module")
def made(scenes: Path, segmenter: Path) -> Path:
    """Data with a match of each way."""
    for by in (f"segmenter {segmenter}", "labels", "thumbnail"):
        assert match(scenes, by=by) == 0
    return scenes


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "data")


# ---- what is made -----------------------------------------------------------------------------------------------------


def test_each_way_leaves_a_match_and_inspect_names_it(
    made: Path, segmenter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(path.name for path in (made / "matches").iterdir()) == sorted(
        f"{by}.{kind}" for by in ("segmenter", "labels", "thumbnail") for kind in KINDS
    )
    assert run("inspect", made) == 0
    printed = capsys.readouterr().out
    for by in ("segmenter", "labels", "thumbnail"):
        assert f"match {by}: by {by}, 3 target crops for each source crop of 16x16" in printed
    facts = {by: load_facts(LocalStorage(made), by) for by in ("segmenter", "labels", "thumbnail")}
    assert facts["segmenter"].segmenter and not facts["labels"].segmenter
    assert facts["segmenter"].classes == "segmenter" and facts["thumbnail"].classes == "labels"
    # true classes are the same whatever was compared, and what was matched is nearer to the source
    assert facts["labels"].shares["source"] == facts["thumbnail"].shares["source"]
    before, after = facts["labels"].mismatch()
    assert after < before


def test_images_without_labels_are_matched_by_thumbnail(tmp_path: Path) -> None:
    write_root(LocalStorage(tmp_path))
    manifest = load_manifest(LocalStorage(tmp_path))
    splits = {name: dataclasses.replace(split, label_space=None) for name, split in manifest.splits.items()}
    (tmp_path / MANIFEST).write_text(dataclasses.replace(manifest, splits=splits).to_json())
    assert match(tmp_path, by="thumbnail") == 0
    assert not load_facts(LocalStorage(tmp_path), "thumbnail").shares
    assert not (tmp_path / "matches" / "thumbnail.png").exists()
    assert run("inspect", tmp_path) == 0


def test_two_workers_and_s3_give_the_bytes_of_one_on_a_disk(
    made: Path, copy: Path, segmenter: Path, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.rmtree(copy / "matches")
    url = f"s3://{s3_server.make_bucket()}/scenes"
    bucket = open_storage(url)
    for name in LocalStorage(copy).list():
        bucket.upload(copy / name, name)
    for root, by, workers in ((str(copy), f"segmenter {segmenter}", 2), (url, "thumbnail", 1)):
        assert match(root, by=by, workers=workers) == 0
        assert files(root, by.split()[0]) == files(str(made), by.split()[0])
    loaders = [
        Loader(
            root, DataConfig(crop=16, decoder="pillow", match="thumbnail", cache_dir=str(tmp_path / "shards")), seed=0,
            global_batch=4, device=CPU,
        )
        for root in (url, str(made))
    ]  # fmt: skip
    steps = [next(iter(loader))[0].target for loader in loaders]
    assert (steps[0] == steps[1]).all()
    for loader in loaders:
        loader.close()
    assert not [path for path in tmp_path.rglob("*.npz")]


def test_a_match_that_was_killed_is_continued_to_the_same_bytes(
    copy: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image a piece, so that there is something to continue."""
    shutil.rmtree(copy / "matches")
    slow = (
        "import sys, time; sys.argv[0] = 'prepare.py'; from pipelines.matching import describe, make; describe._IMAGES = 1\n"
        "def slowly(*a, nearest=make.nearest): time.sleep(.5); return nearest(*a)\n"
        "make.nearest = slowly; from launch import prepare; prepare.main()"
    )
    options = ["match", str(copy), "--by", "labels", "--crop", "16", "--k", "3", "--workers", "1"]
    job = subprocess.Popen([sys.executable, "-c", slow, *options], env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    work = copy / "matches" / "labels.work"
    deadline = time.monotonic() + 120
    while not (work / "found" / "000000001.npy").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    job.kill()
    job.wait()
    (work / "target" / "000000002.npz").unlink()  # as if it had been killed before that was described
    assert len(list((work / "found").iterdir())) < 4 and not (copy / "matches" / "labels.json").exists()

    described: list[str] = []
    searched: list[int] = []

    def describe_and_note(describer: describe.Describer, piece: describe.Piece) -> None:
        described.append(piece.name)
        describer(piece)

    def search_and_note(source: np.ndarray, *given: Any) -> np.ndarray:
        searched.append(len(source))
        return search.nearest(source, *given)

    monkeypatch.setattr(describe, "_IMAGES", 1)
    monkeypatch.setattr(describe, "_describe", describe_and_note)
    monkeypatch.setattr(make, "nearest", search_and_note)
    assert run(*options) == 0
    assert described == ["target/000000002.npz"] and 0 < len(searched) < 3
    assert files(str(copy), "labels") == files(str(made), "labels")
    assert sorted(path.name for path in (copy / "matches").iterdir()) == [f"labels.{kind}" for kind in sorted(KINDS)]


def test_what_other_options_left_unfinished_is_not_used(copy: Path, made: Path) -> None:
    work = copy / "matches" / "labels.work"
    (work / "source").mkdir(parents=True)
    (work / "match.json").write_text(json.dumps({"k": 7}))
    np.savez(work / "source" / "000000000.npz", descriptors=np.zeros((1, 1), np.uint8))
    (copy / "matches" / "labels.json").unlink()
    assert match(copy) == 0
    assert files(str(copy), "labels") == files(str(made), "labels") and not work.exists()


def test_a_match_that_another_process_finished_meanwhile_is_left_as_it_is(
    copy: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "matches")
    claimed, describing, described = make._claimed, make.describe, list[int]()

    def describe_and_note(*given: Any) -> None:
        described.append(1)
        describing(*given)

    @contextmanager
    def claimed_late(*given: Any) -> Iterator[None]:
        monkeypatch.setattr(make, "_claimed", claimed)
        assert match(copy) == 0  # by the other process
        with claimed(*given):
            yield

    monkeypatch.setattr(make, "describe", describe_and_note)
    monkeypatch.setattr(make, "_claimed", claimed_late)
    assert match(copy) == 0
    assert len(described) == 1 and files(str(copy), "labels") == files(str(made), "labels")
    assert sorted(path.name for path in (copy / "matches").iterdir()) == [f"labels.{kind}" for kind in sorted(KINDS)]


def test_one_process_makes_a_match_and_a_lock_file_that_was_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock, removed = tmp_path / ".lock", fcntl.flock, list[int]()

    def removed_before(file: Any, operation: int) -> None:
        if not removed:
            removed.append(1)
            path.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with make._locked(path, "near"):
        assert removed and path.exists()
        with (
            pytest.raises(UserError, match="another process makes the match near: wait for it"),
            make._locked(path, "near"),
        ):
            pass
    assert not path.exists()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("piece", ["target/000000002.npz", "found/000000001.npy"])
def test_a_piece_of_work_that_is_damaged_is_made_anew_by_the_same_command(
    copy: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], piece: str
) -> None:
    monkeypatch.setattr(describe, "_IMAGES", 1)
    shutil.rmtree(copy / "matches")
    with monkeypatch.context() as stopping:
        stopping.setattr(make._Maker, "_shares", stop)
        assert match(copy) == 130
    work = copy / "matches" / "labels.work" / piece
    work.write_bytes(work.read_bytes()[:-40])
    if piece.startswith("target"):
        shutil.rmtree(work.parents[1] / "found")
    assert match(copy) == 2
    assert f"{piece} is damaged" in capsys.readouterr().err
    assert match(copy) == 0 and files(str(copy), "labels") == files(str(made), "labels")


def test_the_same_command_on_a_finished_match_changes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = [path.stat().st_mtime_ns for path in sorted((copy / "matches").iterdir())]
    assert match(copy) == 0
    assert f"already matched: {copy}/matches/labels.json" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in sorted((copy / "matches").iterdir())] == times


# ---- what bad input gets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--by", "colours"], "--by colours is no way to match: give 'segmenter RUN', 'labels' or 'thumbnail'"),
        (["--by", "segmenter"], "--by segmenter is no way to match"),
        (["--by", "labels", "runs/x"], "--by labels runs/x is no way to match"),
        (["--by", "segmenter", "/no/such"], "there is no segmenter /no/such"),
        (["--by", "labels", "--k", "0"], "--k 0 is impossible"),
        (["--by", "labels", "--crop", "32", "--k", "41"], "--k 41 is more than the 40 crops of the target images"),
        (["--by", "labels", "--crop", "33"], "crops of 33x33 pixels cannot be cut from the source images of 64x32: pass"),
        (["--by", "labels", "--crop", "x"], "--crop x is no size"),
        (["--by", "labels", "--crop", "0"], "crops of 0x0 pixels cannot be cut"),
        (["--by", "labels", "--grid", "four"], "--grid four is no grid: write COLUMNSxROWS, for example 4x4"),
        (["--by", "labels", "--grid", "9x8"], "a grid of 9x8 is too fine: give at most 64 squares"),
        (["--by", "labels", "--grid", "4x4", "--crop", "3"], "a crop of 3x3 pixels has no 4x4 squares"),
        (["--by", "thumbnail", "--grid", "4x4"], "a thumbnail has 8x8 squares: leave out --grid"),
        (["--by", "labels", "--name", "../x"], "'../x' cannot be the name of a match"),
        (["--by", "labels", "--name", "none"], "'none' cannot be the name of a match"),
        (["--by", "labels", "--workers", "0", "--name", "x"], "0 workers are impossible"),
        (["--by", "labels", "--k", "3", "--crop", "8"], "the match labels of ROOT was made with crop = (16, 16), not (8, 8)"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)  # fmt: skip
def test_the_users_mistakes_exit_with_2(
    made: Path, capsys: pytest.CaptureFixture[str], line: list[str], words: str
) -> None:
    assert run("match", made, "--crop", "16", "--workers", "1", *line) == 2
    message = capsys.readouterr().err
    assert words.replace("ROOT", str(made)) in message and "Traceback" not in message
    assert len(list((made / "matches").glob("*.json"))) == 3
    assert not list((made / "matches").glob("*.work"))


def test_unlabelled_images_have_no_labels_to_match_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_root(LocalStorage(tmp_path))
    manifest = load_manifest(LocalStorage(tmp_path))
    splits = dict(manifest.splits)
    splits["train/target"] = dataclasses.replace(splits["train/target"], label_space=None)
    (tmp_path / MANIFEST).write_text(dataclasses.replace(manifest, splits=splits).to_json())
    assert match(tmp_path) == 2
    assert "the target images have no labels of cityscapes19: match --by segmenter" in capsys.readouterr().err


def test_whole_images_of_two_sizes_have_no_crops_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_root(LocalStorage(tmp_path))
    manifest = load_manifest(LocalStorage(tmp_path))
    splits = manifest.splits | {
        "train/target": dataclasses.replace(manifest.splits["train/target"], image_size=(64, 48))
    }
    (tmp_path / MANIFEST).write_text(dataclasses.replace(manifest, splits=splits).to_json())
    assert run("match", tmp_path, "--by", "thumbnail", "--crop", "none", "--workers", "1") == 2
    assert "whole images of 48x32 and 64x48 are not of one size: give a --crop" in capsys.readouterr().err


def loads(root: Path, view: View | None = None, **options: object) -> None:
    config = DataConfig(**{"crop": 16, "decoder": "pillow", "match": "labels"} | options)  # type: ignore[arg-type]
    views = {} if view is None else {"view": view}
    Loader(str(root), config, **views, seed=0, global_batch=2, device=CPU).close()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"match": "nope"}, "there is no match nope at .*, or choose one of labels, segmenter, thumbnail"),
        ({"match": "a/b"}, "'a/b' cannot be the name of a match"),
        ({"crop": 8}, "the match labels is of crops of 16x16 pixels, and the training's are 8x8"),
        ({"crop": None}, "the match labels is of crops of 16x16 pixels, and the training's are 64x32"),
        ({"flip": False}, "the match labels has mirrored candidates, and --data.flip false mirrors nothing"),
        ({"view": LabelledCrop(domain="target")}, "--data.match pairs crops of two images, .* labelled images of one"),
        ({"view": Tiles(zoom=0.5, epoch=9)}, "--data.match pairs crops of two images, .* tiles of one image"),
    ],
)
def test_a_match_that_does_not_fit_the_training(made: Path, options: dict[str, object], words: str) -> None:
    loads(made)
    with pytest.raises(UserError, match=words):
        loads(made, **options)  # type: ignore[arg-type]


def test_a_match_without_mirrored_candidates_fits_crops_that_are_not_mirrored(copy: Path) -> None:
    assert match(copy, "--no-mirror", "--name", "straight") == 0
    loads(copy, match="straight", flip=False)
    codes = np.load(copy / "matches" / "straight.npy")
    assert (codes % 2 == 0).all() and (np.load(copy / "matches" / "labels.npy") % 2).any()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "labels.npy").unlink(), "labels.npy is damaged \\(it is missing\\): delete labels.json"),
        (lambda folder: (folder / "labels.npy").write_bytes(b"x"), "labels.npy is damaged \\(its SHA-256 is not that"),
        (lambda folder: (folder / "labels.json").write_text("{"), "labels.json is damaged \\(Expecting"),
        (lambda folder: (folder / "labels.json").write_text("[]"), "labels.json is damaged"),
        (lambda folder: (folder / "labels.json").write_bytes(b"\xff"), "labels.json is damaged"),
        (lambda folder: (folder / "labels.json").write_text('{"format": 1}'), "labels.json is damaged"),
        (lambda folder: change(folder.parent / MANIFEST), "the match labels of .* was made for other data"),
    ],
)  # fmt: skip
def test_a_damaged_match_and_one_of_other_data(
    copy: Path, damage: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    damage(copy / "matches")
    with pytest.raises(UserError, match=words) as caught:
        loads(copy)
    assert "\n" not in str(caught.value)
    assert run("inspect", copy) == 2
    printed = capsys.readouterr().out
    assert "every shard is complete and unchanged" in printed
    assert ("match thumbnail: by thumbnail" in printed) == ("other data" not in words)


def change(file: Path) -> None:
    manifest = load_manifest(LocalStorage(file.parent))
    file.write_text(dataclasses.replace(manifest, paired=not manifest.paired).to_json())


def test_the_identity_of_the_data_has_the_match_in_it(copy: Path) -> None:
    plain, before = data_identity(str(copy)), data_identity(str(copy), "labels")
    assert len({plain, before, data_identity(str(copy), "thumbnail")}) == 3
    (copy / "matches" / "labels.json").unlink()
    assert match(copy, "--k", "2") == 0
    assert data_identity(str(copy), "labels") != before and data_identity(str(copy)) == plain
