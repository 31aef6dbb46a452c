"""A trained network as an MLflow model, which carries the code that it needs, and its weights alone."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from infra.disk import flush
from infra.json_lines import read_json
from trainer.checkpoint import NETWORK, STATE, Checkpoint, write_checkpoint

NEEDED = ("torch", "numpy", "pillow", "safetensors", "pyyaml")  # by the code that a model carries
FACTS = ("step", "image_size", "label_space")  # of a checkpoint, beside the options of its model
EXAMPLE_SIZE = 64, 32  # pixels

Apply = Callable[[np.ndarray], np.ndarray]


def save_pyfunc_model(folder: Path, checkpoint: Path, networks: Sequence[str], load: Callable[[Path], Apply]) -> None:
    """Write some networks of a checkpoint, their moving averages where there are any, as a folder that
    `mlflow.pyfunc.load_model` loads, which is complete or absent: it gets its name when all is on disk.

    load: see `trainer.image_model.ImageModel`, whose `predict` says what the model takes and gives.
    """
    # Imported here, as MLflow takes long to import.
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from trainer.image_model import ImageModel, encoded

    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    packages = [str(Path(__file__).parents[1] / package) for package in ("trainer", "infra")]
    # Named here, since MLflow would find them out by loading the model in another process, which takes many seconds.
    needed = [f"{name}=={version(name).split('+')[0]}" for name in NEEDED]
    # Images in numbers and in texts: the one signature by which MLflow lets both pass as they come.
    anything = Schema([TensorSpec(np.dtype(object), (-1,))])
    width, height = EXAMPLE_SIZE
    gradient = np.linspace(0, 255, height * width * 3).astype(np.uint8).reshape(height, width, 3)
    with tempfile.TemporaryDirectory() as scratch:
        network = Path(scratch) / NETWORK
        _write_networks(network, Checkpoint(checkpoint), networks)
        mlflow.pyfunc.save_model(
            draft,
            python_model=ImageModel(load),
            artifacts={NETWORK: str(network)},
            code_paths=packages,
            pip_requirements=needed,
            signature=ModelSignature(inputs=anything, outputs=anything),
            input_example=np.array([encoded(gradient)], dtype=object),
        )
    for path in (*draft.rglob("*"), draft):
        flush(path)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier end of the same run
    draft.rename(folder)
    flush(folder.parent)


def is_published(folder: Path, step: int) -> bool:
    """Whether the folder is the model of that step. (Of models of earlier versions the step may not be known.)"""
    known = read_json(folder / "artifacts" / NETWORK / STATE, dict).get("step")
    return folder.is_dir() and known in (None, step)


def _write_networks(folder: Path, checkpoint: Checkpoint, networks: Sequence[str]) -> None:
    """A checkpoint of these networks, with what it takes to build them."""
    state = {name: value for name, value in checkpoint.state.items() if name in FACTS}
    needed = ("model.", "method.", "seed")  # of a segmenter, of a translator, of its styles or noise
    config = {name: value for name, value in checkpoint.state["config"].items() if name.startswith(needed)}
    tensors = {name: checkpoint.tensors(checkpoint.averaged(name)) for name in networks}
    write_checkpoint(folder, tensors, {**state, "config": config})
