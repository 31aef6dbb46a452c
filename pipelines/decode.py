"""Encoded images to normalised crops, and label maps to crops, by DALI or by Pillow: the same from either.

On the CPU both decode with libjpeg-turbo and their pixels were identical in every case tried (JPEG with 4:4:4 and
4:2:0 chroma, grayscale and progressive; PNG); the tests hold JPEG to 2 levels of 255 and PNG to exact equality. On a
GPU, nvJPEG's inverse DCT rounds differently by a few levels. Label maps are PNG, which the CPU decodes in any case.

N images, H height, W width, C colours.
"""

import functools
import importlib
import importlib.util
import io
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from infra.errors import UserError
from infra.images import DAMAGED, MAX_PIXELS, STORED, open_image
from pipelines.cuts import Size
from pipelines.images import encoded_size
from pipelines.labels import CLASSES, IGNORE

ZOOMED_KEPT = 4  # whole images that stay decoded: all tiles of a step are of one source and one target
MIDDLE = 127.5  # of the range of a pixel; (pixel - MIDDLE) / MIDDLE lies in [-1, 1]


class Undecodable(UserError):
    """Some of the files of one call cannot be had. faults: what is wrong, a sentence each, by their place in the call."""

    def __init__(self, faults: Mapping[int, str]) -> None:
        super().__init__(next(iter(faults.values())))
        self.faults = faults


@dataclass(frozen=True)
class EncodedCrop:
    """A JPEG or PNG file's bytes, and what is wanted of it: the crop at (x, y), mirrored left to right or not.

    name: what to call the image when it cannot be decoded, e.g. "image frankfurt_000021 in train/source/000003.tar".
    zoomed: (width, height) that it is resized to before it is cut, bilinear with Pillow's anti-aliasing; for Pillow only.
    """

    encoded: bytes
    x: int
    y: int
    flip: bool
    name: str
    zoomed: Size | None = None


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

        Raises Undecodable with every file that cannot be decoded, is smaller than its crop, or has labels in the crop
        that are no trainIds. The decoder can be used further.
        """
        return self.begin(crops)()

    def begin(self, crops: Sequence[EncodedCrop]) -> Callable[[], Tensor]:
        """Begin to `decode`; the function returned waits for the result, once. More may be begun meanwhile, so that
        the threads need not wait while files are handed over."""
        return functools.partial(self._finish, crops, self._begin(crops))

    def _finish(self, crops: Sequence[EncodedCrop], pixels: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            pixels_NHWC = pixels()
            if self.labels:
                _check_trainids(pixels_NHWC, crops)
            # On a GPU a copy, since DALI would use its memory again while kernels of other streams still wait for it.
            pixels_NHWC = pixels_NHWC.to(self.device, copy=self._stream is not None)
            result = pixels_NHWC.squeeze(3) if self.labels else pixels_NHWC.permute(0, 3, 1, 2)
        if self._stream:
            self._stream.synchronize()
        return result

    @abstractmethod
    def _begin(self, crops: Sequence[EncodedCrop]) -> Callable[[], Tensor]:
        """(N, H, W, C): of images three colours, float32 in [-1, 1]; of label maps one channel, uint8, on the CPU."""

    @abstractmethod
    def close(self) -> None:
        """Let threads and memory go."""


def _check_trainids(labels_NHW1: Tensor, crops: Sequence[EncodedCrop]) -> None:
    unknown = (labels_NHW1 >= len(CLASSES)) & (labels_NHW1 != IGNORE)
    if unknown.any():
        raise Undecodable({
            n: f"{crops[n].name} holds {int(labels_NHW1[n][unknown[n]][0])}, which is no trainId (0 to {len(CLASSES) - 1}, "
               f"or {IGNORE} to ignore a pixel): prepare the data again from label files of Cityscapes ids or colours"
            for n in unknown.flatten(1).any(1).nonzero().flatten().tolist()
        })  # fmt: skip


@dataclass(frozen=True)
class _File:
    """A file, which its name alone tells from others."""

    name: str
    encoded: bytes = field(compare=False)


def _open(file: _File, labels: bool) -> Image.Image:
    """The whole image in mode RGB, a label map in mode L. UserError if it cannot be decoded."""
    image = _header(file)
    try:
        return image.convert("L" if labels else "RGB")
    except DAMAGED as error:
        raise _undecodable(file, error) from None


def _header(file: _File) -> Image.Image:
    """The image before it is decoded. UserError for what is not to be decoded at all."""
    try:
        return open_image(io.BytesIO(file.encoded), STORED)
    except DAMAGED as error:
        raise _undecodable(file, error) from None


def _undecodable(file: _File, error: Exception) -> UserError:
    problem = "it is no JPEG or PNG file" if isinstance(error, UnidentifiedImageError) else error
    return UserError(f"{file.name} cannot be decoded ({problem}): prepare the data again without it")


def _decode_one(
    request: EncodedCrop, crop: Size, labels: bool, open_zoomed: Callable[[_File, bool], Image.Image] = _open
) -> np.ndarray:
    """uint8 (H, W, 3), of a label map (H, W, 1), by Pillow."""
    file, (width, height) = _File(request.name, request.encoded), crop
    if request.zoomed:
        image = _cut_zoomed(open_zoomed(file, labels), request, request.zoomed, crop)
    else:
        image = _open(file, labels)
        if request.x + width > image.width or request.y + height > image.height:
            raise UserError(
                f"{request.name} is {image.width}x{image.height}, too small for its crop of {width}x{height} pixels at "
                f"({request.x}, {request.y}): prepare the data again, all images of a domain at one size"
            )
        image = image.crop((request.x, request.y, request.x + width, request.y + height))
    if request.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).reshape(height, width, -1)


def _cut_zoomed(image: Image.Image, request: EncodedCrop, zoomed: Size, crop: Size) -> Image.Image:
    """What would be cut from the image at the size `zoomed`, of which only that is computed."""
    corners = request.x, request.y, request.x + crop[0], request.y + crop[1]
    left, top, right, bottom = (corner * image.size[i % 2] / zoomed[i % 2] for i, corner in enumerate(corners))
    return image.resize(crop, Image.Resampling.BILINEAR, box=(left, top, right, bottom))


class PillowDecoder(Decoder):
    """Decodes with Pillow in `threads` threads, for platforms without DALI."""

    def __init__(self, crop: Size, device: torch.device, threads: int, *, labels: bool = False) -> None:
        super().__init__(crop, device, labels=labels)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._open_zoomed = functools.lru_cache(ZOOMED_KEPT)(_open)

    def _begin(self, crops: Sequence[EncodedCrop]) -> Callable[[], Tensor]:
        jobs = [self._pool.submit(_decode_one, request, self.crop, self.labels, self._open_zoomed) for request in crops]
        return functools.partial(self._collect, jobs)

    def _collect(self, jobs: Sequence[Future[np.ndarray]]) -> Tensor:
        decoded, faults = [], {}
        for place, job in enumerate(jobs):
            try:
                decoded.append(job.result())
            except UserError as error:
                faults[place] = str(error)
        if faults:
            raise Undecodable(faults)
        pixels_NHWC = torch.from_numpy(np.stack(decoded))
        # In DALI's order, a product by the reciprocal of the deviation, so that not even rounding tells the two apart.
        return pixels_NHWC if self.labels else pixels_NHWC.to(torch.float32).sub_(MIDDLE).mul_(1 / MIDDLE)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass(eq=False)
class _Run:
    """Files given to DALI, and what came of them."""

    crops: Sequence[EncodedCrop]
    result: Tensor | RuntimeError | None = None


class DaliDecoder(Decoder):
    """Decodes with NVIDIA DALI: images by nvJPEG on a CUDA device, the rest on the CPU in `threads` threads.

    batch: the largest number of images in one call.
    """

    def __init__(self, crop: Size, device: torch.device, threads: int, batch: int, *, labels: bool = False) -> None:
        super().__init__(crop, device, labels=labels)
        where = torch.device("cpu") if labels else device
        self._build = functools.partial(_dali_pipeline, crop, where, threads, batch, labels)
        self._pipeline = self._build()
        self._runs: deque[_Run] = deque()  # under way; DALI works on the first and has the files of the others

    def _begin(self, crops: Sequence[EncodedCrop]) -> Callable[[], Tensor]:
        if all(self._fits(request) for request in crops):
            return functools.partial(self._pixels, self._start(_Run(crops)))
        # DALI crashes when it meets such an image while its other threads are at theirs, so each is tried alone.
        return functools.partial(self._pixels_of_suspects, crops)

    def _fits(self, request: EncodedCrop) -> bool:
        width, height = encoded_size(request.encoded) or (0, 0)
        if width * height > MAX_PIXELS:
            return False
        return request.x + self.crop[0] <= width and request.y + self.crop[1] <= height

    def _pixels(self, run: "_Run") -> Tensor:
        try:
            return self._wait(run)
        except RuntimeError:
            self._raise_faults(run.crops)
            raise

    def _pixels_of_suspects(self, crops: Sequence[EncodedCrop]) -> Tensor:
        self._raise_faults(crops)
        return self._pixels(self._start(_Run(crops)))

    def _raise_faults(self, crops: Sequence[EncodedCrop]) -> None:
        """DALI loses the whole batch and does not say which image it was. Alone, each shows what it is."""
        faults = {place: fault for place, request in enumerate(crops) if (fault := self._fault(request))}
        if faults:
            raise Undecodable(faults)

    def _start(self, run: "_Run") -> "_Run":
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(crop.encoded, np.uint8) for crop in run.crops])
            self._pipeline.feed_input("start", np.array([[crop.x, crop.y] for crop in run.crops], np.int32))
            self._pipeline.feed_input("flip", np.array([crop.flip for crop in run.crops], np.int32))
        except RuntimeError as error:
            run.result = error
            return run
        self._runs.append(run)
        if len(self._runs) == 1:
            self._schedule()
        return run

    def _schedule(self) -> None:
        """Let DALI work on the run in turn, and on no other, so that a failure finds the pipeline at nothing else."""
        try:
            self._pipeline.schedule_run()
        except RuntimeError as error:
            self._lose(error)

    def _wait(self, run: "_Run") -> Tensor:
        while run.result is None:
            self._meet()
        if isinstance(run.result, RuntimeError):
            raise run.result
        return run.result

    def _meet(self) -> None:
        """Wait for the run in turn. The next one goes to work at once, its files being there."""
        try:
            (pixels,) = self._pipeline.outputs()
        except RuntimeError as error:
            self._lose(error)
            return
        run = self._runs.popleft()
        if self._runs:
            self._schedule()
        run.result = torch.from_dlpack(pixels.as_tensor())

    def _lose(self, error: RuntimeError) -> None:
        """The run in turn has failed, and DALI vouches no longer for the pipeline: the others go to a new one."""
        self._runs.popleft().result = error
        self._pipeline = self._build()
        others, self._runs = self._runs, deque()
        for run in others:
            self._start(run)

    def _fault(self, request: EncodedCrop) -> str | None:
        """What keeps DALI from decoding an image, as a sentence."""
        try:
            _header(_File(request.name, request.encoded))  # DALI has no limit of pixels, and knows more formats
            self._wait(self._start(_Run([request])))
        except UserError as known:
            return str(known)
        except RuntimeError as error:
            try:
                _decode_one(request, self.crop, self.labels)  # has better words
            except UserError as known:
                return str(known)
            detail = str(error).partition("encountered:")[2].strip().partition("\n")[0]
            return f"{request.name} cannot be decoded by DALI ({detail}): pass --data.decoder pillow"
        return None

    def close(self) -> None:
        self._pipeline = None


def _dali_pipeline(crop: Size, device: torch.device, threads: int, batch: int, labels: bool) -> Any:
    """The DALI pipeline (encoded, start, flip) -> NHWC: normalised float32, of label maps uint8."""
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
        exec_dynamic=True,  # what it returns is not written to again
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
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        if labels:
            return fn.flip(images, horizontal=flip)
        return fn.crop_mirror_normalize(
            images, mirror=flip, mean=[MIDDLE] * 3, std=[MIDDLE] * 3, dtype=types.FLOAT, output_layout="HWC"
        )

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
