"""What a trained network's MLflow model holds, and what it takes: as a library, and over HTTP as `mlflow models serve`."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from mlflow import MlflowException
from PIL import Image
from safetensors.torch import load_file

from infra.config import flatten
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.image_model import ImageModel, decoded, encoded
from trainer.methods import SrunitConfig
from trainer.networks.config import DiscriminatorConfig, GeneratorConfig
from trainer.pyfunc import is_published, save_pyfunc_model
from trainer.segmentation.config import SegmenterModelConfig
from trainer.segmentation.trained import load_trained
from trainer.translator import load_translator

pytestmark = pytest.mark.slow

METHOD = SrunitConfig(
    name="srunit", generator=GeneratorConfig(ngf=4, blocks=6), discriminator=DiscriminatorConfig(ndf=4)
)


def picture(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that a run's checkpoint has."""
    torch.manual_seed(0)
    tensors = {name: METHOD.generator.build().state_dict() for name in ("generator", "generator_ema")}
    tensors |= {
        "discriminator": METHOD.discriminator.build().state_dict(),
        "optimiser": {"x": torch.zeros(9)},
        "slots": {},
    }
    config = flatten(METHOD, "method.") | {"data.root": "s3://private/bucket"}
    state = {"step": 7, "scalers": {}, "data": "0" * 64, "config": config, "best": None}
    return Checkpointer(tmp_path_factory.mktemp("run") / "checkpoints", 1).save(7, tensors, state)


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        folder = tmp_path_factory.mktemp("saved") / "model"
        save_pyfunc_model(folder, checkpoint, ["generator"], load_translator)
    return folder


def test_it_holds_the_network_alone(model: Path, checkpoint: Path) -> None:
    network = model / "artifacts" / "network"
    assert {path.name for path in network.iterdir()} == {"generator.safetensors", "state.json", "manifest.json"}
    held, averaged = (
        load_file(folder / name)
        for folder, name in ((network, "generator.safetensors"), (checkpoint, "generator_ema.safetensors"))
    )
    assert held.keys() == averaged.keys() and all(torch.equal(held[name], averaged[name]) for name in held)
    state = Checkpoint(network).state
    assert state["step"] == 7 and all(name.startswith("method.") for name in state["config"])
    assert "private" not in "".join(path.read_text() for path in model.rglob("*.json"))


def test_a_model_is_complete_or_absent(
    model: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_published(model, 7) and not is_published(model, 8)  # where it is of an earlier end
    assert [path.name for path in model.parent.iterdir()] == ["model"]

    def killed(folder: Path, **_: Any) -> None:
        (folder / "artifacts").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow.pyfunc, "save_model", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            save_pyfunc_model(tmp_path / "model", checkpoint, ["generator"], load_translator)
        assert not is_published(tmp_path / "model", 7) and not (tmp_path / "model").exists()


# The application that `mlflow models serve` runs, without the repository and without the S3 client.
CHILD = """
import json, sys, threading, time, urllib.error, urllib.request
for name in ("boto3", "botocore", "s3transfer"):
    sys.modules[name] = None
import mlflow.pyfunc, uvicorn
from mlflow.pyfunc import scoring_server
app = scoring_server.init(mlflow.pyfunc.load_model(sys.argv[1]))
server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.01)
url = "http://127.0.0.1:%d/invocations" % server.servers[0].sockets[0].getsockname()[1]
def ask(body):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})) as answer:
            return 200, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
answers = [ask(json.dumps(request)) for request in json.load(sys.stdin)]
import infra, trainer
print(json.dumps({"code": [infra.__file__, trainer.__file__], "answers": answers}))
"""


def serve(model: Path, *requests: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """What the server of a model answers to JSON: (status, body)."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(model)], input=json.dumps(requests), capture_output=True, text=True,
        cwd=model.parent, env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(model / "code") for file in report["code"])
    return report["answers"]


def test_a_server_takes_numbers_and_files_in_base64(model: Path, checkpoint: Path) -> None:
    translator = load_translator(checkpoint)
    one, other = picture(), picture(9, 8, seed=1)
    example = json.loads((model / "serving_input_example.json").read_text())
    answers = serve(
        model, example, {"inputs": [encoded(one), encoded(other)]}, {"instances": [encoded(one)]},
        {"inputs": one.tolist()}, {"inputs": [one.tolist(), one.tolist()]}, {"inputs": ["aGFsbG8="]}, {"inputs": [[0.5]]},
    )  # fmt: skip
    assert [status for status, _ in answers] == [200] * 5 + [400] * 2
    texts, instance, numbers, batch = (body["predictions"] for _, body in answers[1:5])
    assert np.array_equal(decoded(texts[0]), translator(one)) and np.array_equal(decoded(texts[1]), translator(other))
    assert instance == texts[:1]
    assert np.array_equal(numbers, translator(one)) and np.array_equal(batch, [translator(one)] * 2)
    assert "is no PNG or JPEG file in base64" in answers[5][1]["message"]
    assert "is no RGB image: give whole numbers in 0..255" in answers[6][1]["message"]


def test_a_segmenters_labels_are_a_grey_png(tmp_path: Path) -> None:
    small = SegmenterModelConfig(width=0.1, output_stride=4)
    config = {f"model.{name}": value for name, value in flatten(small).items()}
    state = {"step": 1, "config": config, "image_size": (32, 24), "label_space": "cityscapes19"}
    path = Checkpointer(tmp_path, 1).save(1, {"segmenter": small.build(19).eval().state_dict()}, state)
    save_pyfunc_model(tmp_path / "model", path, ["segmenter"], load_trained)
    (text,) = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(np.array([encoded(picture(24, 32))], object))
    labels = Image.open(io.BytesIO(base64.b64decode(text)))
    assert labels.mode == "L" and np.array_equal(np.asarray(labels), load_trained(path)(picture(24, 32)))


# ---- images -----------------------------------------------------------------------------------------------------------


class Identity(ImageModel):
    def __init__(self) -> None:
        self.apply = lambda image: image

    def __call__(self, given: Any) -> np.ndarray:
        return self.predict(None, given)


def file_of(image: Image.Image, format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def test_files_become_upright_rgb() -> None:
    image = Image.fromarray(picture())
    (back,) = Identity()(np.array([file_of(image, "PNG")], dtype=object))
    assert np.array_equal(decoded(back), picture())
    assert np.array_equal(decoded(file_of(image.convert("L"), "PNG")), np.asarray(image.convert("L").convert("RGB")))
    assert (
        np.abs(
            decoded(file_of(image.resize((80, 48)), "JPEG", quality=95)) - np.asarray(image.resize((80, 48)), float)
        ).mean()
        < 9
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decoded(file_of(image, "JPEG", exif=exif)).shape == (20, 12, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("no base64!", "is no PNG or JPEG file in base64"),
        (file_of(Image.fromarray(picture()), "BMP"), "is no PNG or JPEG file in base64"),
        (file_of(Image.fromarray(picture()), "PNG")[:40], "is no PNG or JPEG file in base64"),
        (file_of(Image.fromarray(picture()).convert("RGBA"), "PNG"), "mode RGBA cannot be used: give 8 bits"),
        (file_of(Image.fromarray(np.ones((4, 4), np.uint16)), "PNG"), "mode I;16 cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(given: str, words: str) -> None:
    with pytest.raises(MlflowException, match=words):
        Identity()(np.array([given], dtype=object))


def test_numbers_are_those_of_pixels() -> None:
    image = picture()
    for given in (image, image.astype(np.int64), np.array(image.tolist(), dtype=object), np.stack([image, image])):
        assert np.array_equal(Identity()(given), given.astype(np.uint8)) and Identity()(given).dtype == np.uint8
    for wrong in (
        image / 255,
        image.astype(int) - 1,
        image.astype(int) + 1,
        image[0],
        np.array([]),
        np.array([1, [2, 3]], object),
    ):
        with pytest.raises(MlflowException, match="is no RGB image: give whole numbers"):
            Identity()(wrong)
