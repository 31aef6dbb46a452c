"""Encoded images to normalised crops, and label maps to crops, by DALI or by Pillow: the same from either.

On the CPU both decode with libjpeg-turbo and their pixels were identical in every case tried (JPEG with 4:4:4 and
4:2:0 chroma, grayscale and progressive; PNG); the tests hold JPEG to 2 levels of 255 and PNG to exact equality. On a
GPU, nvJPEG's inverse DCT rounds differently by a few levels. Label maps are PNG, which the CPU decodes in any case.

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
from pipelines.labels import CLASSES, IGNORE

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class EncodedCrop:
    """A JPEG or PNG file's bytes, and what is wanted of it: the crop at (x, y), mirrored left to right or not.

    name: what to call the image when it cannot be decoded, e.g. "image frankfurt_000021 in train/source/000003.tar".
    """

    encoded: bytes
    x: int
    y: int
    flip: bool
    name: str


class Decoder(ABC):
    """Decodes on `device`, or on the CPU and copies; used by one thread at a time.

    labels: what comes are label maps of trainIds and not images.
    """

    def __init__(self, crop: Size, device: torch.device, *, labels: bool) -> None:
        self.crop = crop
        self.device = device
        self.labels = labels
        # Decoding runs beside the training step, so it must not queue behind its kernels.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode(self, crops: Sequence[EncodedCrop]) -> Tensor:
        """Of images float32 (N, 3, H, W) in [-1, 1], RGB, channels-last; of label maps uint8 (N, H, W) trainIds. On the
        device, complete on return.

        Raises UserError naming the file that cannot be decoded, is smaller than its crop, or has labels beyond trainIds.
        """
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            pixels_NHWC = self._decode(crops)
            if self.labels:
                _check_trainids(pixels_NHWC, crops)
                result = pixels_NHWC.squeeze(3).to(self.device, copy=True)  # DALI's memory is ours until its next run
            else:
                pixels_NCHW = pixels_NHWC.to(self.device).permute(0, 3, 1, 2)
                result = pixels_NCHW.to(torch.float32).div_(127.5).sub_(1.0)
        if self._stream:
            self._stream.synchronize()
        return result

    @abstractmethod
    def _decode(self, crops: Sequence[EncodedCrop]) -> Tensor:
        """uint8 (N, H, W, C): of images three colours; of label maps one channel, on the CPU."""

    @abstractmethod
    def close(self) -> None:
        """Let threads and memory go."""


def _check_trainids(labels_NHW1: Tensor, crops: Sequence[EncodedCrop]) -> None:
    unknown = (labels_NHW1 >= len(CLASSES)) & (labels_NHW1 != IGNORE)
    if unknown.any():
        n, value = int(unknown.nonzero()[0, 0]), int(labels_NHW1[unknown][0])
        raise UserError(f"{crops[n].name} holds {value}, which is no trainId (0 to {len(CLASSES) - 1}, or {IGNORE} to "
                        "ignore a pixel): prepare the data again from label files of Cityscapes ids or colours")  # fmt: skip


def _decode_one(request: EncodedCrop, crop: Size, labels: bool) -> np.ndarray:
    """uint8 (H, W, 3), of a label map (H, W, 1), by Pillow."""
    try:
        image = Image.open(io.BytesIO(request.encoded)).convert("L" if labels else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{request.name} cannot be decoded ({error}): prepare the data again without it") from None
    width, height = crop
    if request.x + width > image.width or request.y + height > image.height:
        raise UserError(
            f"{request.name} is {image.width}x{image.height}, too small for its crop of {width}x{height} pixels at "
            f"({request.x}, {request.y}): prepare the data again, all images of a domain at one size"
        )
    image = image.crop((request.x, request.y, request.x + width, request.y + height))
    if request.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).reshape(height, width, -1)


class PillowDecoder(Decoder):
    """Decodes with Pillow in `threads` threads, for platforms without DALI."""

    def __init__(self, crop: Size, device: torch.device, threads: int, *, labels: bool = False) -> None:
        super().__init__(crop, device, labels=labels)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def _decode(self, crops: Sequence[EncodedCrop]) -> Tensor:
        decoded = self._pool.map(lambda request: _decode_one(request, self.crop, self.labels), crops)
        return torch.from_numpy(np.stack(list(decoded)))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class DaliDecoder(Decoder):
    """Decodes with NVIDIA DALI: images by nvJPEG on a CUDA device, the rest on the CPU in `threads` threads.

    batch: the largest number of images in one call.
    """

    def __init__(self, crop: Size, device: torch.device, threads: int, batch: int, *, labels: bool = False) -> None:
        super().__init__(crop, device, labels=labels)
        self._pipeline = _dali_pipeline(crop, torch.device("cpu") if labels else device, threads, batch, labels)

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
                _decode_one(request, self.crop, self.labels)
            raise
        return torch.from_dlpack(pixels.as_tensor())

    def close(self) -> None:
        self._pipeline = None


def _dali_pipeline(crop: Size, device: torch.device, threads: int, batch: int, labels: bool) -> Any:
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
            shape=list(crop),
            axis_names="WH",
            device="mixed" if on_gpu else "cpu",
            output_type=types.GRAY if labels else types.RGB,
            adjust_orientation=False,
            **gpu_options,
        )
        return fn.flip(images, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))

    built = pipeline()
    built.build()
    return built


def make_decoder(
    kind: str, *, crop: Size, device: torch.device, threads: int, batch: int, labels: bool = False
) -> Decoder:
    """The decoder of that kind for images, or for label maps: "dali", "pillow", or "auto" (DALI where it is installed).

    UserError if DALI is asked for and not installed.
    """
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if kind == "dali" and not has_dali:
        raise UserError("--data.decoder dali needs NVIDIA DALI, which is not installed here: use auto or pillow")
    if kind == "pillow" or not has_dali:
        return PillowDecoder(crop, device, threads, labels=labels)
    return DaliDecoder(crop, device, threads, batch, labels=labels)
