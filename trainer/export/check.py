"""Whether an exported file translates as the network does that it was made of."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from infra.errors import UserError
from trainer.exact import exact_arithmetic
from trainer.export.graph import Graph
from trainer.translation import Translation

log = logging.getLogger(__name__)

Run = Callable[[Sequence[Tensor]], Tensor]

LEVEL = 2 / 255  # a level of 8 bits in [-1, 1]
# The mean and the largest absolute difference of pixels, in levels. Rounding to 8 bits may add one where two levels are alike.
# fp16 keeps 11 bits of a number and bf16 8: what training in them costs, too.
TOLERANCES = {"fp32": (0.01, 0.25), "fp16": (0.5, 16.0), "bf16": (4.0, 96.0)}
CHECKED = ((1, 64, 64), (2, 96, 128), (3, 160, 80))  # images, width and height, or those nearest above that are taken


def check(run: Run, graph: Graph, translation: Translation, name: str) -> float:
    """Compare what `run` gives with what the translation gives in fp32, at three sizes; the largest difference in levels.

    graph: what was exported, of the translation. UserError, with the numbers, where they are further apart than TOLERANCES.
    """
    exact = Graph(translation, replace(graph.form, precision="fp32"))
    mean, most = TOLERANCES[graph.form.precision]
    largest = 0.0
    for seed, (count, width, height) in enumerate(CHECKED):
        inputs = graph.sample(count, *graph.sizes_like(width, height), seed)
        with torch.no_grad(), exact_arithmetic():
            expected = exact(*inputs)
        try:
            found = run(inputs)
        except Exception as error:
            raise UserError(f"the exported {name} does not run on {_words(inputs[0])} ({_line(error)}): nothing was "
                            "written; export another form of it, or use the checkpoint") from error  # fmt: skip
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise UserError(f"the exported {name} makes {_words(found)} of {_words(inputs[0])}: nothing was written; use the "
                            "checkpoint instead")  # fmt: skip
        apart = np.abs(found.double().numpy() - expected.double().numpy()) / (1 if graph.form.uint8 else LEVEL)
        rounding = float(graph.form.uint8)
        if not (apart.mean() <= mean + rounding * 0.01 and apart.max() <= most + rounding):  # NaN is neither
            raise UserError(f"the exported {name} differs from the network by {apart.mean():.3g} levels of 255 on average and "
                            f"{apart.max():.3g} at most, where {mean} and {most} are allowed: nothing was written; give "
                            "--precision fp32, or use the checkpoint")  # fmt: skip
        log.info("checked on %s: %.2g levels of 255 apart at most", _words(inputs[0]), apart.max())
        largest = max(largest, float(apart.max()))
    return largest


def _words(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
