"""launch/train_segmenter.py as a person starts it: it learns, it survives being killed, it runs on two ranks."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from infra.storage import open_storage
from pipelines.dataset import ImageDataset
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import StreetScene, street_scenes
from tests.end_to_end.jobs import REPOSITORY, finish, losses, start, wait_for_step, weights
from trainer.segmentation import load_segmenter

STEPS = 12
# Everything that has state is on: momentum, weight decay, batch norm, moving average.
OPTIONS = [
    "--data", "data", "--model.output-stride", "4", "--model.width", "0.25", "--precision", "fp32", "--data.threads", "1",
    "--global-batch", "4", "--optim.kind", "sgd", "--optim.lr", "0.05", "--optim.weight-decay", "0.001", "--optim.ema", "0.5",
    "--max-steps", str(STEPS), "--loop.checkpoint-every", "5", "--loop.report-every", "1", "--loop.samples", "2",
]  # fmt: skip


def begin(launcher: str, *more: str, cwd: Path) -> subprocess.Popen[str]:
    script = str(REPOSITORY / "launch" / "train_segmenter.py")
    return start(launcher, *more, cwd=cwd, script=script, options=OPTIONS)


class PartlyLabelled(StreetScene):
    """Every second scene knows only its lower half, so that ranks have unequally many labelled pixels."""

    def load(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None]:
        image, label = super().load(size)
        if label is not None and self.index % 2:
            label[: size[1] // 2] = 255
        return image, label


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data in `data` and a finished run of one process in `run`, which takes the four images of a step in
    two passes, as two ranks take two each."""
    folder = tmp_path_factory.mktemp("workplace")
    scenes = street_scenes(count=7, test_count=3)
    scenes.splits["train/target"] = [PartlyLabelled(**vars(scene)) for scene in scenes.splits["train/target"]]
    prepare(scenes, open_storage(str(folder / "data")), Encoding((64, 32), shard_size=4), progress=False)
    output = finish(begin("single", "--optim.accumulation", "2", "--run-dir", "run", cwd=folder))
    assert "mIoU" in output and "on the 3 test images of the target domain" in output
    return folder


def test_it_learns_and_leaves_what_a_run_leaves(workplace: Path) -> None:
    folder = workplace / "run"
    rows = losses(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert np.mean([row["CE"] for row in rows[-3:]]) < 0.7 * np.mean([row["CE"] for row in rows[:3]])
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "train.log", "metrics.jsonl", "samples", "checkpoints", "model", "evaluation.json",
        "status.json", "run.lock", "mlflow.json", "mlflow.lock", "mlflow_run_id", "mlflow_sent.json",
    }  # fmt: skip
    # Two rows of photo | predicted labels | true labels.
    assert Image.open(folder / "samples" / f"step_{STEPS}.png").size == (3 * 64 + 2 * 4, 2 * 32 + 4)
    scores = json.loads((folder / "evaluation.json").read_text())

    segmenter, samples = load_segmenter(folder), ImageDataset(str(workplace / "data"), "test", "target")
    pairs = [samples.read(i) for i in range(3)]
    right = np.mean([segmenter(image) == label for image, label in pairs])
    assert scores["pxAcc"] == pytest.approx(right) and scores["pxAcc"] > 0.2
    assert 0 < scores["mIoU"] <= scores["clsAcc"] < 1 and "road" in scores["per_class"]

    client = MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    logged = client.get_run((folder / "mlflow_run_id").read_text().strip())
    assert client.get_experiment(logged.info.experiment_id).name == "segmenter"
    assert logged.data.metrics["eval/mIoU"] == pytest.approx(scores["mIoU"]) and "Loss/CE" in logged.data.metrics


def test_killed_and_started_again_ends_with_the_same_weights(workplace: Path) -> None:
    line = ["--optim.accumulation", "2", "--run-dir", "killed"]
    job = begin("single", *line, cwd=workplace)
    wait_for_step(job, workplace / "killed", 7)  # two steps after a checkpoint
    job.kill()
    job.communicate()
    finish(begin("single", *line, cwd=workplace))
    assert losses(workplace / "killed") == losses(workplace / "run")
    ours, theirs = weights(workplace / "killed", STEPS), weights(workplace / "run", STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_two_ranks_train_like_one_process_and_zero_goes_on_with_sgd(workplace: Path) -> None:
    """ZeRO-1 spreads the momentum over the ranks, and makes it, with weight decay on, before it loads a checkpoint's."""
    finish(begin("ddp", "--run-dir", "ranks", "--max-steps", "6", cwd=workplace))
    finish(begin("deepspeed", "--run-dir", "ranks", "--engine.zero-stage", "1", cwd=workplace))
    norm = "norm/segmenter"  # under ZeRO-1 the ranks add up the squares of their shares, in another order
    for row, expected in zip(losses(workplace / "ranks"), losses(workplace / "run"), strict=True):
        assert row.pop(norm) == pytest.approx(expected.pop(norm), rel=1e-6)
        assert row == expected
    ours, theirs = weights(workplace / "ranks", STEPS), weights(workplace / "run", STEPS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Batch norm's running statistics are those of rank 0's images.
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, theirs[name]), name
