"""launch/translate.py on films."""

import sys
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest

from launch.translating.film import ENCODERS, translate_film
from tests.launch.translating import make_run, refused, translate
from trainer.translator import Translator, load_translator

FRAMES = 5
TIMES = [Fraction(tick, 25) for tick in (0, 1, 2, 5, 6)]  # one is shown longer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), "munit")


class Unchanged:
    """A translator that changes nothing."""

    def check_size(self, width: int, height: int) -> None:
        pass

    def __call__(self, image: np.ndarray, key: str) -> np.ndarray:
        return image


def make_film(path: Path, width: int = 64, height: int = 48) -> Path:
    """A square that moves over a slope."""
    with av.open(str(path), "w") as film:
        track = film.add_stream("libx264", rate=25, options={"crf": "1"})
        track.width, track.height, track.pix_fmt = width, height, "yuv420p" if width % 2 == 0 else "yuv444p"
        track.codec_context.time_base = Fraction(1, 25)
        for number, time in enumerate(TIMES):
            image = np.zeros((height, width, 3), np.uint8)
            image[:, :, 1] = np.linspace(0, 255, width)
            image[10:20, 8 * number : 8 * number + 10] = 255, 0, 90
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(time * 25), Fraction(1, 25)
            film.mux(track.encode(frame))
        film.mux(track.encode())
    return path


def frames_of(path: Path) -> tuple[list[Fraction], np.ndarray]:
    """Times, and RGB (N, H, W, 3)."""
    with av.open(str(path)) as film:
        found = [(frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in film.decode(video=0)]  # type: ignore[operator]
    times, images = zip(*found, strict=True)
    return list(times), np.stack(images)


@pytest.mark.parametrize("ending", [".mp4", ".webm"])
@pytest.mark.parametrize("width", [64, 65])
def test_frames_go_in_and_come_out_at_their_times(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, width: int
) -> None:
    source, out = make_film(tmp_path / "in.mp4", width), tmp_path / f"out{ending}"
    assert translate(monkeypatch, run, source, out, "--style", 3) == 0
    (times, images), (given, sources) = frames_of(out), frames_of(source)
    assert (
        [round(float(time), 2) for time in times] == [float(time) for time in TIMES] == [float(time) for time in given]
    )
    translator = load_translator(run, seed=3)
    expected = np.stack([translator(image, "in.mp4") for image in sources])  # all in one style
    assert images.shape == expected.shape
    errors = np.abs(images.astype(int)[:, None] - expected[None]).mean(axis=(2, 3, 4))
    assert (errors.argmin(axis=1) == range(FRAMES)).all() and errors.diagonal().max() < 12  # the encoder's loss


@pytest.mark.parametrize("matrix", [1, 2, 6, 9])
def test_colours_are_stored_as_those_of_the_source_are(tmp_path: Path, matrix: int) -> None:
    """1: BT.709, as most films of high definition; 2: it says nothing; 6: BT.601; 9: BT.2020."""
    stored = (133, 83, 63)
    with av.open(str(tmp_path / "in.mp4"), "w") as film:
        track = film.add_stream("libx264", rate=25, options={"crf": "1"})
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        context = track.codec_context
        context.colorspace = context.color_primaries = context.color_trc = matrix
        frame = av.VideoFrame(64, 48, "yuv420p")
        for plane, value in zip(frame.planes, stored, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        film.mux(track.encode(frame))
        film.mux(track.encode())
    translate_film(cast(Translator, Unchanged()), tmp_path / "in.mp4", tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as film:
        frame = next(film.decode(video=0))
        assert film.streams.video[0].codec_context.colorspace == matrix
        assert np.abs(np.array([bytes(plane)[0] for plane in frame.planes]) - stored).max() <= 2


def test_what_is_no_film_and_what_cannot_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_film(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    text, small = tmp_path / "text.mp4", make_film(tmp_path / "small.mp4", 8, 8)
    text.write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{source}\n")  # a list of other files, for whoever takes it for one
    for film, made, words in (
        (text, out, "text.mp4 cannot be read or written as a film"),
        (small, out, "8x8 is too small"),
        (source, tmp_path / "out.png", "does not end as a film that can be written: give it one of the endings .mp4"),
        (source, tmp_path / "out.avi", "does not end as a film that can be written"),
        (source, source, "is the film that is to be translated: name another file"),
    ):
        assert words in refused(monkeypatch, capsys, tmp_path, run, film, made)
    monkeypatch.setitem(ENCODERS, ".mp4", "no-such-encoder")
    assert "this PyAV has no encoder no-such-encoder" in refused(monkeypatch, capsys, tmp_path, run, source, out)
    monkeypatch.setitem(sys.modules, "av", None)
    assert "films need PyAV, which is not installed here" in refused(monkeypatch, capsys, tmp_path, run, source, out)


def test_a_film_that_stops_in_the_middle_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_film(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    translator, calls = load_translator(run), list[str]()

    class Stopping:
        check_size = staticmethod(translator.check_size)

        def __call__(self, image: np.ndarray, key: str) -> np.ndarray:
            calls.append(key)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return translator(image, key)

    with pytest.raises(KeyboardInterrupt):
        translate_film(Stopping(), source, out)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"in.mp4"}
