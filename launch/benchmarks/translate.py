"""Translating a folder: launch/translate.py beside a loop in the shape of the published test.py, and tiles beside the whole.

The loop decodes one image, translates it in fp32 and the layout that torch gives, and writes it, one after the other. Weights
are random, which takes the same time.

Measurements, by their keys in the JSON:

ours, loop               images a second of a folder of JPEG files of the crop's size (512 where it is the whole image)
ours_to_loop             their ratio: above 1 ours is faster
network                  images a second of the network alone, as the loop runs it: more no reading and writing can win
tiles_to_whole           time in tiles of half the side over time of the whole image, of one image
tile_difference          largest difference that tiles make in it, of 255
"""

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.images import open_image
from launch.benchmarks.measuring import Measurement, interleaved, ratios
from launch.runs.config import JobConfig
from launch.translating.files import Folder, Form
from pipelines.ranks import ALONE
from trainer.engines import make_engine
from trainer.tiling import Tiles
from trainer.translation import Translation
from trainer.translator import Translator, to_images, to_tensor

HELP = "translating a folder of images: images a second beside a plain loop, and what tiles cost"
IMAGES = 16


def run(config: JobConfig, repetitions: int, steps: int | None) -> list[Measurement]:
    """steps: images in one repetition."""
    engine = make_engine(config.engine)
    torch.manual_seed(config.seed)
    translation = config.method.translation().to(engine.device).eval()
    plain = copy.deepcopy(translation)
    translation.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side, count = config.data.crop or 512, steps or IMAGES
    ours = Translator(translation, engine.device, dtype=engine.dtype)
    tiled = Translator(translation, engine.device, tiles=Tiles(max(64, side // 2)))
    whole = Translator(translation, engine.device)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        pictures = [_picture(side, number) for number in range(count)]
        source.mkdir()
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(source / f"{number:04d}.jpg", quality=95)
        outputs = iter(Path(scratch) / f"out-{number}" for number in range(10**6))

        def of_ours() -> Mapping[str, float]:
            work = Folder(ours, source, next(outputs), Form(), ALONE)
            return {"ours": count / _seconds(work.translate)}

        def of_loop() -> Mapping[str, float]:
            return {"loop": count / _seconds(lambda: _plain_loop(plain, engine.device, source, next(outputs)))}

        def of_network() -> Mapping[str, float]:
            x_NCHW = to_tensor(pictures[0][None]).contiguous().to(engine.device)
            return {"network": count / _seconds(lambda: [_one(plain, x_NCHW) for _ in range(count)])}

        def of_tiles() -> Mapping[str, float]:
            return {"tiles": _seconds(lambda: tiled(pictures[0])), "whole": _seconds(lambda: whole(pictures[0]))}

        values = interleaved([of_ours, of_loop, of_network, of_tiles], repetitions)
        difference = np.abs(tiled(pictures[0]).astype(int) - whole(pictures[0])).max()
    return [
        *(Measurement(name, "images/s", values[name]) for name in ("ours", "loop", "network")),
        Measurement("ours_to_loop", "", ratios(values["ours"], values["loop"])),
        Measurement("tiles_to_whole", "", ratios(values["tiles"], values["whole"])),
        Measurement("tile_difference", "of 255", [float(difference)]),
    ]


def _picture(side: int, number: int) -> np.ndarray:
    """A random picture with edges of every strength."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()  # which ends with numbers on the host
    return time.perf_counter() - begin


@torch.no_grad()
def _one(translation: Translation, x_NCHW: Tensor) -> np.ndarray:
    shape = translation.code_shape(*x_NCHW.shape[2:])
    code = None if shape is None else torch.randn(1, *shape, device=x_NCHW.device)
    return to_images(translation(x_NCHW, code))[0]


def _plain_loop(translation: Translation, device: torch.device, source: Path, out: Path) -> None:
    out.mkdir()
    for path in sorted(source.iterdir()):
        with open_image(path) as image:
            x_NCHW = to_tensor(np.asarray(image.convert("RGB"))[None]).contiguous().to(device)
        Image.fromarray(_one(translation, x_NCHW)).save(out / path.name, quality=95)
