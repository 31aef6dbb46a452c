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
# How colours become brightness and two differences, by the numbers of ITU-T H.273, table 4: BT.709, FCC, BT.601 twice,
# SMPTE 240M, BT.2020. Of a film that says none of these, FFmpeg takes BT.601, both ways.
MATRICES = (1, 4, 5, 6, 7, 9)


def is_film(path: Path) -> bool:
    return path.suffix.lower() in READ


def translate_film(translator: Translator, source: Path, out: Path) -> int:
    """Write a film whose frames are translated, each at its time and in its size, and return how many. Colours are stored as
    the film says that its own are. Other tracks than the first of pictures are left out. All frames have one style. UserError
    for what cannot be read, encoded or is too small."""
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
                    matrix = frame.colorspace if frame.colorspace in MATRICES else None
                    new = new.reformat(format=written.pix_fmt, dst_colorspace=matrix)
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
    context, source = track.codec_context, like.codec_context
    context.time_base = like.time_base
    if source.colorspace in MATRICES:
        context.colorspace, context.color_primaries, context.color_trc = (
            source.colorspace, source.color_primaries, source.color_trc
        )  # fmt: skip
        context.color_range = 1  # from 16 to 235, which the conversion makes
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
