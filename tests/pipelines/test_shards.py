"""The bytes of a shard: repeatable, readable by WebDataset, and found again through the index."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from infra.storage import LocalStorage
from pipelines.manifest import index_from_json
from pipelines.shards import DamagedShard, Sample, _plain_members, build_tar, index_tar, read_shard, write_shard

NAME = "train/source/000000.tar"


def samples(count: int = 3, labelled: bool = True) -> list[Sample]:
    random = np.random.default_rng(0)
    return [
        Sample(
            key=f"{number:06d}-name",
            image=Image.fromarray(random.integers(0, 256, (16, 32, 3), np.uint8)),
            label=random.integers(0, 19, (16, 32), np.uint8) if labelled else None,
            origin={"file": f"{number}.png"},
        )
        for number in range(count)
    ]


def test_the_same_samples_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_tar(samples())
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert build_tar(samples()) == first


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(build_tar(samples(), format="png"))
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8"))
    assert [each["__key__"] for each in read] == [sample.key for sample in samples()]
    for each, sample in zip(read, samples(), strict=True):
        assert np.array_equal(each["png"], np.asarray(sample.image))
        assert sample.label is not None and np.array_equal(each["label.png"][..., 0], sample.label)
        assert each["json"] == sample.origin


def test_the_index_says_where_each_part_lies(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    tar = build_tar(samples(), format="png")
    facts = write_shard(storage, NAME, tar)
    entries = index_from_json(storage.read(facts.shard.index_name).decode())
    for entry, sample in zip(entries, samples(), strict=True):
        assert entry.key == sample.key
        for place, expected in ((entry.image, sample.image), (entry.label, sample.label)):
            assert place is not None
            part = Image.open(io.BytesIO(tar[place[0] : sum(place)]))
            assert np.array_equal(np.asarray(part), np.asarray(expected))


def test_the_facts_of_a_shard_are_those_of_its_bytes(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    facts = write_shard(storage, NAME, build_tar(samples()))
    tar = storage.read(NAME)
    assert (facts.shard.name, facts.shard.samples, facts.shard.bytes) == (NAME, 3, len(tar))
    assert facts.shard.sha256 == hashlib.sha256(tar).hexdigest()
    assert facts.shard.index_sha256 == hashlib.sha256(storage.read("train/source/000000.index.json")).hexdigest()
    assert facts.image_size == (32, 16)
    labels = np.stack([sample.label for sample in samples() if sample.label is not None])
    assert len(labels) == 3
    assert facts.class_histogram == tuple(np.bincount(labels.ravel(), minlength=19))
    assert read_shard(storage, NAME) == facts


def test_unlabelled_images_have_no_histogram(tmp_path: Path) -> None:
    facts = write_shard(LocalStorage(tmp_path), NAME, build_tar(samples(labelled=False)))
    assert facts.class_histogram is None


@pytest.mark.parametrize("fault", ["no tar", "no index", "cut tar", "other index"])
def test_an_unfinished_shard_is_not_taken_for_a_whole_one(fault: str, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    index = write_shard(storage, NAME, build_tar(samples())).shard.index_name
    match fault:
        case "no tar":
            storage.delete(NAME)
        case "no index":
            storage.delete(index)
        case "cut tar":
            storage.write(NAME, storage.read(NAME)[:3000])
        case "other index":
            storage.write(index, b"[]\n")
    assert read_shard(storage, NAME) is None


@pytest.mark.parametrize("kept", [0, 100, 512, 3000, 4096])
def test_a_truncated_tar_is_refused(kept: int) -> None:
    with pytest.raises(DamagedShard, match="the shard some/name is truncated"):
        index_tar("some/name", io.BytesIO(build_tar(samples())[:kept]))


def test_a_tar_of_other_things_is_refused() -> None:
    with pytest.raises(DamagedShard):
        index_tar("name", io.BytesIO(build_tar(samples()).replace(b".jpg", b".txt")))


def test_members_are_those_that_tarfile_finds() -> None:
    tar = build_tar(samples())
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        found = [(member.name, member.offset_data, member.size) for member in archive]
    assert _plain_members(io.BytesIO(tar)) == found and len(found) == 9
    other = bytearray(tar)
    other[found[3][1] - 512] ^= 1  # a letter of a name
    assert _plain_members(io.BytesIO(other)) is None, "the header's checksum is wrong"
    long = build_tar([Sample("long-" * 50, samples()[0].image)])
    assert _plain_members(io.BytesIO(long)) is None and len(index_tar("long", io.BytesIO(long))) == 1
