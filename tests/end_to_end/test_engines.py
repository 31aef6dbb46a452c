"""The same job on every engine and number of ranks, killed and continued: same losses, same weights. `test_every_method.py`
has each method on two ranks."""

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.end_to_end.jobs import finish, kill, losses, run, small_data, start, wait_for_step, weights

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small prepared data set, on disk."""
    return small_data(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def uninterrupted(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process, which takes the two pairs of a step one after the other, as two ranks take one each."""
    folder = tmp_path_factory.mktemp("single")
    run("single", "--optim.accumulation", "2", "--data", data, "--run-dir", "run", cwd=folder)
    return folder / "run"


def assert_same_losses(run_dir: Path, reference: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = losses(run_dir), losses(reference)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=0)


def assert_same_weights(run_dir: Path, reference: Path) -> None:
    ours, theirs = weights(run_dir, STEPS), weights(reference, STEPS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_run_moves_from_zero_to_one_process_and_back(data: str, uninterrupted: Path, tmp_path: Path) -> None:
    """ZeRO-1 spreads Adam's state over the ranks; a checkpoint holds it whole."""
    options = ["--data", data, "--run-dir", "run"]
    run("deepspeed", "--engine.zero-stage", "1", *options, "--max-steps", "4", cwd=tmp_path)
    run("single", "--optim.accumulation", "2", *options, "--max-steps", "6", cwd=tmp_path)
    run("deepspeed", "--engine.zero-stage", "1", *options, cwd=tmp_path)
    assert_same_losses(tmp_path / "run", uninterrupted)


def test_fp16_scales_the_loss_and_continues(data: str, tmp_path: Path) -> None:
    """The first steps overflow and are skipped, so a checkpoint may hold no state of Adam yet."""
    options = ["--data", data, "--run-dir", "run", "--precision", "fp16", "--loop.keep", "9"]
    run("single", *options, "--max-steps", "1", cwd=tmp_path)
    run("single", *options, cwd=tmp_path)
    states = [json.loads((tmp_path / "run" / "checkpoints" / f"step_{s}" / "state.json").read_text()) for s in (1, 8)]
    first, last = (state["scalers"]["generator"]["scale"] for state in states)
    assert first == 2**15  # the initial 2^16 overflowed
    assert last < first


def test_killed_under_deepspeed_and_started_again_ends_with_the_same_weights(
    data: str, uninterrupted: Path, tmp_path: Path
) -> None:
    options = ["--data", data, "--run-dir", str(tmp_path / "run")]
    job = start("deepspeed", *options, cwd=tmp_path)
    wait_for_step(job, tmp_path / "run", 5)  # two steps after a checkpoint, in the middle of the second epoch
    kill(job)
    run("deepspeed", *options, cwd=tmp_path)
    assert_same_losses(tmp_path / "run", uninterrupted)

    # The uninterrupted run had one process; two ranks end with its weights bit for bit.
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_terminated_run_saves_its_step_and_exits_with_143(data: str, uninterrupted: Path, tmp_path: Path) -> None:
    options = ["--optim.accumulation", "2", "--data", data, "--run-dir", "run"]
    job = start("single", *options, cwd=tmp_path)
    wait_for_step(job, tmp_path / "run", 2)
    job.send_signal(signal.SIGTERM)
    assert "told to stop after step" in finish(job, expect=143)
    run("single", *options, cwd=tmp_path)
    assert_same_losses(tmp_path / "run", uninterrupted, tolerance=0)
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_a_mistake_under_the_deepspeed_launcher_exits_with_2(tmp_path: Path) -> None:
    output = run("deepspeed", "--data", "nowhere", cwd=tmp_path, expect=2)
    assert "error: no prepared data at nowhere" in output
    assert "Traceback" not in output


def test_what_is_gathered_from_all_ranks_is_that_of_one_process(data: str, tmp_path: Path) -> None:
    """Negatives of the whole batch, a bank of patches, and statistics of both domains. One process takes both pairs in
    one pass, so that rounding differs."""
    options = [
        "--data", data, "--run-dir", "run", "--max-steps", "5", "--optim.epochs", "1", "--optim.decay-epochs", "1",
        "--method.all-negatives", "true", "--method.bank.size", "64",
        "--method.constraint.self-distance", "1", "--method.constraint.start", "0.3",
    ]  # fmt: skip
    for launcher in ("single", "ddp"):
        (tmp_path / launcher).mkdir()
        run(launcher, *options, cwd=tmp_path / launcher)
    ours, theirs = (losses(tmp_path / launcher / "run") for launcher in ("ddp", "single"))
    for row in (*ours, *theirs):  # norms of gradients, which rounding changes more than losses
        for name in [name for name in row if name.startswith("norm/")]:
            del row[name]
    assert "self_distance" in ours[-1] and "self_distance" not in ours[0]
    for row, expected in zip(ours, theirs, strict=True):
        # D's losses are near 0 and have 1 as their scale, of which early training makes 1e-7 of the rounding.
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6), row["step"]
