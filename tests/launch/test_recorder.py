"""What a run leaves behind: its best checkpoint, its evaluations; what the ranks tell each other of their data."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from infra.tracking import Tracker
from launch.runs.evaluation import Outcome
from launch.runs.folder import RunFolder
from launch.runs.recorder import Judging, RankObserver, RunObserver, grouped, left_out
from pipelines.health import DataHealth
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.state import TrainingState

# ---- evaluations ------------------------------------------------------------------------------------------------------


def judged(path: Path, *values: float, begun: dict[str, Any] | None = None) -> RunObserver:
    """A run that goes on from `begun`, whose next evaluations have these values of Dist and whose steps each end with a
    checkpoint."""
    folder, begun = RunFolder(path), begun or {}
    outcomes = iter([Outcome(1, {"Dist": value, "Acc": {"30": 0.5}}, {}) for value in values])
    engine = SimpleNamespace(device=torch.device("cpu"), broadcast=lambda value: value)
    trainer: Any = SimpleNamespace(
        engine=engine, product=nn.Identity(), total_steps=100, config=SimpleNamespace(keep_logged=0),
        schedule=SimpleNamespace(optim=SimpleNamespace(global_batch=1)),
    )  # fmt: skip
    made = RunObserver(
        folder, Tracker.disabled(), trainer, Checkpointer(folder.checkpoints, keep=1),
        judging=Judging(1.0, lambda network, device: next(outcomes), "Dist"), health=DataHealth(),
        draw=lambda network, device: np.zeros((1, 1, 3), np.uint8), publish=lambda path, tracker: None, unit="pairs",
        shorter="", listener=None, begun=begun, state={"config": {}},
    )  # fmt: skip
    for step in range(begun.get("step", 0) + 1, begun.get("step", 0) + 1 + len(values)):
        made.evaluate(step)
        made.save(TrainingState(step, {}, {}))
    return made


def test_the_first_of_equals_stays_the_best(tmp_path: Path) -> None:
    run = judged(tmp_path, 5.0, 4.0, 4.0, 4.5)
    assert run.checkpointer.best == run.folder.checkpoints / "step_2"


def test_evaluations_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    judged(tmp_path, 5.0, 3.0, 4.0)
    again = judged(tmp_path, 4.5, begun={"step": 1})
    assert [(row["step"], row["Dist"]) for row in again.folder.evaluations()] == [(1, 5.0), (2, 4.5)]
    assert again.checkpointer.best == again.folder.checkpoints / "step_2"  # step 2's earlier 3.0 does not count


def test_a_run_without_its_evaluations_knows_its_best_from_the_checkpoint(tmp_path: Path) -> None:
    judged(tmp_path / "lost", 3.0, 4.0)
    begun = Checkpoint(tmp_path / "lost/checkpoints/step_2").state
    assert begun["best"] == {"step": 1, "Dist": 3.0}
    assert judged(tmp_path / "worse", 3.5, begun=begun).checkpointer.best is None
    assert judged(tmp_path / "equal", 3.0, begun=begun).checkpointer.best is None
    assert (
        judged(tmp_path / "better", 3.5, 2.0, begun=begun).checkpointer.best == tmp_path / "better/checkpoints/step_4"
    )


def test_mlflow_shows_losses_first() -> None:
    row = {"step": 3, "epoch": 1, "lr": 2e-4, "pairs_per_s": 9.0, "memory_gib": 1.0, "G_GAN": 0.5, "data/retries": 2}
    names = list(grouped(row))
    assert names == ["train/epoch", "train/lr", "train/pairs_per_s", "train/memory_gib", "Loss/G_GAN", "data/retries"]
    assert min([*names, "eval/mIoU"]) == "Loss/G_GAN"  # in the order of MLflow's sections
    assert grouped(row)["train/lr"] == 2e-4


# ---- data -------------------------------------------------------------------------------------------------------------


def observer(health: DataHealth, *others: DataHealth, rank: int = 0) -> Any:
    """One of several ranks; the others have told theirs."""
    told = [(other.figures(), other.bad_shards, other.bad_samples) for other in others]
    engine = SimpleNamespace(gather=lambda own: [own, *told] if rank == 0 else None)
    return RankObserver(SimpleNamespace(engine=engine), None, health)  # type: ignore[arg-type]


def test_counts_add_up_over_ranks_and_what_two_of_them_met_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    first, second = DataHealth(), DataHealth()
    for health in (first, second):
        health.count_retry()
        health.count_fetched(2**19)
        health.bad_shard("train/source/000001.tar", "it is missing")
    first.bad_sample("a in train/source/000000.tar", "torn")
    second.bad_sample("b in train/source/000000.tar", "not an image")
    own = observer(first, second)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # each report says what has happened so far
            assert own._data_figures() == {
                "data/retries": 2, "data/fetched_MiB": 1.0, "data/bad_shards": 1, "data/bad_samples": 2
            }  # fmt: skip
    (line,) = [record.getMessage() for record in caplog.records]  # rank 0's log has what another rank met
    assert "b in train/source/000000.tar" in line and "not an image" in line


def test_nothing_is_reported_of_healthy_data_or_on_other_ranks() -> None:
    assert observer(DataHealth(), DataHealth())._data_figures() == {}
    ill = DataHealth()
    ill.count_retry()
    assert observer(ill, rank=1)._data_figures() == {}


def test_the_end_names_what_was_left_out() -> None:
    health = DataHealth()
    assert left_out(health) == ""
    health.bad_shard("train/source/000001.tar", "it is missing")
    assert left_out(health).startswith("1 shard was left out, others took their places: train/source/000001.tar; ")
    for n in range(12):
        health.bad_sample(f"s{n}", "torn")
    words = left_out(health)
    assert words.startswith("12 samples and 1 shard were left out, others took their places: s0, s1, ")
    assert "s9 and 3 more; " in words and "s10" not in words
