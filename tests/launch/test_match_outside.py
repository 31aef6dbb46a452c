"""A match by a segmenter from outside, of which a YAML file says how its network is used."""

import shutil
from pathlib import Path

import pytest

from infra.storage import LocalStorage
from pipelines.matching.match import load_facts
from tests.launch.evaluating import make_scenes, make_segmenter
from tests.launch.test_match_cli import match


def test_it_is_known_by_what_is_said_of_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_scenes(tmp_path / "data")
    segmenter = make_segmenter(tmp_path / "segmenter", data)
    moved = tmp_path / segmenter.name
    shutil.copy(segmenter.with_suffix(".onnx"), tmp_path)
    moved.write_text(segmenter.read_text())
    assert match(data, by=f"segmenter {segmenter}") == 0
    assert match(data, by=f"segmenter {moved}") == 0
    assert "already matched" in capsys.readouterr().out
    moved.write_text(segmenter.read_text() + "\ninput_size: [32, 16]\n")
    assert match(data, by=f"segmenter {moved}") == 2
    assert "was made with description = " in capsys.readouterr().err
    assert match(data, "--name", "smaller", by=f"segmenter {moved}") == 0
    weights = {load_facts(LocalStorage(data), name).segmenter for name in ("segmenter", "smaller")}
    assert len(weights) == 1
