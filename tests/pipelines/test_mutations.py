"""Manifests and indexes that were damaged, or written by somebody who means harm: one sentence, or the same samples."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from infra.storage import LocalStorage
from pipelines.cache import ShardCache, UnusableShard
from pipelines.inspection import verify
from pipelines.manifest import MANIFEST, Manifest, index_from_json, load_manifest
from pipelines.shards import Sample, build_tar, write_shard
from tests.mutations import mutations
from tests.pipelines.shardmaker import smooth_image, write_root

COUNT = 1000


def test_a_mutated_manifest_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    original = write_root(storage)
    for mutated in mutations(storage.read(MANIFEST), COUNT):
        (tmp_path / MANIFEST).write_bytes(mutated)
        try:
            found = load_manifest(storage)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        else:  # as written, in other bytes or without its hash
            assert found == original


def test_a_mutated_manifest_whose_hash_fits_is_refused_or_leads_to_no_other_samples(tmp_path: Path) -> None:
    """As somebody writes it who means harm, or an earlier version, which wrote no hash."""
    storage = LocalStorage(tmp_path)
    original = write_root(storage)
    plain = json.loads(original.to_json())
    del plain["sha256"]
    right = samples(storage, original)
    loaded = 0
    for mutated in mutations(json.dumps(plain).encode(), COUNT):
        (tmp_path / MANIFEST).write_bytes(mutated)
        try:
            found = samples(storage, load_manifest(storage))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            loaded += 1
            assert found.items() <= right.items()
    assert loaded < COUNT / 2


def samples(storage: LocalStorage, manifest: Manifest) -> dict[str, tuple[bytes, bytes]]:
    """Image and label by key."""
    cache, found = ShardCache(storage), {}
    for split in manifest.splits.values():
        for shard in split.shards:
            opened = cache.open(shard)
            for entry in opened.entries:
                assert entry.label
                found[entry.key] = opened.read(entry.image), opened.read(entry.label)
    return found


def test_a_mutated_index_whose_hash_fits_is_named_and_leads_to_no_other_samples(tmp_path: Path) -> None:
    """The hash in the manifest is that of the mutated index: nothing but the tar can tell, which is what is trained from."""
    storage = LocalStorage(tmp_path)
    manifest = write_root(storage, source=(4,), target=(1,))
    split = manifest.splits["train/source"]
    (shard,) = split.shards
    original = storage.read(shard.index_name)
    whole = ShardCache(storage).open(shard).entries
    for mutated in mutations(original, COUNT):
        (tmp_path / shard.index_name).write_bytes(mutated)
        stated = dataclasses.replace(shard, index_sha256=hashlib.sha256(mutated).hexdigest())
        try:
            verify(storage, Manifest({"train/source": dataclasses.replace(split, shards=(stated,))}), progress=False)
        except UserError as error:
            assert shard.index_name in str(error) and "\n" not in str(error)
        else:  # in other bytes
            assert index_from_json(mutated) == list(whole)
    assert ShardCache(storage).open(stated).entries == whole


def test_a_mutated_tar_whose_hash_fits_is_refused_or_leads_to_bytes_within_it(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    shard = write_root(storage, source=(4,), target=(1,)).splits["train/source"].shards[0]
    original, draw, refused = storage.read(shard.name), random.Random(0), 0
    headers = [place for place in range(0, len(original), 512) if original[place + 257 :][:5] == b"ustar"]
    assert len(headers) == 12
    for _ in range(COUNT // 4):
        data = bytearray(original)
        header = draw.choice(headers)
        data[header + draw.randrange(512)] ^= 1 << draw.randrange(8)
        if draw.random() < 0.5:  # of somebody who means harm the checksum fits, too
            data[header + 148 : header + 156] = b" " * 8
            data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
        del data[draw.choice((len(data), draw.randrange(len(data)))) :]
        storage.write(shard.name, bytes(data))
        try:
            opened = ShardCache(storage).open(dataclasses.replace(shard, sha256=hashlib.sha256(data).hexdigest()))
        except UnusableShard as error:
            refused += 1
            assert shard.name in str(error) and "\n" not in str(error)
        else:
            assert len(opened.entries) == 4
            for entry in opened.entries:
                assert all(0 < sum(part) <= len(data) for part in (entry.image, entry.label) if part)
    assert 0.6 * COUNT // 4 < refused < COUNT // 4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        *(({"name": name}, "cannot be the name of a shard")
          for name in ("../outside.tar", "/etc/shadow.tar", "train//0.tar", "a\\b.tar", "train/../../x.tar", "x")),
        *(({"sha256": sha256}, "has no SHA-256") for sha256 in ("", "../" * 20 + "home", "A" * 64, "0" * 63)),
    ],
)  # fmt: skip
def test_neither_a_name_nor_a_hash_leads_to_a_file_elsewhere(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    storage = LocalStorage(tmp_path)
    split = write_root(storage).splits["train/source"]
    strange = dataclasses.replace(split, shards=(dataclasses.replace(split.shards[0], **changed),))
    storage.write(MANIFEST, Manifest({"train/source": strange}).to_json().encode())
    with pytest.raises(UserError, match=words):
        load_manifest(storage)


def test_samples_with_names_too_long_for_a_header_are_found(tmp_path: Path) -> None:
    import numpy as np

    image = smooth_image(np.random.default_rng(0), (48, 32))
    storage = LocalStorage(tmp_path)
    tar = build_tar(Sample("long-" * 50 + str(i), image) for i in range(3))
    shard = write_shard(storage, "train/source/0.tar", tar).shard
    opened = ShardCache(storage).open(shard)
    assert len(opened.entries) == 3
    assert [opened.read(entry.image)[:3] for entry in opened.entries] == [b"\xff\xd8\xff"] * 3
    assert [entry.key for entry in opened.entries] == ["long-" * 50 + str(i) for i in range(3)]
