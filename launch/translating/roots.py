"""Translating a prepared data set into a prepared data set: the same keys and labels, other images."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from infra.storage import open_storage
from pipelines.derived import STRICT, Faults, Part, derive, encoding_of
from pipelines.manifest import Manifest, load_manifest
from pipelines.prepare import Encoding
from pipelines.ranks import ALONE, Ranks
from pipelines.shards import Sample
from trainer.exact import exact_arithmetic
from trainer.translator import Translator

BATCH = 8  # images translated at once


class Translated:
    """What becomes of samples: their images are translated, everything else stays. A copy in another process translates on the
    GPU that the process has, if it has one."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if torch.cuda.is_available():
            self.translator.move_to("cuda")

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
        known = self.translator.identity
        rest = "".join(f" {value}" for name, value in known.items() if name not in ("weights", "direction", "seed"))
        return f"{known['weights']} {known['direction']} {self.translator.seed}{rest}"


def translated_part(translator: Translator, root: str, split: str) -> Part:
    """A split such as "train/source" of a data root, translated; its labels are carried over byte for byte."""
    storage = open_storage(root)
    name, domain = split.split("/")
    change = Translated(translator)
    return Part(storage, load_manifest(storage).split(name, domain), change, change.identity)


def translate_root(
    translator: Translator,
    root: str,
    out: str,
    encoding: Encoding | None = None,
    *,
    faults: Faults = STRICT,
    ranks: Ranks = ALONE,
    cache_dir: Path | None = None,
    address: str | None = None,
) -> Manifest:
    """Write a data root like another, with the images of one domain translated: the source's, or for BtoA the target's. Keys and
    labels are carried over, and the shards of the other domain copied, byte for byte.

    encoding: of the translations; None: as the images are stored. address: of a Ray cluster that does it, to whose machines the
    translator, which is on the CPU then, is copied. Continued where it was killed. UserError for images that are
    too small, and as `derive`.
    """
    storage = open_storage(root)
    manifest = load_manifest(storage)
    domain = "source" if translator.direction == "AtoB" else "target"
    change = Translated(translator)
    parts = {}
    for name, split in manifest.splits.items():
        if name.endswith(domain):
            translator.check_size(*split.image_size)
            parts[name] = [Part(storage, split, change, change.identity)]
        else:
            parts[name] = [Part(storage, split, None, "copied")]
    greys = {name: split.grey_histogram for name, split in manifest.splits.items() if split.grey_histogram}
    parameters = {"source": "translation", "of": manifest.sha256, **translator.identity}
    return derive(
        parts, open_storage(out), encoding or encoding_of(manifest), parameters,
        paired=manifest.paired, greys=greys, faults=faults, ranks=ranks, cache_dir=cache_dir, address=address,
    )  # fmt: skip
