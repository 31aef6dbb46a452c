"""Encoded images to normalised crops, by DALI or by Pillow: the same samples, crops and flips from either.

On the CPU both decode with libjpeg-turbo and their pixels were identical in every case tried (JPEG with 4:4:4 and
4:2:0 chroma, grayscale and progressive; PNG); the tests hold JPEG to 2 levels of 255 and PNG to exact equality. On a
GPU, nvJPEG's inverse DCT rounds differently by a few levels.

N images, H height, W width, C colours.
"""

import importlib
import importlib.util
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError


@dataclass(frozen=True)
class EncodedCrop:
    """A JPEG or PNG file's bytes, and what is wanted of it: the square at (x, y), mirrored left to right or not.

    name: what to call the image when it cannot be decoded, e.g. "image frankfurt_000021 in train/source/000003.tar".
    """

    encoded: bytes
    x: int
    y: int
    flip: bool
    name: str


class Decoder(ABC):
    """Decodes on `device`, or on the CPU and copies; used by one thread at a time. `crop` is in pixels."""

    def __init__(self, crop: int, device: torch.device) -> None:
        self.crop = crop
        self.device = device
        # Decoding runs beside the training step, so it must not queue behind its kernels.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode(self, crops: Sequence[EncodedCrop]) -> Tensor:
        """Float32 (N, 3, crop, crop) in [-1, 1] on the device, RGB, channels-last, complete on return.

        Raises UserError naming the image that cannot be decoded or is smaller than its crop.
        """
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            pixels_NHWC = self._decode(crops).to(self.device)
            images_NCHW = pixels_NHWC.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
        if self._stream:
            self._stream.synchronize()
        return images_NCHW

    @abstractmethod
    def _decode(self, crops: Sequence[EncodedCrop]) -> Tensor:
        """uint8 (N, crop, crop, 3)."""

    @abstractmethod
    def close(self) -> None:
        """Let threads and memory go."""


def _decode_one(request: EncodedCrop, crop: int) -> np.ndarray:
    """uint8 (crop, crop, 3) by Pillow."""
    try:
        image = Image.open(io.BytesIO(request.encoded)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{request.name} cannot be decoded ({error}): prepare the data again without it") from None
    if request.x + crop > image.width or request.y + crop > image.height:
        raise UserError(
            f"{request.name} is {image.width}x{image.height}, too small for its crop of {crop} pixels at "
            f"({request.x}, {request.y}): prepare the data again, all images of a domain at one size"
        )
    image = image.crop((request.x, request.y, request.x + crop, request.y + crop))
    if request.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


class PillowDecoder(Decoder):
    """Decodes with Pillow in `threads` threads, for platforms without DALI."""

    def __init__(self, crop: int, device: torch.device, threads: int) -> None:
        super().__init__(crop, device)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def _decode(self, crops: Sequence[EncodedCrop]) -> Tensor:
        return torch.from_numpy(np.stack(list(self._pool.map(lambda request: _decode_one(request, self.crop), crops))))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class DaliDecoder(Decoder):
    """Decodes with NVIDIA DALI: nvJPEG on a CUDA device, libjpeg-turbo in `threads` threads otherwise.

    batch: the largest number of images in one call.
    """

    def __init__(self, crop: int, device: torch.device, threads: int, batch: int) -> None:
        super().__init__(crop, device)
        self._pipeline = _dali_pipeline(crop, device, threads, batch)

    def _decode(self, crops: Sequence[EncodedCrop]) -> Tensor:
        try:
            (pixels,) = self._pipeline.run(
                encoded=[np.frombuffer(request.encoded, np.uint8) for request in crops],
                start=[np.array([request.x, request.y], np.int32) for request in crops],
                flip=[np.array(request.flip, np.int32) for request in crops],
            )
        except RuntimeError:
            # DALI loses the whole batch and does not say which image it was.
            for request in crops:
                _decode_one(request, self.crop)
            raise
        return torch.from_dlpack(pixels.as_tensor())

    def close(self) -> None:
        self._pipeline = None


def _dali_pipeline(crop: int, device: torch.device, threads: int, batch: int) -> Any:
    """The DALI pipeline (encoded, start, flip) -> uint8 NHWC."""
    dali: Any = importlib.import_module("nvidia.dali")  # heavy, and absent on some platforms
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    # affine: each process would pin its threads to the same cores. Fancy upsampling: as libjpeg-turbo on the CPU does.
    # hw_decoder_load: the share of a batch for the hardware decoder, which rounds differently; an image must not depend
    # on the batch that it travels in.
    gpu_options = {"affine": False, "jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0} if on_gpu else {}

    @dali.pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=torch.empty(0, device=device).device.index if on_gpu else None,
        prefetch_queue_depth=1,  # the loader's thread runs ahead, not DALI
    )
    def pipeline() -> Any:
        images = fn.decoders.image_slice(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            start=fn.external_source(name="start", dtype=types.INT32, ndim=1),
            shape=[crop, crop],
            axis_names="WH",
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            **gpu_options,
        )
        return fn.flip(images, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))

    built = pipeline()
    built.build()
    return built


def make_decoder(kind: str, *, crop: int, device: torch.device, threads: int, batch: int) -> Decoder:
    """The decoder of that kind: "dali", "pillow", or "auto" (DALI where it is installed).

    UserError if DALI is asked for and not installed.
    """
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if kind == "dali" and not has_dali:
        raise UserError("--data.decoder dali needs NVIDIA DALI, which is not installed here: use auto or pillow")
    if kind == "pillow" or not has_dali:
        return PillowDecoder(crop, device, threads)
    return DaliDecoder(crop, device, threads, batch)
