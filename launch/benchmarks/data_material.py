"""What the data benchmark reads: street scenes, drawn once, as folders of JPEG files and as data roots."""

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from webdataset import TarWriter

from infra.errors import UserError
from infra.storage import LocalStorage
from pipelines.manifest import DOMAINS, MANIFEST, Manifest, Split, index_from_json, load_manifest
from pipelines.prepare import STREET_SIZE
from pipelines.shards import write_shard

PHOTO_SIZE = (1024, 512)  # of the images to be prepared, (width, height)
SHARD = 64  # samples of one shard: an epoch of 2,048 pairs has four windows of eight shards, so fetching has to keep up
LARGE_SHARD = 250  # of the data root with very many samples
FOLDERS = {"source": "trainA", "target": "trainB"}
QUALITY = 95  # of every JPEG file
LAUNCH = Path(__file__).parents[1]


@dataclass(frozen=True)
class Material:
    """work: the folder that holds it all, free for more. photos: trainA and trainB of large JPEG files, to be prepared.
    folder: trainA and trainB of 512x256 JPEG files. s3: a folder to serve; its bucket "bucket" holds `root`.
    root: a data root of distinct shards, as a training reads it."""

    work: Path
    photos: Path
    folder: Path
    s3: Path
    root: Path

    @property
    def url(self) -> str:
        """The root, once `s3` is served."""
        return "s3://" + self.root.relative_to(self.s3).as_posix()


def make_material(work: Path, scenes: int, pairs: int, workers: int) -> Material:
    """Draw `scenes` scenes a domain and make of them a data root with `pairs` samples a domain.

    The samples repeat the scenes; no two shards are alike, as the shard cache knows a file by its hash.
    """
    s3 = work / "s3"
    made = Material(work, work / "photos", work / "folder", s3, s3 / "bucket" / "streets")
    run_prepare(
        "street-scenes", "--count", str(scenes), "--test-count", "0", "--size", "{}x{}".format(*PHOTO_SIZE),
        "--shard-size", "16", "--out", str(work / "drawn"), "--workers", str(workers),
    )  # fmt: skip
    unpack(work / "drawn", made.photos)
    prepare_photos(made.photos, work / "prepared", workers)
    unpack(work / "prepared", made.folder)
    write_root(made.root, made.folder, pairs)
    return made


def repeat_photos(photos: Path, many: Path, count: int) -> None:
    """MANY/trainA and MANY/trainB with `count` files each, hard links to those of `photos` over and over."""
    for name in FOLDERS.values():
        (many / name).mkdir(parents=True)
        files = itertools.cycle(sorted((photos / name).iterdir()))
        for number, file in zip(range(count), files, strict=False):
            os.link(file, many / name / f"{number:06d}.jpg")


def prepare_photos(photos: Path, out: Path, workers: int) -> None:
    """The command that a person types, over a folder of large JPEG files."""
    run_prepare(
        "folders", str(photos), "--size", "{}x{}".format(*STREET_SIZE), "--quality", str(QUALITY),
        "--shard-size", str(SHARD), "--out", str(out), "--workers", str(workers),
    )  # fmt: skip


def run_prepare(*arguments: str) -> None:
    run_quietly(str(LAUNCH / "prepare.py"), *arguments)


def run_quietly(*arguments: str) -> str:
    """Run this Python with these arguments; its output. UserError with its last line if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=LAUNCH.parent, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a part of the benchmark failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


def unpack(root: Path, folder: Path) -> None:
    """The training images of a data root as files of FOLDER/trainA (source) and FOLDER/trainB (target)."""
    storage = LocalStorage(root)
    manifest = load_manifest(storage)
    for domain, name in FOLDERS.items():
        (folder / name).mkdir(parents=True)
        for shard in manifest.split("train", domain).shards:
            tar = storage.read(shard.name)
            for entry in index_from_json(storage.read(shard.index_name).decode()):
                offset, length = entry.image
                (folder / name / f"{entry.key}.jpg").write_bytes(tar[offset : offset + length])


def write_root(root: Path, folder: Path, samples: int) -> None:
    """A data root with so many samples a domain, in shards of at most `SHARD`, of a folder's images over and over."""
    storage = LocalStorage(root)
    splits = {}
    for domain in DOMAINS:
        jpegs = _jpegs_for_ever(folder, domain)
        shards = [
            write_shard(
                storage, f"train/{domain}/{first // SHARD:06d}.tar", _tar(first, jpegs, min(SHARD, samples - first))
            ).shard
            for first in range(0, samples, SHARD)
        ]
        splits[f"train/{domain}"] = Split(tuple(shards), STREET_SIZE)
    storage.write(MANIFEST, Manifest(splits).to_json().encode())


def write_large_root(root: Path, folder: Path, samples: int) -> None:
    """A data root with about so many samples a domain, all of whose shards are hard links to one of each domain."""
    storage = LocalStorage(root)
    splits = {}
    for domain in DOMAINS:
        tar = _tar(0, _jpegs_for_ever(folder, domain), LARGE_SHARD)
        first = write_shard(storage, f"train/{domain}/000000.tar", tar).shard
        shards = [replace(first, name=f"train/{domain}/{n:06d}.tar") for n in range(-(-samples // LARGE_SHARD))]
        for shard in shards[1:]:
            for there, name in ((first.name, shard.name), (first.index_name, shard.index_name)):
                os.link(root / there, root / name)
        splits[f"train/{domain}"] = Split(tuple(shards), STREET_SIZE)
    storage.write(MANIFEST, Manifest(splits).to_json().encode())


def _jpegs_for_ever(folder: Path, domain: str) -> Iterator[bytes]:
    return itertools.cycle([path.read_bytes() for path in sorted((folder / FOLDERS[domain]).glob("*.jpg"))])


def _tar(first: int, jpegs: Iterator[bytes], samples: int) -> bytes:
    """A shard of the next `samples` JPEG files, numbered from `first` on."""
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False) as tar:
        for number, jpeg in zip(range(first, first + samples), jpegs, strict=False):
            tar.write({"__key__": f"{number:07d}", "jpg": jpeg})
    return buffer.getvalue()
