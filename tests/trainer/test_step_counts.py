"""How much a step asks of a GPU: operator calls, bytes, hidden copies and waits, counted on a CUDA device that is not there
(simulated_cuda/). Calls depend on neither the networks' widths nor the size of the images."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.simulated_cuda import counted, library
from tests.trainer.simulated_cuda.cases import WIDE
from trainer.methods import METHODS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which this project asks for anyway"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA itself"),
]

TRITON: dict[str, Any] = {"precision": "bf16", "triton": "true"}
ONE_TAP: dict[str, Any] = {"robust.per_step": "one"}
NETWORKS = (
    "generator.ngf",
    "discriminator.ndf",
    "head_dim",
    "patches",
    "local",
    "generator.hidden",
    "discriminator.size",
)


def small(method: str, options: dict[str, Any] | None = None, engine: dict[str, Any] = TRITON) -> dict[str, Any]:
    """Narrow networks with all their layers, two pairs."""
    own = {name: value for name, value in WIDE[method].items() if name in NETWORKS}
    return {"method": method, "options": own | (options or {}), "batch": 2, "size": 64, "engine": engine}


def full(engine: dict[str, Any] = TRITON, batch: int = 16, **options: Any) -> dict[str, Any]:
    """SRUNIT's step as its paper has it."""
    return {"method": "srunit", "options": options, "batch": batch, "size": 256, "engine": engine}


# Name -> what is counted, and its operator calls.
STEPS: dict[str, tuple[dict[str, Any], int]] = {
    "SRUNIT one tap, 16 pairs": (full(**ONE_TAP), 2287),
    "SRUNIT one tap, 16 pairs, without Triton": (full({"precision": "bf16"}, **ONE_TAP), 3204),
    "SRUNIT, 16 pairs": (full(), 3065),
    "CUT": (small("cut"), 1636),
    "FastCUT": (small("fastcut"), 1436),
    "SRUNIT released": (small("srunit-released"), 2241),
    "CycleGAN": (small("cyclegan"), 2103),
    "DistanceGAN": (small("distancegan"), 699),
    "GcGAN": (small("gcgan"), 1280),
    "MUNIT": (small("munit"), 5157),
    "DRIT": (small("drit", {"every": 1, "content_layers": 1}), 7143),
    "SRC": (small("src"), 2155),
    "SemST": (small("semst"), 4307),
    "SinCUT": (small("sincut", engine={"precision": "bf16"}), 1474),
}  # fmt: skip
# What is known and has a reason, by place.
KNOWN: dict[str, set[str]] = {
    # Weights of transposed convolutions change places of their channels, and R1 differentiates a gradient.
    "SinCUT": {"trainer/networks/stylegan2.py:UpConv.forward", "torch's backward pass"},
}


# 10^9 bytes that SRUNIT's step of 16 pairs would move, had it one kernel for a norm with its border, the sum of a block, and the
# blur behind it (docs/performance.md, "What fused kernels would save").
FUSED = 122.2
COMPARED = ("SRUNIT one tap, 16 pairs", "SRUNIT one tap, 16 pairs, without Triton")


def _has_name(item: pytest.Function) -> bool:
    return hasattr(item, "callspec")


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> dict[str, dict[str, dict[str, int]]]:
    """What was counted in each of the chosen steps, from one process that has the simulated device."""
    ours = [item for item in request.session.items if item.path == request.node.path]
    chosen = [
        str(item.callspec.params["name"]) for item in ours if isinstance(item, pytest.Function) and _has_name(item)
    ]
    names = list(dict.fromkeys([*chosen, *COMPARED]))
    cache = request.config.cache
    assert cache is not None
    built = library.build(cache.mkdir("simulated_cuda"))
    script = Path(counted.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(built)], input="\n".join(json.dumps(STEPS[name][0]) for name in names),
        env=os.environ | {"PYTHONPATH": str(script.parents[3]), "OMP_NUM_THREADS": "1"},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


def test_every_method_has_a_stated_number() -> None:
    assert {request["method"] for request, _ in STEPS.values()} == set(METHODS)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_no_more_operator_calls_than_stated(name: str, counts: dict[str, Any]) -> None:
    calls, stated = sum(counts[name]["calls"].values()), STEPS[name][1]
    assert 0.9 * stated < calls <= stated, (calls, counts[name]["calls"])


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_copied_cast_back_or_waited_for(name: str, counts: dict[str, Any]) -> None:
    for kind in ("copies", "returns", "waits"):
        assert set(counts[name][kind]) <= KNOWN.get(name, set()), kind


def test_norms_move_no_more_than_their_kernels_must(counts: dict[str, Any]) -> None:
    """10^9 bytes of a step of 16 pairs, by kind of work."""
    moved = {kind: round(count / 1e9, 1) for kind, count in counts["SRUNIT one tap, 16 pairs"]["bytes"].items()}
    stated = {"convolution": 36.5, "norm": 53.4, "padding": 26.2, "resampling": 10.7, "cast": 1.8, "join": 4.5}
    assert {kind: moved[kind] for kind in stated} == pytest.approx(stated, rel=0.05), moved
    without = counts["SRUNIT one tap, 16 pairs, without Triton"]["bytes"]["norm"] / 1e9
    assert moved["norm"] < without / 2
    assert sum(moved.values()) < 1.33 * FUSED
