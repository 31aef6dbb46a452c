"""What a run folder says of itself."""

from pathlib import Path
from typing import Any

import pytest

from infra.config import flatten
from infra.errors import UserError
from launch.runs.config import JobConfig, make_config
from launch.runs.folder import RunFolder, check_same


def test_an_evaluation_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.evaluations() == []
    folder.evaluations_file.write_text('{"step": 1, "Dist": 5.0}\n{"step": 2, "Di')
    assert folder.evaluations() == [{"step": 1, "Dist": 5.0}]


def saved(**changes: Any) -> dict[str, Any]:
    """A configuration as a run wrote it; None leaves an option out."""
    config = flatten(make_config({"engine.precision": "fp32"})) | changes
    return {name: value for name, value in config.items() if name not in changes or value is not None}


def now(**options: Any) -> JobConfig:
    return make_config({"engine.precision": "fp32", **options})


def test_an_option_that_is_newer_than_the_run_has_its_default() -> None:
    older = saved(**{"method.patches": None, "engine.triton": None})
    check_same("the run", older, now())
    with pytest.raises(UserError, match="the run has method.patches = 256, not 64: repeat its options"):
        check_same("the run", older, now(**{"method.patches": 64}))


def test_an_option_that_this_version_does_not_know_is_named() -> None:
    with pytest.raises(
        UserError,
        match="the run has the option method.magic, which is unknown here, so another program or version began it",
    ):
        check_same("the run", saved(**{"method.magic": 1}), now())


def test_a_precision_left_open_agrees_with_any() -> None:
    for precision in ("fp32", "bf16", "fp16"):
        check_same("the run", saved(**{"engine.precision": precision}), now(**{"engine.precision": "auto"}))
    with pytest.raises(UserError, match="engine.precision = bf16, not fp32"):
        check_same("the run", saved(**{"engine.precision": "bf16"}), now())
