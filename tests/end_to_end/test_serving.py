"""`launch/serve.py` as a process: it starts, translates, loses nothing when a replica is killed, and ends when it is told to."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.config import flatten
from launch.benchmarks.serving import Load, run, service
from tests.launch.serving.asking import ask
from tests.trainer.small import method_config
from trainer.checkpointer import Checkpointer
from trainer.translator import load_translator

REPOSITORY = Path(__file__).parents[2]


def picture(height: int = 40, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small generator."""
    made = method_config("cut").translation()
    tensors = {name: network.state_dict() for name, network in made.named_children()}
    config = flatten(method_config("cut"), "method.") | {"method.name": "cut", "seed": 0}
    return Checkpointer(tmp_path_factory.mktemp("run"), keep=1).save(7, tensors, {"step": 7, "config": config})


def test_it_translates_what_comes_together_and_ends_when_the_last_is_answered(checkpoint: Path) -> None:
    translator = load_translator(checkpoint)
    images = [picture(seed=seed) for seed in range(12)]
    with (
        service(checkpoint, png(images[0]), "--batch", "4", "--wait-ms", "200") as server,
        ThreadPoolExecutor(12) as pool,
    ):
        root = server.url.removesuffix("translate")
        assert ask(f"{root}health").status == 200 and json.loads(ask(f"{root}about").body)["max_pixels"] == 4_000_000
        for image, reply in zip(images, pool.map(lambda image: ask(server.url, png(image)), images), strict=True):
            assert reply.status == 200, reply.text
            found = np.asarray(Image.open(io.BytesIO(reply.body)))
            assert np.abs(found.astype(int) - translator(image)).max() <= 1
        text = ask(f"{root}metrics").text
        assert "srunit_replicas 1.0" in text and 'srunit_batch_images_bucket{le="1.0"} 12.0' not in text
        large = png(picture(400, 400))
        last = [pool.submit(ask, server.url, large) for _ in range(8)]
        while "srunit_in_flight 8.0" not in ask(f"{root}metrics").text:
            time.sleep(0.05)
        os.kill(server.process, signal.SIGTERM)
        assert [each.result().status for each in last] == [200] * 8


def test_replicas_are_on_a_cluster_and_leave_it(checkpoint: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):  # the second one finds the room that the first had
            with service(checkpoint, png(picture()), "--address", cluster.address) as server:
                assert ask(server.url, png(picture())).status == 200
                assert json.loads(ask(server.url.removesuffix("translate") + "about").body)["max_pixels"] == 4_000_000
    finally:
        cluster.shutdown()


def test_load_beside_mlflow_with_a_killed_replica(checkpoint: Path) -> None:
    load = Load(clients=(2,), requests=6, soak=20, size=(48, 32))
    metrics = {each.name: each.values for each in run(checkpoint, load, 1)}
    documented = str(sys.modules[run.__module__].__doc__)
    assert all(name.split("/")[0] in documented for name in metrics)
    for name in ("errors", "mlflow_errors", "soak_errors", "kill_errors"):
        assert metrics[name] == [0]
    assert metrics["kill_slowest"][0] > 0


def test_a_port_in_use_is_a_sentence(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [
            sys.executable,
            str(REPOSITORY / "launch" / "serve.py"),
            str(checkpoint),
            "--port",
            str(taken.getsockname()[1]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "cannot be listened at (Address already in use): give another --port" in done.stderr
    assert "Traceback" not in done.stderr
