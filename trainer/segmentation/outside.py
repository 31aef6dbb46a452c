"""Outside networks as segmenters: a small YAML file says what a network's weights want and give."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.config import build, option, read_yaml
from infra.errors import UserError
from trainer.segmentation.espnetv2 import load_espnetv2
from trainer.segmentation.segmenter import Segmenter

PROBE = np.zeros((128, 256, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The keys of the YAML file."""

    network: str = option("", "the kind of network", choices=("onnx", "espnetv2"))
    weights: str = option("", "its file, relative to the YAML file")
    mean: tuple[float, ...] = option((), "of each channel, after the division by scale")
    std: tuple[float, ...] = option((), "of each channel, after the division by scale")
    scale: float = option(255.0, "pixel values are divided by it")
    channels: str = option("RGB", "the network's order of channels", choices=("RGB", "BGR"))
    input_size: tuple[int, ...] | None = option(None, "(width, height) that the network sees; none: the image's own")
    trainids: tuple[int, ...] = option(tuple(range(19)), "the trainId of each output channel, 255 for none")
    label_space: str = option("cityscapes19", "what the trainIds mean")

    def __post_init__(self) -> None:
        if not self.network or not self.weights:
            raise UserError("network and weights are missing: name the kind of network and its file")
        if len(self.mean) != 3 or len(self.std) != 3 or min(*self.std, self.scale) <= 0:
            raise UserError("mean and std must be three numbers each, std and scale above 0: correct them")
        if self.input_size is not None and (len(self.input_size) != 2 or min(self.input_size) < 1):
            raise UserError(f"input_size = {list(self.input_size)} is no size in pixels: give [width, height] or none")


def read_description(path: Path) -> Description:
    """What a YAML file says. UserError for one that is missing or wrong."""
    values = read_yaml(path)
    try:
        return build(Description, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load(path: Path, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter that a YAML file describes (keys: `Description`), tried once on a black image.

    UserError for a file that is missing or wrong, and for a network that does not do what the YAML file says.
    """
    described = read_description(path)
    weights = path.parent / described.weights
    if not weights.is_file():
        raise UserError(f"{path} names the weights {weights}, which do not exist: put them there or correct the name")
    logits = load_espnetv2(weights).to(device) if described.network == "espnetv2" else OnnxNetwork(weights, device)
    size = described.input_size
    segmenter = Segmenter(
        logits, name=path.stem, input_size=(size[0], size[1]) if size else None, mean=described.mean, std=described.std,
        scale=described.scale, channels=described.channels, trainids=described.trainids,
        label_space=described.label_space, device=device,
    )  # fmt: skip
    segmenter(PROBE)
    return segmenter


class OnnxNetwork:
    """float32 (1, 3, h, w) to the first output of an ONNX file, computed by onnxruntime on the CPU or, where the
    device is one and onnxruntime can, the NVIDIA GPU. UserError for a file it cannot read or an input it refuses."""

    def __init__(self, path: Path, device: torch.device | str) -> None:
        import onnxruntime  # takes a moment to import

        options = onnxruntime.SessionOptions()
        options.use_deterministic_compute = True
        options.intra_op_num_threads = torch.get_num_threads()  # several processes may share the machine
        self.path, self.device = path, torch.device(device)
        try:
            self.session = onnxruntime.InferenceSession(path, options, _providers(self.device))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise UserError(
                f"{path} is not an ONNX file that onnxruntime can run{_reason(error)}: export it again"
            ) from error

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        name = self.session.get_inputs()[0].name
        try:
            outputs = self.session.run(None, {name: x_NCHW.cpu().numpy()})
        except Exception as error:
            raise UserError(
                f"{self.path} refuses a float32 image of shape {tuple(x_NCHW.shape)}{_reason(error)}: give the size it "
                "wants as input_size: [width, height], or export it with one such image as its input"
            ) from error
        return torch.from_numpy(outputs[0]).to(self.device)


def _providers(device: torch.device) -> list[Any]:
    import onnxruntime

    if device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ["CPUExecutionProvider"]
    # fp32, and no kernels picked by their speed: metrics must repeat.
    index = torch.cuda.current_device() if device.index is None else device.index
    exact = {"device_id": index, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    return [("CUDAExecutionProvider", exact), "CPUExecutionProvider"]


def _reason(error: Exception) -> str:
    """What onnxruntime says, on one line, without its prefix of codes."""
    return f" ({' '.join(str(error).rpartition(' : ')[2].split())})"
