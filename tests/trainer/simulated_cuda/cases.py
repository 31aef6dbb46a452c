"""Whole training steps and evaluations on the simulated device, by name. A process of its own runs them:

    python tests/trainer/simulated_cuda/cases.py LIBRARY NAME...

prints a line of JSON for each: its name and what was found.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    from tests.trainer.simulated_cuda import library

    library.load(Path(sys.argv[1]))

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from infra.config import build
from tests.trainer.simulated_cuda import faults
from tests.trainer.simulated_cuda.device import DEVICE, Finding, simulated_cuda
from trainer.engines import EngineConfig, make_engine
from trainer.evaluation import Example
from trainer.evaluation.fidelity import Features
from trainer.evaluation.inception import InceptionV3
from trainer.exact import exact_arithmetic
from trainer.loop import LoopConfig, Trainer
from trainer.methods import ABLATIONS, METHODS
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.methods.parts.semantic import FrozenSegmenter
from trainer.networks.config import GeneratorConfig
from trainer.optim import OptimConfig
from trainer.segmentation.class_weights import ClassWeights
from trainer.segmentation.config import SegmenterModelConfig
from trainer.segmentation.method import RECIPES, Segmentation
from trainer.segmentation.segmenter import Segmenter
from trainer.translation import OneGenerator
from trainer.translator import Translator

SIZE = 64  # of the images, both ways
CLASSES = 19
# Widths that CUDA's kernels would take; generators get one residual block.
_CUT = {"taps": (0, 4, 8, 12), "patches": 16, "head_dim": 16, "generator.ngf": 8,
        "discriminator.ndf": 8, "discriminator.layers": 1, "buffer": 0}  # fmt: skip
_STRIDED = {"generator.ngf": 8, "discriminator.ndf": 8, "buffer": 4}
_MUNIT = {"generator.ngf": 8, "generator.blocks": 1, "generator.hidden": 16, "discriminator.ndf": 8,
          "discriminator.scales": 2}  # fmt: skip
_SEMST = {name: value for name, value in _CUT.items() if name != "buffer"} | {"local": 32}
_DRIT = {"generator.ngf": 8, "discriminator.ndf": 8, "discriminator.scales": 2, "every": 1, "mode_seeking": 1.0,
         "content_layers": 1}  # fmt: skip
WIDE: dict[str, dict[str, Any]] = {
    "cut": _CUT,
    "fastcut": _CUT,
    "srunit": _CUT,
    "srunit-released": _CUT,
    "cyclegan": _STRIDED,
    "distancegan": _STRIDED,
    "gcgan": _STRIDED,
    "munit": _MUNIT,
    "drit": _DRIT,
    "src": _CUT,
    "semst": _SEMST,
    "sincut": {"head_dim": 16, "generator.ngf": 1, "discriminator.ndf": 2, "discriminator.size": 32},
}
EPOCHS = 10  # of one step each


def translating(
    method: str, options: dict[str, Any], engine: dict[str, Any], *, batch: int = 1, accumulation: int = 1,
    steps: tuple[int, ...] = (5,), ema: float = 0.0, continued: bool = False,
) -> list[Finding]:  # fmt: skip
    """Steps of a method, in the middle of its schedule unless `steps` says otherwise. options: by dotted name.
    continued: after another step and a restart of the optimisers from their states."""
    family = METHODS[method]
    given = {**{f"method.{name}": value for name, value in WIDE[method].items()}, **family.options, **options}
    section = {name.removeprefix("method."): value for name, value in given.items() if name.startswith("method.")}
    section.pop("name", None)
    config: Any = build(family.config, section)
    if isinstance(getattr(config, "generator", None), GeneratorConfig):  # fewer than a person may ask for
        config = replace(config, generator=replace(config.generator, blocks=1))

    def make() -> tuple[Any, list[Any]]:
        made = config.build(seed=0, global_batch=batch * accumulation)
        parts = [pairs(range(part * batch, (part + 1) * batch)) for part in range(accumulation)]
        if engine.get("graphs"):  # methods that cut boxes are not captured
            for part in parts:
                del part.source_boxes, part.target_boxes
        return made, parts

    return _train(make, engine, OptimConfig(epochs=EPOCHS, decay_epochs=0, global_batch=1, ema=ema), steps, continued)


def by_segmenter(method: str, options: dict[str, Any], engine: dict[str, Any], **steps: Any) -> list[Finding]:
    """Steps of a method whose options of the section semantic are these."""

    def load(path: Path) -> FrozenSegmenter:
        return FrozenSegmenter(SegmenterModelConfig(width=0.25).build(CLASSES), CLASSES, "")

    given = {f"method.semantic.{name}": value for name, value in {"segmenter": "any", "weight": 1.0, **options}.items()}
    kept = FrozenSegmenter.load
    FrozenSegmenter.load = load  # type: ignore[method-assign]
    try:
        return translating(method, given, engine, **steps)
    finally:
        FrozenSegmenter.load = kept  # type: ignore[method-assign]


def segmenting(network: str, engine: dict[str, Any], jitter: float = 0.0, power: float = 0.0) -> list[Finding]:
    optim = build(OptimConfig, {name.removeprefix("optim."): value for name, value in RECIPES[network].items()})

    def make() -> tuple[Segmentation, list[Any]]:
        segmenter = SegmenterModelConfig(network=network, width=0.25).build(CLASSES)
        images = torch.empty(2, SIZE, SIZE, 3, device=DEVICE).permute(0, 3, 1, 2)
        labels = torch.empty(2, SIZE, SIZE, dtype=torch.uint8, device=DEVICE)
        weights = ClassWeights(CLASSES, power) if power else None
        return Segmentation(segmenter, jitter, weights), [
            SimpleNamespace(images=images, labels=labels, slots=_slots(range(2)))
        ]

    return _train(make, engine, optim, (0,))


def _train(
    make: Callable[[], Any], engine: dict[str, Any], optim: OptimConfig, steps: tuple[int, ...], continued: bool = False
) -> list[Finding]:
    with simulated_cuda() as watch:
        trainer, batches = ready(make, engine, optim)
        if continued:
            runs = trainer.engine
            trainer._step(steps[0], batches)
            for spec in trainer.method.optimisers:
                runs.load_optimiser_state(spec.name, runs.optimiser_state(spec.name))
        with watch.notes() as found:
            for step in steps:
                trainer._step(step, batches)
        return list(found)


def ready(make: Callable[[], Any], engine: dict[str, Any], optim: OptimConfig) -> tuple[Trainer, list[Any]]:
    """On the simulated device, with image buffers that have met their slots."""
    method, batches = make()
    runs = make_engine(EngineConfig(kind="single", device="cuda", **{"compile": "false", "triton": "false"} | engine))
    runs.prepare(method, optim)
    trainer = Trainer(method, runs, optim, LoopConfig(), seed=0, source_samples=1)
    if trainer.averaged is not None:
        trainer.averaged.started = True  # as from the second step on
    for buffers in image_buffers(method):
        for batch in batches:
            draws = (torch.zeros(len(batch.slots), dtype=kind, device=DEVICE) for kind in (torch.float32, torch.int64))
            buffers.exchange(batch.source.to(runs.dtype or torch.float32), batch.slots, *draws)
    return trainer, batches


def image_buffers(owner: Any) -> Iterator[ImageBuffers]:
    """Those of a method, its own or of a part (of a list of parts) that it is made of."""
    for value in vars(owner).values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ImageBuffers):
                yield each
            elif type(each).__module__.startswith("trainer.methods.parts"):
                yield from image_buffers(each)


def _slots(slots: range) -> torch.Tensor:
    """On the CPU, as the loader makes them, and with numbers."""
    with unset_fake_temporarily():
        return torch.tensor(slots)


def _boxes(slots: range) -> torch.Tensor:
    with unset_fake_temporarily():
        return torch.tensor([[8 * slot % 32, 16] for slot in slots])


def pairs(slots: range, size: int = SIZE) -> Any:
    source, target = (torch.empty(len(slots), size, size, 3, device=DEVICE).permute(0, 3, 1, 2) for _ in range(2))
    return SimpleNamespace(
        source=source, target=target, slots=_slots(slots), source_boxes=_boxes(slots), target_boxes=_boxes(slots),
        source_labels=torch.empty(len(slots), size, size, dtype=torch.uint8, device=DEVICE),
    )  # fmt: skip


def reporting(*, late: bool) -> list[Finding]:
    """Steps with a report after each."""
    config: Any = build(METHODS["cut"].config, WIDE["cut"])
    with simulated_cuda() as watch:
        trainer, batches = ready(lambda: (config.build(seed=0, global_batch=1), [pairs(range(1))]), BF16, OptimConfig())
        trainer.reports.late = late
        with watch.notes() as found:
            for step in range(3):
                trainer._step(step, batches)
                trainer._rows((step + 1) * trainer.config.report_every, False)
        return list(found)


def judging() -> list[Finding]:
    """What an evaluation computes: a translation, the classes that a segmenter sees in it, and Inception's features.
    The host may wait there, and layouts may change."""
    picture = np.zeros((SIZE, SIZE + 2, 3), np.uint8)
    with simulated_cuda() as watch:
        generator = OneGenerator(GeneratorConfig(ngf=8, blocks=6).build()).to(DEVICE).eval()
        network = SegmenterModelConfig(width=0.25).build(CLASSES).to(DEVICE).eval()
        inception = InceptionV3().to(DEVICE).eval()
        segmenter = Segmenter(
            network, name="simulated", input_size=(96, 64), mean=(0.5,) * 3, std=(0.5,) * 3, scale=255.0,
            trainids=range(CLASSES), device=DEVICE,
        )  # fmt: skip
        with exact_arithmetic(), watch.notes() as found:
            translation = Translator(generator, DEVICE)(picture)
            assert translation.shape == picture.shape
            assert segmenter(translation).shape == picture.shape[:2]
            Features(inception).update(Example(0, translation))
        return [finding for finding in found if finding.kind in ("error", "types")]


def small(commit: Callable[[torch.device], Any]) -> list[Finding]:
    with simulated_cuda() as watch, watch.notes() as found:
        commit(DEVICE)
    return list(found)


def in_a_step(owner: Any, name: str, value: Any, graphs: bool = False) -> list[Finding]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return translating("cut", {"method.buffer": 2}, BF16 | {"graphs": graphs}, steps=(5, 6) if graphs else (5,))
    finally:
        setattr(owner, name, kept)


BF16, FP16, FP32 = ({"precision": precision} for precision in ("bf16", "fp16", "fp32"))
CONTIGUOUS = {"memory_format": "contiguous"}  # which is ZeRO-1's layout, too

# Rows of the ablation tables that differ from others in numbers alone.
NOTHING_NEW = ("CUT", "SRUNIT", "no id", "no id, 15 neg", "last", "ext only, last")


def row(options: dict[str, Any]) -> Callable[[], list[Finding]]:
    """A row of an ablation table, with a small bank."""
    given = dict(options)
    if "method.bank.size" in given:
        given["method.bank.size"] = 64
    # E1 measures both domains first, and then acts.
    return partial(
        translating,
        given["method.name"],
        given,
        BF16,
        steps=(0, 5) if "method.constraint.self_distance" in given else (5,),
    )


# Name -> method and options of steps that are captured.
REPLAYED: dict[str, tuple[str, dict[str, Any]]] = {
    "CUT": ("cut", {"method.buffer": 4, "method.all_negatives": True}),
    "FastCUT, bank": ("fastcut", {"method.bank.size": 64}),
    "SRUNIT": ("srunit", {"method.buffer": 4}),
    "SRUNIT released": ("srunit-released", {}),
    "E1, E2, E5": (
        "srunit",
        {f"method.constraint.{name}": 1.0 for name in ("self_distance", "smoothness", "consistency")},
    ),
    "CycleGAN": ("cyclegan", {"method.identity": 0.5}),
    "DistanceGAN": ("distancegan", {}),
    "GcGAN": ("gcgan", {}),
    "MUNIT": ("munit", {}),
    "SRC": ("src", {}),
    "SinCUT": ("sincut", {}),
    "DRIT": ("drit", {}),
}


def replayed(method: str, options: dict[str, Any]) -> Callable[[], list[Finding]]:
    """Before and after late losses begin, each kind of step met twice: with coins, taps and turns that takes some more."""
    steps = (0, 1, 2, 5, 6, 7, 8, 9) if method in ("fastcut", "srunit-released", "drit") else (0, 1, 5, 6)
    engine = BF16 | {"graphs": True, "triton": "auto"}
    return partial(translating, method, options, engine, batch=4 if method == "drit" else 2, steps=steps)


STEPS: dict[str, Callable[[], list[Finding]]] = {
    "CUT bf16": partial(translating, "cut", {}, BF16),
    "CUT fp16": partial(translating, "cut", {}, FP16),
    "CUT fp32 contiguous": partial(translating, "cut", {}, FP32 | CONTIGUOUS | {"tf32": False}),
    "CUT strided bf16": partial(
        translating, "cut", {"method.taps": (0, 4, 7, 10), "method.generator.antialias": False,
                             "method.discriminator.antialias": False}, BF16),
    "CUT all negatives bf16": partial(translating, "cut", {"method.all_negatives": True}, BF16),
    "FastCUT bf16, continued": partial(translating, "fastcut", {}, BF16, continued=True),
    "SRUNIT bf16": partial(translating, "srunit", {}, BF16),
    "SRUNIT bf16 contiguous": partial(translating, "srunit", {}, BF16 | CONTIGUOUS),
    "SRUNIT by Triton's norms bf16": partial(translating, "srunit", {}, BF16 | {"triton": "true"}, batch=2),
    "SRUNIT fp32": partial(translating, "srunit", {}, FP32),
    "SRUNIT one tap, two pairs, moving average bf16": partial(
        translating, "srunit", {"method.robust.per_step": "one", "method.buffer": 4}, BF16, batch=2, ema=0.999),
    "SRUNIT accumulation, checkpointing, buffer bf16": partial(
        translating, "srunit", {"method.generator.checkpointing": True, "method.buffer": 4}, BF16, accumulation=2),
    "SRUNIT released, at rest and awake, two pairs bf16": partial(
        translating, "srunit-released", {}, BF16, batch=2, steps=(0, 5)),
    "SRUNIT relative bf16": partial(translating, "srunit", {"method.robust.rule": "relative"}, BF16),
    "SRUNIT relative fp16, accumulation": partial(
        translating, "srunit", {"method.robust.rule": "relative", "method.robust.per_step": "one"}, FP16, accumulation=2),
    **{f"{name} by graphs bf16": replayed(*given) for name, given in REPLAYED.items()},
    "SemST bf16": partial(translating, "semst", {"method.lambda_src": 0.05}, BF16, batch=2),
    "SemST fp16, pixels, continued": partial(
        translating, "semst", {"method.ts.space": "pixels", "method.adversarial": "fused"}, FP16, continued=True),
    "SemST fp32 contiguous": partial(translating, "semst", {"method.ts.numerator": "joint"}, FP32 | CONTIGUOUS),
    "SemST accumulation, moving average bf16": partial(translating, "semst", {}, BF16, accumulation=2, ema=0.999),
    "SRC bf16": partial(translating, "src", {"method.flip_equivariance": True}, BF16),
    "SRC fp16, two pairs": partial(translating, "src", {}, FP16, batch=2),
    "SRC fp32 contiguous": partial(translating, "src", {}, FP32 | CONTIGUOUS),
    **{f"{name} bf16": row(options) for table in ABLATIONS.values() for name, options in table.items()
       if name not in NOTHING_NEW},
    "E6 fp16 contiguous": partial(translating, "srunit", ABLATIONS["srunit"]["E6"], FP16 | CONTIGUOUS),
    "CycleGAN bf16": partial(translating, "cyclegan", {"method.identity": 0.5}, BF16),
    "CycleGAN fp16, accumulation": partial(translating, "cyclegan", {}, FP16, accumulation=2),
    "CycleGAN fp32 contiguous": partial(translating, "cyclegan", {"method.identity": 0.5}, FP32 | CONTIGUOUS),
    "DistanceGAN bf16": partial(translating, "distancegan", {}, BF16, batch=2),
    "DistanceGAN self-distances, own networks fp16": partial(
        translating, "distancegan", {"method.distances": "self", "method.architecture": "distancegan",
                                     "method.both": True}, FP16),
    "DistanceGAN fp32 contiguous": partial(translating, "distancegan", {}, FP32 | CONTIGUOUS, batch=2),
    "GcGAN bf16": partial(translating, "gcgan", {"method.generators": "cross"}, BF16),
    "GcGAN flipped fp16": partial(translating, "gcgan", {"method.geometry": "vflip"}, FP16),
    "GcGAN fp32 contiguous": partial(translating, "gcgan", {}, FP32 | CONTIGUOUS),
    "MUNIT bf16": partial(translating, "munit", {}, BF16, batch=2, ema=0.999),
    "MUNIT fp16, continued": partial(translating, "munit", {"method.cycle": 0.0}, FP16, continued=True),
    "MUNIT fp32 contiguous": partial(translating, "munit", {}, FP32 | CONTIGUOUS),
    "SinCUT bf16": partial(translating, "sincut", {}, BF16, batch=2),
    "SinCUT fp16": partial(translating, "sincut", {}, FP16, batch=2),
    "SinCUT fp32 contiguous": partial(translating, "sincut", {}, FP32 | CONTIGUOUS, batch=2),
    "DRIT bf16": partial(translating, "drit", {}, BF16, batch=4, ema=0.999),
    "DRIT feature-wise fp16, continued": partial(
        translating, "drit", {"method.generator.attributes": "feature-wise", "method.discriminator.spectral_norm": True},
        FP16, batch=2, continued=True),
    "DRIT joint fp32 contiguous, content alone": partial(
        translating, "drit", {"method.second": "joint", "method.every": 2}, FP32 | CONTIGUOUS, batch=2, steps=(4, 5)),
    "L_sem of jittered translations bf16": partial(
        by_segmenter, "cut", {"balance": 4.0, "jitter": 0.5, "mask": True}, BF16, batch=2),
    "L_sem fp16, predicted labels, mirrored": partial(
        by_segmenter, "fastcut", {"labels": "predicted", "balance": 4.0}, FP16, steps=(0, 1, 2, 3)),
    "L_sem fp32 contiguous": partial(by_segmenter, "cut", {}, FP32 | CONTIGUOUS),
    "deeplab jitter, weights of classes bf16": partial(segmenting, "deeplab", BF16, jitter=1.0, power=0.5),
    "deeplab bf16": partial(segmenting, "deeplab", BF16),
    "deeplab fp32 contiguous": partial(segmenting, "deeplab", FP32 | CONTIGUOUS),
    "drn-d-22 fp16": partial(segmenting, "drn-d-22", FP16),
}  # fmt: skip

CASES: dict[str, Callable[[], list[Finding]]] = {
    **STEPS,
    "evaluation": judging,
    "metrics a report late": partial(reporting, late=True),
    "metrics at once": partial(reporting, late=False),
    **{name: partial(small, commit) for name, (_, commit) in faults.SMALL.items()},
    **{name: partial(small, commit) for name, commit in faults.HARMLESS.items()},
    **{name: partial(in_a_step, *patch) for name, (_, _, patch) in faults.IN_A_STEP.items()},
}


def run(name: str) -> dict[str, Any]:
    return {"name": name, "found": [vars(finding) for finding in CASES[name]()]}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps(run(name)), flush=True)
    os._exit(0)  # torch's threads for the device do not outlive the stand-ins in every order
