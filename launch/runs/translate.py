"""Translating a prepared data set into a prepared data set: the same keys and labels, other images."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from infra.storage import open_storage
from pipelines.derived import Part, derive, encoding_of
from pipelines.manifest import Manifest, load_manifest
from pipelines.shards import Sample
from trainer.exact import exact_arithmetic
from trainer.segmentation.trained import weights_hash
from trainer.translator import Translator

BATCH = 8  # images translated at once


class Translated:
    """What becomes of samples: their images are translated, everything else stays."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator

    def __call__(self, samples: list[Sample]) -> list[Sample]:
        pictures = [np.asarray(sample.image) for sample in samples]
        keys = [sample.key for sample in samples]
        with exact_arithmetic():
            translations = [
                translation
                for first in range(0, len(samples), BATCH)
                for translation in self.translator.each(pictures[first : first + BATCH], keys[first : first + BATCH])
            ]
        return [
            dataclasses.replace(sample, image=Image.fromarray(translation))
            for sample, translation in zip(samples, translations, strict=True)
        ]

    @property
    def identity(self) -> str:
        translator = self.translator
        return f"{weights_hash(translator.translation)} {translator.direction} {translator.seed}"


def translated_part(translator: Translator, root: str, split: str) -> Part:
    """A split such as "train/source" of a data root, translated; its labels are carried over byte for byte."""
    storage = open_storage(root)
    name, domain = split.split("/")
    change = Translated(translator)
    return Part(storage, load_manifest(storage).split(name, domain), change, change.identity)


def translate_root(
    translator: Translator, root: str, out: str, splits: Mapping[str, str], *, cache_dir: Path | None = None
) -> Manifest:
    """Write a data root whose splits are splits of another, translated. splits: {"train/target": "train/source"}, the new
    one's name first. Continued where it was killed. UserError for a split that is not there, and as `derive`."""
    parts = {new: [translated_part(translator, root, old)] for new, old in splits.items()}
    encoding = encoding_of(load_manifest(open_storage(root)))
    parameters = {"source": "translation", "splits": dict(splits)}
    return derive(parts, open_storage(out), encoding, parameters, cache_dir=cache_dir)
