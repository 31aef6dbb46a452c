"""A trained network as an MLflow model, which carries the code that it needs."""

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

NEEDED = ("torch", "numpy", "pillow", "safetensors", "pyyaml", "boto3")  # by the code that a model carries

Apply = Callable[[np.ndarray], np.ndarray]


def save_pyfunc_model(folder: Path, checkpoint: Path, load: Callable[[Path], Apply]) -> None:
    """Write a checkpoint as a folder that `mlflow.pyfunc.load_model` loads.

    load: makes of the checkpoint what is applied to one image, uint8 RGB (H, W, 3); such as `load_translator`. `predict`
    takes one image or several (N, H, W, 3), and gives what `load` made of each.
    """
    import mlflow.pyfunc

    class Model(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
        def load_context(self, context: Any) -> None:
            self.apply = load(Path(context.artifacts["checkpoint"]))

        def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
            images = np.asarray(model_input)
            return np.stack([self.apply(image) for image in images]) if images.ndim == 4 else self.apply(images)

    shutil.rmtree(folder, ignore_errors=True)
    rooms = [str(Path(__file__).parents[1] / room) for room in ("trainer", "infra")]
    # Named here, since MLflow would find them out by loading the model in another process, which takes many seconds.
    needed = [f"{name}=={version(name).split('+')[0]}" for name in NEEDED]
    mlflow.pyfunc.save_model(
        folder,
        python_model=Model(),
        artifacts={"checkpoint": str(checkpoint)},
        code_paths=rooms,
        pip_requirements=needed,
    )
