"""Translating an image file, and a folder of them with all its folders: the same names, the same sizes."""

import dataclasses
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from infra.console import ProgressLine
from infra.errors import UserError
from infra.images import LARGEST, Picture, format_of, picture_file
from infra.json_lines import read_json
from infra.storage import LocalStorage, replacing
from pipelines.images import find_images, picture_of, stored_size
from pipelines.ranks import Ranks, on_first
from pipelines.stream import stream
from trainer.translator import Translator

log = logging.getLogger(__name__)

QUALITY = 95
ENDINGS = {"jpg": "JPEG", "png": "PNG", "tiff": "TIFF", "webp": "WEBP"}
CLAIM = "translation.json"  # in a folder of translations: what made them
INPUT = "input"  # in it: the folder of their sources
TOGETHER = 16  # images at most that are translated at once
AHEAD = 4  # batches that are decoded before their turn, and that wait to be encoded
PIXELS = 2**20  # of all of these, unless it is one image

Names = tuple[str, ...]
Pictures = Mapping[str, Picture]


@dataclass(frozen=True)
class Form:
    """How translations are stored. ending: a key of ENDINGS, None for the format of each input; quality: of JPEG and WebP,
    1 to 100, None for QUALITY. skip: images that cannot be translated are left out, with a warning, and are no UserError."""

    ending: str | None = None
    quality: int | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"the quality {self.quality} is impossible: give 1 to 100")

    def name(self, name: str) -> str:
        """Of the translation of a file of this name."""
        return name if self.ending is None else f"{name.rpartition('.')[0]}.{self.ending}"

    def format(self, own: str) -> str:
        """Of the translation of a file of this format."""
        return own if self.ending is None else ENDINGS[self.ending]

    def file(self, picture: Picture) -> bytes:
        format = self.format(picture.format)
        height, width = picture.colours.shape[:2]
        check_sides(width, height, format)
        return picture_file(dataclasses.replace(picture, format=format), self.quality or QUALITY)


def translate_image(translator: Translator, source: Path, out: Path, form: Form) -> None:
    """Write the translation of an image file, in the format that the ending of its name tells, or without one in that of the
    input. UserError, before anything is done, for a place or an ending that it cannot have."""
    if out.is_dir():
        raise UserError(
            f"{source} is an image and {out} a folder: name a file, such as {out / 'translated'}{source.suffix}"
        )
    if out.exists() and out.samefile(source):
        raise UserError(f"{out} is the image that is to be translated: name another file")
    told = format_of(out)
    if out.suffix and told is None:
        raise UserError(
            f"{out} does not end as an image that can be written: give it an ending such as .png or .jpg, or none"
        )
    if told and form.ending and told != ENDINGS[form.ending]:
        raise UserError(f"{out} does not end as --format {form.ending}: name it otherwise, or leave out --format")
    with _named(source):
        check_sides(*stored_size(source), told or form.format(format_of(source) or "JPEG"))
    picture = picture_of(source)
    _tell_of_frames(source, picture)
    with _named(source):
        colours = translator(picture.colours, source.name)
    _write(out, form.file(dataclasses.replace(picture, colours=colours, format=told or picture.format)))


class Folder:
    """The images of a folder on their way into another; the ranks share them.

    A translation gets its source's time of change, and one that has it is left as it is. UserError, before anything is written,
    for folders that lie in each other, for images that cannot be translated, and for an output with other content.
    """

    def __init__(self, translator: Translator, source: Path, out: Path, form: Form, ranks: Ranks) -> None:
        self.translator, self.source, self.out, self.form, self.ranks = translator, source, out, form, ranks
        check_apart(source, out)
        names = [path.relative_to(source).as_posix() for path in find_images(source)]
        made, count = Counter(map(form.name, names)).most_common(1)[0]
        if count > 1:
            same = " and ".join(name for name in names if form.name(name) == made)
            raise UserError(f"{same} of {source} would both become {made}: leave out --format, or rename one")
        self._left_out, self._batches = set[str](), list[Names]()
        self._batches = list(_batches(self._sizes(names)))

    def translate(self) -> int:
        """Do this rank's share; how many images all ranks left out."""
        made_by = {**self.translator.identity, "format": self.form.ending, "quality": self.form.quality or QUALITY}
        on_first(self.ranks, lambda: _claim(self.out, self.source, made_by))
        mine = self._batches[self.ranks.rank :: self.ranks.world_size]
        todo = [names for names in mine if not all(map(self._is_made, names))]
        total = sum(map(len, todo))
        with ProgressLine(total, unit="images", title="image", enabled=self.ranks.rank == 0) as line:
            for names, _ in stream(todo, self._read, self._make, self._write, ahead=AHEAD):
                line.update(len(names))
        everywhere = self.ranks.gather(self._left_out) or []
        return len(set().union(*everywhere))

    def _sizes(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """By the headers."""
        sizes = {}
        for name in names:
            with self._or_left_out(name):
                size = stored_size(self.source / name)
                with _named(self.source / name):
                    self.translator.check_size(*size)
                    check_sides(*size, self.form.format(format_of(name) or "JPEG"))
                sizes[name] = size
        return sizes

    @contextmanager
    def _or_left_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if not self.form.skip:
                raise
            self._left_out.add(name)
            if self.ranks.rank == 0 or self._batches:  # all ranks look at all headers, and each at its own pixels
                log.warning("left out: %s", error)

    def _is_made(self, name: str) -> bool:
        made = self.out / self.form.name(name)
        return made.is_file() and made.stat().st_mtime_ns == (self.source / name).stat().st_mtime_ns

    def _read(self, names: Names) -> Pictures:
        found = {}
        for name in names:
            with self._or_left_out(name):
                found[name] = picture_of(self.source / name)
        return found

    def _make(self, _: Names, pictures: Pictures) -> Pictures:
        """Those of one size and type together."""
        alike = defaultdict[object, list[str]](list)
        for name, picture in pictures.items():
            alike[picture.colours.shape, picture.colours.dtype].append(name)
        made = dict(pictures)
        for names in alike.values():
            images = self.translator.each([pictures[name].colours for name in names], names)
            for name, colours in zip(names, images, strict=True):
                made[name] = dataclasses.replace(pictures[name], colours=colours)
        return made

    def _write(self, _: Names, made: Pictures) -> None:
        for name, picture in made.items():
            _tell_of_frames(self.source / name, picture)
            if self._is_made(name):
                continue
            file = None
            with self._or_left_out(name), _named(self.source / name):
                file = self.form.file(picture)
            if file is not None:
                _write(self.out / self.form.name(name), file, (self.source / name).stat().st_mtime_ns)


def _batches(sizes: Mapping[str, tuple[int, int]]) -> Iterator[Names]:
    """Names of files that are translated together, by the files' sizes."""
    of_size = defaultdict[tuple[int, int], list[str]](list)
    for name, size in sizes.items():
        of_size[size].append(name)
    for (width, height), names in of_size.items():
        count = min(TOGETHER, max(1, PIXELS // (width * height)))
        yield from (tuple(names[first : first + count]) for first in range(0, len(names), count))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What a translator says of an image says which one it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_sides(width: int, height: int, format: str) -> None:
    """UserError for an image that this format, one of FORMATS, cannot hold."""
    if max(width, height) > LARGEST.get(format, max(width, height)):
        raise UserError(f"{format} holds no image of {width}x{height}, since its sides end at {LARGEST[format]}: write another "
                        "format, such as PNG")  # fmt: skip


def _tell_of_frames(path: Path, picture: Picture) -> None:
    if picture.animated:
        log.warning("%s is an animation: its first frame is translated", path)


def _write(path: Path, data: bytes, changed: int | None = None) -> None:
    """changed: the time that the file is to bear, in nanoseconds."""
    with replacing(path) as file:
        file.write(data)
        if changed is not None:
            file.flush()
            with suppress(OSError):  # a file system that does not have it: the same command makes all anew
                os.utime(file.fileno(), ns=(changed, changed))


def check_apart(source: Path, out: Path) -> None:
    """UserError for an output that is the input, or lies in it."""
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out} lies in {source}, where its images would be translated again: name another OUTPUT")


def _claim(out: Path, source: Path, made_by: Mapping[str, object]) -> None:
    """Write down what makes the translations of a folder, and of which one. UserError if it holds others, or other files. A
    source that is gone may be this one, moved."""
    LocalStorage(out).sweep()
    there = read_json(out / CLAIM, dict)
    before = (there or {}).pop(INPUT, None)
    if before and Path(before).is_dir() and not source.samefile(before):
        raise UserError(f"{out} holds the translations of {before}: name another OUTPUT, or delete it first")
    if not there and out.exists():
        if not out.is_dir():
            raise UserError(f"{out} is a file: name a folder for the translations of a folder")
        if other := next(out.iterdir(), None):
            raise UserError(f"{out} holds other files ({other.name}): name another OUTPUT, or empty it")
    for name in sorted(there and there | made_by):
        if there.get(name) != made_by.get(name):
            raise UserError(f"{out} holds translations with {name} = {there.get(name)}, not {made_by.get(name)}: "
                            "name another OUTPUT, or delete it first")  # fmt: skip
    if not there or before != str(source.resolve()):
        claim = {**made_by, INPUT: str(source.resolve())}
        _write(out / CLAIM, (json.dumps(claim, indent=1) + "\n").encode())
