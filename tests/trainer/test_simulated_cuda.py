"""Whole steps on a CUDA device that is not there (simulated_cuda/): what would fail on a GPU, or have the host wait for it.

A method that is added to an ablation table is checked here by itself; others get a case in simulated_cuda/cases.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.simulated_cuda import cases, faults, library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which this project asks for anyway"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA itself: pytest -m gpu"),
]

# (kind, operator, start of the place) of what is known and has a reason, in steps whose name begins so.
ALLOWED: dict[str, list[tuple[str, str, str]]] = {
    # The perturbation is drawn contiguous, so that its numbers do not depend on the layout, and joins the features here.
    "": [("layout", "aten.add.Tensor", "trainer/methods/parts/robustness.py:Robustness.value")],
    # The gradient of a gradient goes through the plain norm, where torch's gradient of a mean is contiguous.
    "E6": [("layout", "", "trainer/networks/norm.py:_NormActivation.backward"), ("layout", "", "torch")],
    # The gradient of R1's gradient meets torch's own convolutions, which have the layout of the weights.
    "SinCUT fp32 contiguous": [("layout", "", "torch")],
    # The same of a segmenter that does not learn, whose gradient goes on into the translation.
    "L_sem": [("layout", "", "trainer/losses/semantics.py"), ("layout", "", "torch")],
    # Torch's cross entropy and its resizing of scores, and its gradient of a mean over an image, are contiguous.
    "deeplab": [("layout", "", "trainer/segmentation/method.py:Segmentation.loss"), ("layout", "", "torch")],
    "drn-d-22": [("layout", "", "trainer/segmentation/method.py:Segmentation.loss"), ("layout", "", "torch")],
}  # fmt: skip


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> dict[str, list[dict[str, str]]]:
    """What each of the chosen cases found, from one process that has the simulated device."""
    ours = [item for item in request.session.items if item.path == request.node.path]
    chosen = [str(item.callspec.params["name"]) for item in ours if isinstance(item, pytest.Function)]
    cache = request.config.cache
    assert cache is not None
    built = library.build(cache.mkdir("simulated_cuda"))
    script = Path(cases.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(built), *chosen]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line["found"] for line in lines}


def told(found: list[dict[str, str]]) -> str:
    return "\n".join("{kind}: {operator} at {place} ({why})".format(**finding) for finding in found)


def is_allowed(name: str, finding: dict[str, str]) -> bool:
    for start, known in ALLOWED.items():
        if name.startswith(start):
            for kind, operator, place in known:
                if (
                    finding["kind"] == kind
                    and finding["operator"].startswith(operator)
                    and finding["place"].startswith(place)
                ):
                    return True
    return False


@pytest.mark.parametrize("name", [*cases.STEPS, "evaluation", "metrics a report late"])
def test_nothing_in_a_step_is_refused_waits_or_changes_layout(name: str, findings: dict[str, Any]) -> None:
    unexpected = [finding for finding in findings[name] if not is_allowed(name, finding)]
    assert not unexpected, told(unexpected)


@pytest.mark.parametrize("name", faults.SMALL)
def test_a_fault_is_found(name: str, findings: dict[str, Any]) -> None:
    kind, _ = faults.SMALL[name]
    first = findings[name][0]  # torch itself ends what depends on values, with an error
    assert first["kind"] == kind, told(findings[name])
    assert first["place"].startswith("tests/trainer/simulated_cuda/faults.py")


@pytest.mark.parametrize("name", ["metrics at once"])
def test_metrics_that_are_read_at_once_are_waited_for(name: str, findings: dict[str, Any]) -> None:
    assert {(f["kind"], f["place"].rpartition(":")[0]) for f in findings[name]} == {
        ("synchronisation", "trainer/reports.py:Moment.wait")
    }, told(findings[name])


@pytest.mark.parametrize("name", faults.HARMLESS)
def test_what_is_harmless_is_not_reported(name: str, findings: dict[str, Any]) -> None:
    assert not findings[name], told(findings[name])


@pytest.mark.parametrize("name", faults.IN_A_STEP)
def test_a_fault_in_a_step_is_found_and_its_place_named(name: str, findings: dict[str, Any]) -> None:
    kind, function, _ = faults.IN_A_STEP[name]
    assert any(f["kind"] == kind and function in f["place"] for f in findings[name]), told(findings[name])
