"""Names that are not ASCII, where the environment says that everything is (LC_ALL=C, as in many containers)."""

import json
import sys
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from PIL import Image

from infra.config import read_yaml
from launch.runs.folder import RunFolder
from tests.end_to_end.jobs import OPTIONS, REPOSITORY, TRAIN, finish, spawn

C = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PREPARE = str(REPOSITORY / "launch" / "prepare.py")


def test_names_are_the_same_in_every_locale(tmp_path: Path) -> None:
    for folder in ("trainA", "trainB"):
        (tmp_path / "Straßen" / folder).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "Straßen" / folder / f"Häuser {number}.png")
    prepare = [sys.executable, PREPARE, "folders", "Straßen", "--size", "64x32", "--out", "Bilder/für alle"]
    finish(spawn(prepare, cwd=tmp_path, **C))
    data = ["--data", "Bilder/für alle"]
    train = [sys.executable, TRAIN, *OPTIONS, *data, "--run-dir", "Läufe/größer", "--max-steps", "2"]
    output = finish(spawn(train, cwd=tmp_path, **C))
    assert "Läufe/größer: " in output

    left = RunFolder(tmp_path / "Läufe" / "größer")
    assert read_yaml(left.config_file)["data.root"] == "Bilder/für alle"
    assert "--run-dir 'Läufe/größer'" in json.loads((left.path / "environment.json").read_text())[0]["command"]
    assert "saved Läufe/größer/checkpoints/step_2" in left.log_file.read_text(encoding="utf-8")
    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert store.get_run(left.run_id_file.read_text().strip()).info.run_name == "größer"
    shard, _ = (tmp_path / "Bilder").rglob("*.tar")
    content = shard.read_bytes()
    assert b"000001-H-user-1.jpg" in content and b"H\\u00e4user 1.png" in content

    refused = [sys.executable, TRAIN, *OPTIONS, "--data", "für niemand"]
    assert "error: no prepared data at für niemand" in finish(spawn(refused, cwd=tmp_path, **C), expect=2)
