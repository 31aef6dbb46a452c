"""Warnings of a collapse, and the checkpoint that they advise."""

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.json_lines import JsonLines
from launch.runs.collapse import CollapseWarnings, last_before
from launch.runs.folder import RunFolder
from tests.trainer.small import crop_of, small_method
from tests.trainer.test_methods import at, pairs
from trainer.checkpointer import Checkpointer
from trainer.collapse import GONE, LOST, SETTLING, WINDOW, WON, Watch
from trainer.methods.base import Guesses

GUESSES = Guesses(discriminators=[{"D_fake": 0.25, "D_real": 0.25}], contrasts={"NCE": 4.0})


def rows(*stretches: tuple[int, float, float]) -> Iterator[dict[str, float]]:
    """Of so many steps each, with both losses of D and PatchNCE as multiples of a guess."""
    step = 0
    for count, of_d, nce in stretches:
        for _ in range(count):
            step += 1
            yield {"step": step, "D_fake": 0.3 * of_d, "D_real": 0.2 * of_d, "NCE": 4 * nce}


def signs(*stretches: tuple[int, float, float]) -> list[tuple[str, int]]:
    return [(sign.words.split(",")[0], sign.began) for sign in Watch(GUESSES).see(list(rows(*stretches)))]


def test_a_sign_needs_a_whole_window_after_the_run_has_settled() -> None:
    won = [("D has won", SETTLING + 1)]
    assert signs((SETTLING + WINDOW - 1, 0.0, 0.2)) == []
    assert signs((SETTLING + WINDOW, 0.0, 0.2)) == won
    assert signs((900, WON * 1.01, LOST * 0.99)) == []
    assert signs((900, WON * 0.99, 0.2)) == won  # once
    assert signs((900, 0.9, LOST * 1.01)) == [("the heads have collapsed", SETTLING + 1)]


def test_a_sign_comes_again_only_if_it_was_gone() -> None:
    won, better = (600, 0.01, 0.2), (300, 0.9, 0.2)
    assert len(signs(won, better, won)) == 2
    assert len(signs(won, (300, (WON + GONE) / 2, 0.2), won)) == 1


def test_rows_without_the_losses_and_methods_without_guesses_are_not_judged() -> None:
    assert list(Watch(GUESSES).see([{"step": step, "G": 0.0} for step in range(1, 900)])) == []
    assert list(Watch(Guesses()).see(list(rows((900, 0.0, 1.0))))) == []


# D's losses on fake and real images together, of each step of the runs in docs/operations.md ("another 1" to "another 7" are
# "the seven others").
RECORDED = Path(__file__).with_name("recorded_collapses.npz")


def test_the_rule_says_of_the_recorded_runs_what_docs_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| ")]
    stated = {cell[1]: re.findall(r"(?:step|again) (\d+)", cell[4]) for cell in cells if len(cell) == 7}
    recorded = np.load(RECORDED)
    assert len(recorded.files) == 13
    for name in recorded.files:
        watch = Watch(Guesses(discriminators=[{"D": 0.5}]))
        losses = [{"step": step, "D": float(loss)} for step, loss in enumerate(recorded[name], 1)]
        found = [str(row["step"]) for row in losses for _ in watch.see([row])]
        assert found == stated["the seven others" if name.startswith("another") else name], name


class Run:
    """A run folder with checkpoints and evaluations; what its warnings say."""

    def __init__(self, path: Path, caplog: pytest.LogCaptureFixture, metric: str | None, *steps: int) -> None:
        self.folder, self.caplog = RunFolder(path), caplog
        for step in steps:
            (self.folder.checkpoints / f"step_{step}").mkdir(parents=True)
            (self.folder.checkpoints / f"step_{step}" / "manifest.json").write_text(json.dumps({}))
        self.warnings = CollapseWarnings(self.folder, Checkpointer(self.folder.checkpoints, 2), GUESSES, metric)

    def evaluate(self, step: int, flip_rate: float) -> str:
        metrics: dict[str, Any] = {"flip_rate": flip_rate, "baseline": {"flip_rate": 0.5}}
        file = JsonLines(self.folder.evaluations_file)
        file.append({"step": step, **metrics})
        file.close()
        return self.said(lambda: self.warnings.evaluated(step, metrics))

    def collapse(self) -> str:
        return self.said(lambda: self.warnings.see(list(rows((500, 0.01, 0.2)))))

    def said(self, action: Any) -> str:
        self.caplog.clear()
        with self.caplog.at_level(logging.WARNING):
            action()
        return "\n".join(record.getMessage() for record in self.caplog.records)


def test_a_run_without_evaluations_is_advised_the_last_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = Run(tmp_path, caplog, None, 100, 200, 300).collapse()
    assert said == (
        "collapse: D has won, and tells translations from targets without fail (D_fake and D_real are at 1% of a guess over "
        f"steps 201 to 300); the checkpoint to go back to is {tmp_path}/checkpoints/step_200"
    )
    assert Run(tmp_path / "late", caplog, None, 300).collapse().endswith("; no checkpoint is older than that")
    assert last_before([], 5) is None


def test_evaluations_that_are_worse_than_nothing_warn_once_and_the_best_is_advised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, caplog, "flip_rate", 100)
    worse = "flip_rate of the translations is worse than of the untranslated images; "
    assert run.evaluate(50, 0.6) == (
        f"collapse: after step 50 {worse}no checkpoint is to be advised yet: none is better than doing nothing by flip_rate"
    )
    assert run.evaluate(60, 0.7) == "" and run.evaluate(100, 0.2) == ""
    best = f"the checkpoint to go back to is {tmp_path}/checkpoints/step_100, the best by flip_rate"
    assert run.evaluate(150, 0.6) == f"collapse: after step 150 {worse}{best}"
    assert run.collapse().endswith(f"over steps 201 to 300); {best}")
    silent = Run(tmp_path / "none", caplog, None)
    assert silent.evaluate(50, 0.9) == ""


@pytest.mark.parametrize("name", ["cut", "src", "sincut", "cyclegan", "gcgan"])
def test_a_guess_is_what_a_discriminator_that_knows_nothing_loses(name: str) -> None:
    method, batch = small_method(name, global_batch=2).double(), pairs(2, crop_of(name))
    undecided = 0.0 if name == "sincut" else 0.5  # its scores are logits
    with torch.no_grad():
        for network in method.networks("discriminator").values():
            *others, bias = network.parameters()
            for parameter in others:
                parameter.zero_()
            bias.fill_(undecided)
    _, reported = method.loss("discriminator", method(batch, at()), batch, at())
    guesses = method.guesses().discriminators
    assert guesses and {name for each in guesses for name in each} == {
        name for name in reported if name[:2] == "D_"
    } - {"D_R1"}
    for each in guesses:
        assert {name: reported[name].item() for name in each} == pytest.approx(each)
    assert all(reported[name].item() == name.endswith("fake") for name in reported if name.startswith("acc/"))


def test_a_guess_among_patches() -> None:
    assert small_method("cut").guesses().contrasts == pytest.approx(dict.fromkeys(("NCE", "NCE_Y"), math.log(256)))
    assert small_method("fastcut").guesses().contrasts == pytest.approx({"NCE": 10 * math.log(256)})
    assert small_method("cut", bank__size=44, bank__internal=False).guesses().contrasts["NCE"] == pytest.approx(
        math.log(45)
    )
