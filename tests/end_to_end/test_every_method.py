"""Every method on every engine: two ranks give the losses of one process, whole, stopped or killed."""

from pathlib import Path

import pytest
import torch

from infra.storage import open_storage
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.end_to_end.every_method import STEPS
from tests.end_to_end.jobs import finish, losses, start, weights
from tests.trainer import segmenters
from tests.trainer.small import ONE_PASS, SMALL, crop_of

SCRIPT = str(Path(__file__).with_name("every_method.py"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("data"))
    side = max(map(crop_of, SMALL))
    prepare(street_scenes(count=5, test_count=1), open_storage(root), Encoding((2 * side, side)), progress=False)
    segmenters.save(Path(root, "segmenter"), 1, (2 * side, side), segmenter=segmenters.network(1))
    return root


def trained(launcher: str, data: str, folder: Path, accumulation: int, how: str, methods: list[str]) -> Path:
    finish(start(launcher, data, str(folder), str(accumulation), how, *methods, cwd=folder, script=SCRIPT, options=[]))
    return folder


@pytest.fixture(scope="module")
def single(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods in one process, which takes the two pairs of a step one after the other where that is the same."""
    folder = tmp_path_factory.mktemp("single")
    trained("single", data, folder, 2, "killed", [name for name in SMALL if name not in ONE_PASS])
    return trained("single", data, folder, 1, "killed", list(ONE_PASS))


@pytest.mark.parametrize("launcher", ["ddp", "deepspeed"])
def test_two_ranks_give_the_losses_of_one_process(launcher: str, data: str, single: Path, tmp_path: Path) -> None:
    trained(launcher, data, tmp_path, 1, "stopped", list(SMALL))
    for name in SMALL:
        ours, theirs = losses(tmp_path / name), losses(single / name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1)), name
        tolerance = 1e-3 if name in ONE_PASS else 1e-5  # the rounding of one pass over both pairs is another
        for row, expected in zip(ours, theirs, strict=True):
            assert row == pytest.approx(expected, rel=tolerance, abs=1e-9), name


def test_a_killed_run_ends_as_a_whole_one(data: str, single: Path, tmp_path: Path) -> None:
    """Those of one process were killed and continued. Here they are not."""
    trained("single", data, tmp_path, 2, "whole", [name for name in SMALL if name not in ONE_PASS])
    trained("single", data, tmp_path, 1, "whole", list(ONE_PASS))
    for name in SMALL:
        assert losses(tmp_path / name) == losses(single / name), name
        ours, theirs = weights(tmp_path / name, STEPS), weights(single / name, STEPS)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
