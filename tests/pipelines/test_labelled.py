"""Labelled batches: image and label stay together through crops, flips, decoders, ranks and restarts."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.errors import UserError
from infra.storage import LocalStorage
from infra.views import LabelledCrop
from pipelines.config import DataConfig
from pipelines.labels import IGNORE
from pipelines.loader import LabelledBatch, Loader
from pipelines.manifest import MANIFEST, Manifest, Split
from pipelines.shards import LABEL_SPACE, Sample, build_tar, write_shard
from tests.pipelines.shardmaker import write_split

has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
kinds = ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not has_dali, reason="DALI is not installed"))]
CONFIG = DataConfig(crop=None, threads=1, decoder="pillow")
SIZE = (48, 32)
GRAY_OF_TRAINID = np.full(256, 250, np.uint8)
GRAY_OF_TRAINID[:19] = 7 + 12 * np.arange(19)


def label_of(number: int) -> np.ndarray:
    """uint8 (32, 48): trainIds in blocks, some ignored."""
    draw = np.random.default_rng(number)
    coarse = draw.choice([*range(19), IGNORE], (8, 12)).astype(np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)


def write(root: Path, labels: Sequence[np.ndarray | None], domain: str = "target", **facts: Any) -> str:
    """A data root whose images show their own labels, as grays."""
    shown = [
        Image.fromarray(GRAY_OF_TRAINID[label_of(n) if label is None else label]) for n, label in enumerate(labels)
    ]
    samples = [Sample(f"s{n}", shown[n].convert("RGB"), label) for n, label in enumerate(labels)]
    shards = [
        write_shard(
            LocalStorage(root), f"train/{domain}/{n:06d}.tar", build_tar(samples[3 * n : 3 * n + 3], "png")
        ).shard
        for n in range(-(-len(samples) // 3))
    ]
    split = Split(tuple(shards), **{"image_size": SIZE, "label_space": LABEL_SPACE} | facts)
    LocalStorage(root).write(MANIFEST, Manifest({f"train/{domain}": split}).to_json().encode())
    return str(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data"), [label_of(n) for n in range(7)])


def steps(root: str, count: int, config: DataConfig = CONFIG, domain: str = "target", **options: Any) -> list:
    given: dict[str, Any] = {"seed": 5, "global_batch": 4, "device": torch.device("cpu")}
    loader = Loader(root, config, LabelledCrop(domain=domain), **given | options)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def by_slot(batches: Sequence[LabelledBatch]) -> dict[int, tuple]:
    return {
        int(slot): (batch.keys[i], batch.images[i].numpy().tobytes(), batch.labels[i].numpy().tobytes())
        for batch in batches
        for i, slot in enumerate(batch.slots)
    }


@pytest.mark.parametrize("decoder", kinds)
@pytest.mark.parametrize("crop", [None, 16])
def test_a_label_is_cut_and_mirrored_with_its_image_and_its_ids_are_exact(
    root: str, decoder: str, crop: int | None
) -> None:
    config = dataclasses.replace(CONFIG, decoder=decoder, crop=crop)
    width, height = (crop, crop) if crop else SIZE
    kept: list[tuple[str, np.ndarray]] = []
    for (batch,) in steps(root, 6, config):
        assert batch.images.shape == (4, 3, height, width) and batch.images.dtype == torch.float32
        assert batch.labels.shape == (4, height, width) and batch.labels.dtype == torch.uint8
        grays = ((batch.images + 1) * 127.5).round().byte().numpy()
        assert np.array_equal(grays[:, 0], GRAY_OF_TRAINID[batch.labels.numpy()])
        kept += zip(batch.keys, batch.labels.numpy(), strict=True)
    whole = {f"s{n}": label_of(n) for n in range(7)}
    as_stored = [np.array_equal(label, whole[key]) for key, label in kept]
    mirrored = [np.array_equal(label, whole[key][:, ::-1]) for key, label in kept]
    if crop is None:
        assert all(a != b for a, b in zip(as_stored, mirrored, strict=True)) and 0 < sum(mirrored) < 24
    assert {key for key, _ in kept} == whole.keys()
    assert {int(value) for _, label in kept for value in np.unique(label)} == {*range(19), IGNORE}


@pytest.mark.parametrize("decoder", kinds)
def test_a_batch_keeps_its_labels_while_later_ones_are_decoded(root: str, decoder: str) -> None:
    batches = [step[0] for step in steps(root, 8, dataclasses.replace(CONFIG, decoder=decoder, flip=False))]
    for batch in batches:
        for key, label in zip(batch.keys, batch.labels, strict=True):
            assert np.array_equal(label, label_of(int(key[1:])))


def test_batches_are_the_same_for_any_ranks_accumulation_and_resume_point(root: str) -> None:
    whole = [by_slot(step) for step in steps(root, 4)][1:]
    ranks = [steps(root, 3, rank=rank, world_size=2, accumulation=2, first_step=1) for rank in range(2)]
    assert [by_slot([*first, *second]) for first, second in zip(*ranks, strict=True)] == whole


def test_an_epoch_is_one_pass_over_the_domain(root: str) -> None:
    seen = [key for step in steps(root, 7) for batch in step for key in batch.keys]  # 28 = 4 epochs of 7
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == [f"s{n}" for n in range(7)]


@pytest.mark.parametrize("decoder", kinds)
def test_a_label_that_is_no_trainid_is_named(tmp_path: Path, decoder: str) -> None:
    strange = label_of(1)
    strange[5, 7] = 33  # Cityscapes' labelId of a bicycle
    root = write(tmp_path, [label_of(0), strange])
    with pytest.raises(UserError, match=r"^the label of s1 in train/target/000000.tar holds 33, which is no trainId"):
        steps(root, 1, dataclasses.replace(CONFIG, decoder=decoder))


@pytest.mark.parametrize("decoder", kinds)
def test_a_label_smaller_than_its_image_is_named(tmp_path: Path, decoder: str) -> None:
    root = write(tmp_path, [label_of(0), np.zeros((32, 40), np.uint8)])
    with pytest.raises(UserError, match=r"^(the label of|image) s1 in .* is 40x32, too small for its crop of 48x32"):
        steps(root, 1, dataclasses.replace(CONFIG, decoder=decoder))


def test_an_image_without_its_label_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, [label_of(0), None])
    with pytest.raises(UserError, match=r"^image s1 in train/target/000000.tar has no label"):
        steps(root, 1)


def test_data_that_cannot_train_a_segmenter_is_refused_at_once(root: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train images of the source domain"):
        steps(root, 0, domain="source")
    with pytest.raises(UserError, match="crop of 33 pixels is larger than the target images of 48x32: pass --crop 32"):
        steps(root, 0, dataclasses.replace(CONFIG, crop=33))
    other = write(tmp_path / "other", [label_of(0)], label_space="camvid11")
    with pytest.raises(UserError, match="the labels of .*other are of the space 'camvid11', not cityscapes19"):
        steps(other, 0)
    storage = LocalStorage(tmp_path / "bare")
    splits = {"train/target": write_split(storage, "train/target", [2], labelled=False)}
    storage.write(MANIFEST, Manifest(splits).to_json().encode())
    with pytest.raises(UserError, match=r"the target images of .*bare have no labels: choose the other --domain"):
        steps(str(tmp_path / "bare"), 0)
