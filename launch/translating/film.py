"""Translating a film, frame by frame: PyAV, an optional extra, decodes and encodes."""

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.console import ProgressLine
from infra.errors import UserError, first_line
from infra.images import MAX_PIXELS, TOO_LARGE
from infra.storage import replacing
from trainer.translator import Translator

# The container by the ending of a name. A film is read as what its name says and as nothing else, since some formats are lists of
# other files.
READ = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}
# What frames are encoded by. AVI knows no times of frames.
ENCODERS = {".mp4": "libx264", ".m4v": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}
OPTIONS = {"crf": "18"}  # little loss; the same scale for both


def is_film(path: Path) -> bool:
    return path.suffix.lower() in READ


def translate_film(translator: Translator, source: Path, out: Path) -> int:
    """Write a film whose frames are translated, each at its time and in its size, and return how many; other tracks than the
    first of pictures are left out. All frames have one style. UserError for what cannot be read, encoded or is too small."""
    ending = out.suffix.lower()
    if ending not in ENCODERS:
        raise UserError(
            f"{out} does not end as a film that can be written: give it one of the endings {', '.join(ENCODERS)}"
        )
    if out.exists() and out.samefile(source):
        raise UserError(f"{out} is the film that is to be translated: name another file")
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise UserError("films need PyAV, which is not installed here: pip install av") from None
    count = 0
    with _explained(av, source), source.open("rb") as file, av.open(file, format=READ[source.suffix.lower()]) as film:
        if not film.streams.video:
            raise UserError(f"{source} holds no pictures: give a film")
        track = film.streams.video[0]
        track.thread_type = "AUTO"  # decodes ahead
        size = track.codec_context.width, track.codec_context.height
        if size[0] * size[1] > MAX_PIXELS:
            raise UserError(f"{source} is too large ({TOO_LARGE}): make it smaller")
        translator.check_size(*size)
        frames = film.decode(track)
        first = next(frames, None)
        if first is None:
            raise UserError(f"{source} holds no frames: give a film")
        with replacing(out) as made, _explained(av, out), av.open(made, "w", format=READ[ending]) as result:
            written = _track(av, result, ENCODERS[ending], track, size)
            with ProgressLine(track.frames, unit="frames", title="frame", enabled=track.frames > 0) as line:
                for frame in itertools.chain([first], frames):
                    image = translator(frame.to_ndarray(format="rgb24"), source.name)
                    new = av.VideoFrame.from_ndarray(image, format="rgb24")
                    new.pts, new.time_base = frame.pts, frame.time_base
                    result.mux(written.encode(new))
                    line.update(1)
                    count += 1
            result.mux(written.encode())
    return count


def _track(av: Any, result: Any, encoder: str, like: Any, size: tuple[int, int]) -> Any:
    try:
        track = result.add_stream(encoder, rate=like.average_rate, options=OPTIONS)
    except (av.codec.codec.UnknownCodecError, ValueError):
        raise UserError(f"this PyAV has no encoder {encoder}: name OUTPUT by another kind of film, such as .webm, or install "
                        "a PyAV that has it") from None  # fmt: skip
    track.width, track.height = size
    # Colours of 2x2 pixels at once, as nearly all players want them, need even sides.
    track.pix_fmt = "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"
    track.codec_context.time_base = like.time_base
    return track


@contextmanager
def _explained(av: Any, path: Path) -> Iterator[None]:
    """What FFmpeg says about a file, as a sentence."""
    try:
        yield
    except av.FFmpegError as error:
        raise UserError(
            f"{path} cannot be read or written as a film ({first_line(error)}): repair it, or name another"
        ) from None
