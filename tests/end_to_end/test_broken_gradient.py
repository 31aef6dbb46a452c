"""One rank's gradient is not finite, at a step that saves or at the last: all ranks end together, and nothing bad is kept."""

import json
from pathlib import Path

import pytest

from infra.json_lines import read_records
from infra.storage import open_storage
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.end_to_end.jobs import kill, start
from trainer.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("broken_gradient.py"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("data"))
    prepare(street_scenes(count=4, test_count=2), open_storage(root), Encoding((64, 32), shard_size=4), progress=False)
    return root


@pytest.mark.parametrize(
    ("launcher", "options", "broken", "saved"),
    [
        ("ddp", [], 6, ["step_3"]),
        ("deepspeed", [], 8, ["step_3", "step_6"]),
        ("deepspeed", ["--engine.zero-stage", "1"], 6, ["step_3"]),
    ],
    ids=["ddp at a step that saves", "deepspeed at the last step", "ZeRO-1 at a step that saves"],
)
def test_a_gradient_that_is_not_finite_on_one_rank_ends_all(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    launcher: str, options: list[str], broken: int, saved: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("BROKEN_AT", str(broken))
    arguments = ["--data", data, "--run-dir", "run", "--loop.report-every", "5", *options]
    job = start(launcher, *arguments, cwd=tmp_path, script=SCRIPT)
    try:
        output, _ = job.communicate(timeout=300)
    finally:
        printed = kill(job) if job.poll() is None else ""
    assert job.returncode != 0, output + printed
    assert f"norm/generator is not a finite number at step {broken}: postmortem/step_{broken} has" in output
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == saved and not (run / "model").exists()
    for name in saved:
        Checkpoint(run / "checkpoints" / name).check()
    assert [row["step"] for row in read_records(run / "metrics.jsonl")] == list(range(1, broken))
    state = Checkpoint(run / "postmortem" / f"step_{broken}").state
    told = state["broken"]
    assert state["step"] == broken - 1 and told["step"] == broken and told["metrics"]["norm/generator"] == "nan"
    assert told["not_finite"] == ["norm/generator"]
    ranks = [micro_batch["source_keys"] for rank in told["samples"] for micro_batch in rank]
    assert len(ranks) == 2 and all(len(keys) == 1 for keys in ranks)
    Checkpoint(run / "postmortem" / f"step_{broken}").check()  # the weights before the gradient are finite
    assert json.loads((run / "postmortem" / f"step_{broken}" / "state.json").read_text())["config"]["seed"] == 0
