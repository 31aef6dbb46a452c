"""A prepared root translated into a prepared root: what is carried over, what is not, and going on after a kill."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import UserError
from infra.storage import LocalStorage, open_storage
from launch.runs import translate
from launch.runs.translate import Translated, translate_root, translated_part
from pipelines.dataset import ImageDataset
from pipelines.derived import Part, derive, encoding_of
from pipelines.labels import IGNORE
from pipelines.manifest import MANIFEST, load_manifest
from pipelines.prepare import PREPARING, Encoding, prepare
from pipelines.shards import Sample
from pipelines.sources.drawn import street_scenes
from tests.trainer.small import method_config
from trainer.segmentation.segmenter import Segmenter
from trainer.translator import Translator

SPLITS = {"train/source": "train/source", "test/source": "test/source"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven scenes a domain, in shards of three."""
    folder = tmp_path_factory.mktemp("data") / "root"
    encoding = Encoding((64, 32), format="png", shard_size=3)
    prepare(street_scenes(7, 2), open_storage(str(folder)), encoding, progress=False)
    return str(folder)


def made_translator(method: str = "cut", seed: int = 0) -> Translator:
    torch.manual_seed(seed)
    return Translator(method_config(method).translation().eval())


def members(root: str, shard: str) -> dict[str, bytes]:
    with tarfile.open(Path(root) / shard) as archive:
        return {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]


def test_keys_labels_and_origins_are_carried_over_and_images_are_translated(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translate, "BATCH", 2)
    translator = made_translator()
    manifest = translate_root(translator, root, str(tmp_path), SPLITS)
    assert manifest == load_manifest(open_storage(str(tmp_path))) and manifest.splits.keys() == SPLITS.keys()
    before = load_manifest(open_storage(root)).splits["train/source"]
    after = manifest.splits["train/source"]
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
    translate_root(translator, root, str(whole), SPLITS)
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
        translate_root(translator, root, str(killed), SPLITS)
    assert not (killed / MANIFEST).exists() and (killed / PREPARING).exists()
    shard = killed / "train/source/000001.tar"
    broken = shard.with_suffix(".index.json") if damage == "index" else shard
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    translate_root(translator, root, str(killed), SPLITS)
    assert calls == [3, 3, 1, 3, 1, 2]  # the first shard stays; the test images are two
    assert {path.relative_to(killed): path.read_bytes() for path in killed.rglob("*") if path.is_file()} == expected
    translate_root(translator, root, str(killed), SPLITS)
    assert len(calls) == 6  # complete: nothing is translated again


def test_another_translator_or_split_makes_other_data(root: str, tmp_path: Path) -> None:
    translate_root(made_translator(), root, str(tmp_path), SPLITS)
    for translator, splits in (
        (made_translator(seed=1), SPLITS),
        (made_translator(), {"train/source": "train/source"}),
    ):
        with pytest.raises(UserError, match="was prepared with .* give another --out, or delete it first"):
            translate_root(translator, root, str(tmp_path), splits)
    with pytest.raises(UserError, match="the data has no train images of the sauce domain"):
        translate_root(made_translator(), root, str(tmp_path / "other"), {"train/source": "train/sauce"})


def test_an_image_has_one_style_wherever_it_is_translated(root: str, tmp_path: Path) -> None:
    translator = made_translator("munit")
    samples = ImageDataset(root, "train", "source")
    translate_root(translator, root, str(tmp_path), {"train/target": "train/source"})
    translations = ImageDataset(str(tmp_path), "train", "target")
    for place in (0, 4):
        assert (translations.read(place)[0] == translator(samples.read(place)[0], key=samples.keys[place])).all()


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
