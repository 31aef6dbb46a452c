"""What preparation is compared with: Pillow opens, resizes and saves every image of a folder, on all cores.

    python -m launch.benchmarks.plain_pillow IN OUT WIDTH HEIGHT QUALITY PROCESSES

No shards, no hashes, no checks: JPEG files in, JPEG files of the same names out.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image


def convert(path: Path, out: Path, size: tuple[int, int], quality: int) -> None:
    with Image.open(path) as image:
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(out / path.name, "JPEG", quality=quality)


def main() -> None:
    folder, out = map(Path, sys.argv[1:3])
    width, height, quality, processes = map(int, sys.argv[3:])
    out.mkdir(parents=True)
    work = partial(convert, out=out, size=(width, height), quality=quality)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(work, sorted(folder.rglob("*.jpg")), chunksize=8))


if __name__ == "__main__":
    main()
