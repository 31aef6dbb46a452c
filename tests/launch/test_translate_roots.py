"""A prepared root translated into a prepared root: what is carried over, what is not, and going on after a kill."""

import dataclasses
import hashlib
import io
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import UserError
from infra.storage import LocalStorage, open_storage
from launch.translating import roots
from launch.translating.roots import Translated, translate_root, translated_part
from pipelines.dataset import ImageDataset
from pipelines.derived import Part, derive, encoding_of
from pipelines.inspection import verify
from pipelines.labels import IGNORE
from pipelines.manifest import MANIFEST, index_to_json, load_manifest
from pipelines.prepare import PREPARING, Encoding, prepare
from pipelines.shards import Sample, index_tar
from pipelines.sources.drawn import street_scenes
from tests.conftest import S3Server
from tests.launch.translating import contents, in_ranks, make_run, refused, translate
from tests.pipelines.shardmaker import write_root
from tests.trainer.small import method_config
from trainer.segmentation.segmenter import Segmenter
from trainer.translator import Translator

TRANSLATED, COPIED = ("train/source", "test/source"), ("train/target", "test/target")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven scenes a domain, in shards of three."""
    folder = tmp_path_factory.mktemp("data") / "root"
    encoding = Encoding((64, 32), format="png", shard_size=3)
    prepare(street_scenes(7, 2), open_storage(str(folder)), encoding, progress=False)
    return str(folder)


def made_translator(method: str = "cut", seed: int = 0, direction: str = "AtoB") -> Translator:
    torch.manual_seed(seed)
    return Translator(method_config(method).translation().eval(), direction=direction)


def members(root: str, shard: str) -> dict[str, bytes]:
    with tarfile.open(Path(root) / shard) as archive:
        return {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]


def test_keys_labels_and_origins_are_carried_over_and_images_are_translated(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roots, "BATCH", 2)
    translator = made_translator()
    manifest = translate_root(translator, root, str(tmp_path))
    original = load_manifest(open_storage(root))
    assert manifest == load_manifest(open_storage(str(tmp_path)))
    assert manifest.splits.keys() == original.splits.keys() and manifest.paired
    before, after = original.splits["train/source"], manifest.splits["train/source"]
    assert (after.class_histogram, after.label_space, after.image_size) == (
        before.class_histogram, before.label_space, before.image_size,
    )  # fmt: skip
    assert [shard.samples for shard in after.shards] == [3, 3, 1]
    for shard in after.shards:
        old, new = members(root, shard.name), members(str(tmp_path), shard.name)
        assert list(old) == list(new)
        assert {name: old[name] == new[name] for name in old} == {
            name: "label" in name or "json" in name for name in old
        }
    for split in COPIED:
        assert manifest.splits[split] == original.splits[split]
        for shard in original.splits[split].shards:
            assert (tmp_path / shard.name).read_bytes() == (Path(root) / shard.name).read_bytes()
    old_images, new_images = (ImageDataset(str(each), "train", "source") for each in (root, tmp_path))
    for place in range(7):
        image, translation = old_images.read(place)[0], new_images.read(place)[0]
        difference = translation.astype(int) - translator(image)
        assert abs(difference).max() <= 1  # rounding of batches


@pytest.mark.parametrize("damage", ["index", "tar"])
def test_a_killed_translation_goes_on_where_it_was(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    whole, translator = tmp_path / "whole", made_translator()
    translate_root(translator, root, str(whole))
    expected = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}

    killed, calls = tmp_path / "killed", list[int]()
    change = Translated.__call__

    def dies_in_the_third(self: Translated, samples: list[Sample]) -> list[Sample]:
        calls.append(len(samples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return change(self, samples)

    monkeypatch.setattr(Translated, "__call__", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        translate_root(translator, root, str(killed))
    assert not (killed / MANIFEST).exists() and (killed / PREPARING).exists()
    shard = killed / "train/source/000000.tar"
    broken = shard.with_suffix(".index.json") if damage == "index" else shard
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    translate_root(translator, root, str(killed))
    assert calls == [
        2,
        3,
        3,
        3,
        3,
        1,
    ]  # the two test images stay, the shard after them is broken
    assert {path.relative_to(killed): path.read_bytes() for path in killed.rglob("*") if path.is_file()} == expected
    translate_root(translator, root, str(killed))
    assert len(calls) == 6  # complete: nothing is translated again


def test_another_translator_makes_other_data(root: str, tmp_path: Path) -> None:
    translate_root(made_translator(), root, str(tmp_path))
    for translator, encoding, name in (
        (made_translator(seed=1), None, "weights"), (made_translator(), Encoding(None, "jpg"), "format"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"was prepared with {name} = .* name another output, or delete it first"):
            translate_root(translator, root, str(tmp_path), encoding)


def test_an_image_has_one_style_wherever_it_is_translated(root: str, tmp_path: Path) -> None:
    translator = made_translator("munit")
    samples = ImageDataset(root, "train", "source")
    translate_root(translator, root, str(tmp_path))
    translations = ImageDataset(str(tmp_path), "train", "source")
    for place in (0, 4):
        assert (translations.read(place)[0] == translator(samples.read(place)[0], key=samples.keys[place])).all()


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_shards_and_write_the_same_bytes(root: str, tmp_path: Path, world: int) -> None:
    translator, other = made_translator(), made_translator(seed=1)
    whole = translate_root(translator, root, str(tmp_path / "whole"))
    shared = in_ranks(world, lambda rank: translate_root(translator, root, str(tmp_path / "shared"), ranks=rank))
    assert shared == [whole] * world and contents(tmp_path / "shared") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match="was prepared with weights"):  # on all of them
        in_ranks(world, lambda rank: translate_root(other, root, str(tmp_path / "shared"), ranks=rank))


def test_both_directions_translate_their_domain(root: str, tmp_path: Path) -> None:
    made = translate_root(made_translator("cyclegan", direction="BtoA"), root, str(tmp_path))
    before = load_manifest(open_storage(root))
    changed = {name for name, split in made.splits.items() if split.shards != before.splits[name].shards}
    assert changed == set(COPIED)


def test_a_root_in_s3_becomes_one_that_every_command_takes(
    root: str, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, out = f"s3://{s3_server.make_bucket()}/source", tmp_path / "out"
    for name, data in contents(Path(root)).items():
        open_storage(source).write(name, data)
    run = make_run(tmp_path / "run")
    assert translate(monkeypatch, run, source, f"{source[:-6]}made") == 0
    assert translate(monkeypatch, run, root, out) == 0
    made = open_storage(f"{source[:-6]}made")
    assert {name: made.read(name) for name in made.list()} == contents(out)
    verify(made, load_manifest(made), progress=False)
    for place, words in ((f"{source}/below", "lies in s3://"), (source, "lies in s3://")):
        assert words in refused(monkeypatch, capsys, out, run, source, place)
    assert translate(monkeypatch, run, root, out, "--format", "jpg") == 2
    assert "was prepared with format = png, not jpg: name another output" in capsys.readouterr().err


def test_one_machine_needs_no_ray(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert translate(monkeypatch, make_run(tmp_path / "run"), root, tmp_path / "out") == 0


def tar_of(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def damaged(root: str, to: Path) -> Path:
    """A root with a training source whose image is cut off, and one with a label that is none; the hashes are right."""
    storage = LocalStorage(to)
    manifest = load_manifest(open_storage(root))
    for name, data in contents(Path(root)).items():
        storage.write(name, data)
    source = manifest.splits["train/source"]
    first, second, *others = source.shards
    parts = members(root, first.name)
    image = next(name for name in parts if name.startswith("000001") and "label" not in name and name.endswith("png"))
    label = next(name for name in parts if name.startswith("000002") and "label" in name)
    parts |= {image: parts[image][:-100], label: b"no label"}
    tar = tar_of(parts)
    index = index_to_json(index_tar(first.name, io.BytesIO(tar))).encode()
    storage.write(first.name, tar)
    storage.write(first.index_name, index)
    new = dataclasses.replace(
        first, bytes=len(tar), sha256=hashlib.sha256(tar).hexdigest(), index_sha256=hashlib.sha256(index).hexdigest()
    )
    split = dataclasses.replace(source, shards=(new, second, *others))
    storage.write(
        MANIFEST, dataclasses.replace(manifest, splits=manifest.splits | {"train/source": split}).to_json().encode()
    )
    storage.write(second.name, b"not what was written")
    return to


def test_damaged_images_and_shards_are_named_and_left_out(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, out = damaged(root, tmp_path / "source"), make_run(tmp_path / "run"), tmp_path / "out"
    assert translate(monkeypatch, run, source, out) == 2
    assert re.search(
        "error: 000001-.* in .*000000.tar cannot be decoded .*--on-bad-sample skip", capsys.readouterr().err
    )
    assert not (out / MANIFEST).exists()
    assert translate(monkeypatch, run, source, out, "--on-bad-sample", "skip") == 2
    lines = capsys.readouterr().err
    assert re.search("error: .*000001.tar is damaged", lines)
    options = ("--on-bad-sample", "skip", "--on-bad-shard", "skip")
    assert translate(monkeypatch, run, source, out, *options) == 0
    lines += capsys.readouterr().err
    assert all(name in lines for name in ("000001-", "000002-", "000001.tar", "are no pairs any more"))
    manifest = load_manifest(open_storage(str(out)))
    assert [shard.samples for shard in manifest.splits["train/source"].shards] == [1, 1] and not manifest.paired
    assert [shard.name[-10:] for shard in manifest.splits["train/source"].shards] == ["000000.tar", "000002.tar"]
    verify(open_storage(str(out)), manifest, progress=False)


def test_images_that_are_too_small_are_refused_before_anything_is_written(root: str, tmp_path: Path) -> None:
    translator = made_translator("munit")
    small = tmp_path / "small"
    write_root(LocalStorage(small), (2,), (2,), size=(8, 8))
    with pytest.raises(UserError, match="an image of 8x8 is too small"):
        translate_root(translator, str(small), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_parts_of_several_roots_make_one_split(root: str, tmp_path: Path) -> None:
    """As a segmenter is trained on: translations with the sources' labels, and targets labelled anew."""
    storage = open_storage(root)
    manifest = load_manifest(storage)

    def unlabelled(samples: list[Sample]) -> list[Sample]:
        return [Sample(s.key, s.image, np.full(s.image.size[::-1], IGNORE, np.uint8), s.origin) for s in samples]

    targets = Part(storage, manifest.split("train", "target"), unlabelled, "nothing", prefix="target-")
    parts = [translated_part(made_translator(), root, "train/source"), targets]
    out = LocalStorage(tmp_path / "both")
    made = derive({"train/target": parts}, out, encoding_of(manifest), {"source": "both"}, progress=False)
    assert made.splits["train/target"].class_histogram == manifest.splits["train/source"].class_histogram
    both = ImageDataset(out.url, "train", "target")
    keys = [ImageDataset(root, "train", domain).keys for domain in ("source", "target")]
    assert both.keys == [*keys[0], *(f"target-{key}" for key in keys[1])]
    image, label = both.read(7)
    assert (image == ImageDataset(root, "train", "target").read(0)[0]).all()
    assert label is not None and (label == IGNORE).all()

    other = tmp_path / "other"
    prepare(street_scenes(1, 0), open_storage(str(other)), Encoding((32, 32), format="png"), progress=False)
    parts[1] = Part(
        open_storage(str(other)), load_manifest(open_storage(str(other))).split("train", "target"), list, ""
    )
    with pytest.raises(UserError, match="images of 64x32 and 32x32 cannot be together in train/target"):
        derive({"train/target": parts}, LocalStorage(tmp_path / "odd"), Encoding(None), {"source": "both"})


def test_a_segmenter_is_sure_where_a_probability_is_high() -> None:
    scores = torch.tensor([[5.0, 0.1, 0.0], [0.0, 0.0, 5.0], [-5.0, -5.0, 9.0]])[None, :, None]  # (1, 3, 1, 3)
    segmenter = Segmenter(
        lambda _: scores,
        name="fixed",
        input_size=None,
        mean=(0,) * 3,
        std=(1,) * 3,
        scale=255.0,
        trainids=(3, 7, IGNORE),
    )
    image = np.zeros((1, 3, 3), np.uint8)
    assert segmenter(image).tolist() == [[3, 3, 7]]
    assert segmenter.sure(image, 0.9).tolist() == [[3, IGNORE, 7]]  # the last channel stands for no class
    assert segmenter.sure(image, 0.0).tolist() == [[3, 3, 7]]
