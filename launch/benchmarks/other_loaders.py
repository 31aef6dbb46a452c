"""What the loader is compared with: DALI alone, and Pillow in a torch DataLoader as the published CUT code loads.

Both give what `Loader` gives, crops of random place and half of them mirrored, float32 in [-1, 1]; neither has
its fixed order, its hashes, its names of the samples or its way to resume.
"""

import importlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from infra.images import open_image


def bare_dali(
    shards: Sequence[Path], crop: int, threads: int, images: int, call_images: int, device: torch.device,
    hardware: float = 0.0,
) -> Iterator[Tensor]:  # fmt: skip
    """Endless batches of `images` crops of the images in these tars, by one DALI pipeline and nothing else.

    DALI's own reader (its shuffle buffer filled at random), its decoder of a crop, its mirroring and normalising, at
    its usual depth of two calls of `call_images`. float32 (images, 3, crop, crop), channels-last, DALI's own memory.
    hardware: the share of a call that a GPU's hardware decoder takes, which the loader gives nothing.
    """
    dali: Any = importlib.import_module("nvidia.dali")  # heavy, and absent on some platforms
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    decoding = {"device": "mixed", "hw_decoder_load": hardware} if on_gpu else {"device": "cpu"}

    @dali.pipeline_def(batch_size=call_images, num_threads=threads, device_id=0 if on_gpu else None)
    def pipeline() -> Any:
        encoded = fn.readers.webdataset(paths=[str(path) for path in shards], ext=["jpg"], random_shuffle=True)
        pixels = fn.decoders.image_crop(
            encoded,
            crop=(crop, crop),
            crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
            output_type=types.RGB,
            **decoding,
        )
        return fn.crop_mirror_normalize(
            pixels,
            mirror=fn.random.coin_flip(),
            mean=[127.5] * 3,
            std=[127.5] * 3,
            dtype=types.FLOAT,
            output_layout="HWC",
        )

    built = pipeline()
    built.build()
    while True:
        (call_NHWC,) = built.run()
        yield from torch.from_dlpack(call_NHWC.as_tensor()).permute(0, 3, 1, 2).split(images)


class PillowPairs:
    """A map-style data set of (source, target), as unpaired data sets of published code are: the k-th source image and
    any target image, each opened, cropped, mirrored and normalised one by one."""

    def __init__(self, sources: Sequence[Path], targets: Sequence[Path], crop: int, pairs: int) -> None:
        self._sources = sources
        self._targets = targets
        self._crop = crop
        self._pairs = pairs

    def __len__(self) -> int:
        return self._pairs

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._load(self._sources[index % len(self._sources)]), self._load(random.choice(self._targets))

    def _load(self, path: Path) -> Tensor:
        image = open_image(path).convert("RGB")
        x, y = (random.randint(0, side - self._crop) for side in image.size)
        image = image.crop((x, y, x + self._crop, y + self._crop))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels_CHW.to(torch.float32).div(255).sub_(0.5).div_(0.5)


def pillow_dataloader(
    folder: Path, crop: int, workers: int, pairs: int, steps: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of so many pairs, from the JPEG files in FOLDER/source and FOLDER/target, by `workers` processes."""
    sources, targets = (sorted((folder / name).glob("*.jpg")) for name in ("source", "target"))
    dataset: Any = PillowPairs(sources, targets, crop, steps * pairs)
    loader = DataLoader(dataset, batch_size=pairs, num_workers=workers, pin_memory=device.type == "cuda")
    for source, target in loader:
        yield source.to(device, non_blocking=True), target.to(device, non_blocking=True)
