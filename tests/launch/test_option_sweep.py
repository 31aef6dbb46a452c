"""Options drawn at random from the configuration trees: each command line trains, or ends with one sentence.

The trees say what there is to draw: names, types, choices, defaults. Each line changes a few options of a training that
takes a fraction of a second, to a value near the default, to one at an edge, or to one of the wrong kind.
"""

import argparse
import dataclasses
import random
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from infra.config import flatten, leaves
from infra.errors import DIVERGED, OUTAGE, Stopped, UserError
from infra.storage import LocalStorage
from launch import evaluate as evaluate_script
from launch import prepare as prepare_script
from launch.runs import config, segmenter, translator
from pipelines.manifest import MANIFEST
from tests.pipelines.shardmaker import write_root, write_split

pytestmark = pytest.mark.slow

# Left out: what takes minutes, or starts something that a process can start only once.
LEFT_OUT: dict[str, set[Any]] = {"engine.compile": {"true"}, "engine.kind": {"deepspeed"}, "loop.max_steps": {None}}
# Sizes: large ones would work, but not in a moment.
SMALL = {
    "method.generator.ngf", "method.discriminator.ndf", "method.discriminator.layers", "method.head_dim", "model.width",
    "optim.global_batch", "optim.accumulation", "data.threads", "loop.max_steps",
}  # fmt: skip
TEXTS = (
    "",
    "none",
    "nowhere",
    "file",
    "file/below",
    "gs://bucket",
    "s3://",
    "s3:///x",
    "/proc/x",
    "ä b%s{}",
)
JUNK = ("x", "nan", "-inf", "1,x", "[1]", "--", "1e400", "0x10")
FLOATS = (-1.0, 0.0, 1e-12, 0.25, 0.999, 1.0, 1e9)
INTEGERS = (-1, 0, 1, 2, 3, 1000)
LISTS = ("", "0", "4,8", "8,4,16", "4,4", "-1", "0,99", "0,4,8,12,13,14,15,16,20")


def values(draw: random.Random, name: str, kind: Any, field: dataclasses.Field, default: Any) -> str:
    """One text for an option, of any of the three sorts."""
    if draw.random() < 0.08:
        return draw.choice(JUNK)
    choices = field.metadata["choices"]
    if choices:
        return str(draw.choice([c for c in choices if c not in LEFT_OUT.get(name, ())]))
    if typing.get_origin(kind) is types.UnionType:
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
        if draw.random() < 0.25 and None not in LEFT_OUT.get(name, ()):
            return "none"
    if kind is bool:
        return str(draw.choice([v for v in (True, False) if v not in LEFT_OUT.get(name, ())])).lower()
    if typing.get_origin(kind) is tuple:
        return draw.choice(LISTS)
    if kind is str:
        return draw.choice(TEXTS)
    near = [default, default * 2, default / 2 if kind is float else default + 1] if default else [kind(1), kind(3)]
    if name in SMALL:
        near = [kind(1), kind(2), kind(4)] if kind is int else [0.1, 0.25, 0.5]
    edges = FLOATS if kind is float else INTEGERS
    value = draw.choice(near) if draw.random() < 0.6 else draw.choice(edges)
    return str(min(value, kind(4)) if name in SMALL else value)


@dataclasses.dataclass(frozen=True)
class Script:
    """parse, train: of one of the training scripts. base: a line that trains in a moment; its --run-dir comes last."""

    parse: Callable[[list[str]], Any]
    train: Callable[[Any], Path]
    tree: type
    base: list[str]

    def line(self, draw: random.Random, run_dir: str) -> list[str]:
        """A command line; later options win over earlier ones."""
        defaults = flatten(self.parse(self.base))
        options = [leaf for leaf in leaves(self.tree) if leaf[0] != "run_dir"]
        line = [*self.base, "--run-dir", run_dir]
        for name, field, kind in draw.sample(options, draw.randint(1, 4)):
            flag = field.metadata["flag"] or f"--{name.replace('_', '-')}"
            line += [f"{flag}={values(draw, name, kind, field, defaults[name])}"]
        if draw.random() < 0.05:
            line += ["--run-dir", draw.choice(TEXTS)]
        return line


TINY = [
    "--engine.device", "cpu", "--precision", "fp32", "--max-steps", "1", "--data.decoder", "pillow", "--data.threads", "1",
    "--loop.samples", "1",
]  # fmt: skip
TRANSLATOR = Script(
    config.parse_arguments, translator.train, config.JobConfig,
    [*TINY, "--data", "data/gta2city", "--crop", "16", "--ngf", "4", "--ndf", "4", "--method.generator.blocks", "6",
     "--method.discriminator.layers", "1", "--method.head-dim", "8", "--method.patches", "8", "--method.robust.start", "0"],
)  # fmt: skip
SEGMENTER = Script(
    segmenter.parse_arguments, segmenter.train, segmenter.SegmenterConfig,
    [*TINY, "--data", "data/gta2city", "--model.width", "0.1", "--global-batch", "2", "--crop", "16"],
)  # fmt: skip


@pytest.fixture
def workplace(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paired and labelled images of 32x16 where they are looked for; no MLflow, and no models for it, which take seconds each."""
    storage = LocalStorage(place / "data/gta2city")
    manifest = write_root(storage, (3, 2), (4,), (32, 16))
    tests = {f"test/{domain}": write_split(storage, f"test/{domain}", [2], (32, 16)) for domain in ("source", "target")}
    manifest = dataclasses.replace(manifest, splits=manifest.splits | tests, paired=True)
    storage.write(MANIFEST, manifest.to_json().encode())
    (place / "file").write_text("text")
    monkeypatch.setattr("launch.runs.training.Follower", lambda folder: SimpleNamespace(finish=lambda: None))
    for module in (translator, segmenter):
        monkeypatch.setattr(module, "save_pyfunc_model", lambda *_: None)
    return place


def outcome(script: Script, line: list[str]) -> str:
    """trained, refused, diverged, or away: a mirror that cannot be written. Anything but the documented exceptions is raised."""
    try:
        script.train(script.parse(line))
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip(), str(error)
        return "refused"
    except Stopped as stop:
        return {DIVERGED: "diverged", OUTAGE: "away"}[stop.exit_code]
    return "trained"


def sweep(script: Script, count: int, seed: int) -> Counter[str]:
    """How many of so many lines ended how. Fails with every line that ended otherwise, to be repeated."""
    draw, ends, faults = random.Random(seed), Counter[str](), []
    for number in range(count):
        line = script.line(draw, f"runs/{number}")
        try:
            end = outcome(script, line)
            assert end != "refused" or not Path(f"runs/{number}").exists(), "refused with something written"
        except Exception as fault:  # a traceback, for a user
            faults.append(f"{' '.join(line[len(script.base) :])}\n    {type(fault).__name__}: {fault}")
            continue
        ends[end] += 1
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults)
    return ends


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("workplace")
def test_any_options_of_a_translator_train_or_are_refused_with_a_sentence() -> None:
    ends = sweep(TRANSLATOR, 210, seed=0)
    assert ends["trained"] >= 50 and ends["refused"] >= 50, ends


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("workplace")
def test_any_options_of_a_segmenter_train_or_are_refused_with_a_sentence() -> None:
    ends = sweep(SEGMENTER, 90, seed=0)
    assert ends["trained"] >= 20 and ends["refused"] >= 20, ends


# ---- the scripts that take no configuration ---------------------------------------------------------------------------


def exit_code(script: Any, line: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a script with this command line. Tracebacks are raised."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *line])
    try:
        script.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


def arguments(draw: random.Random, parser: argparse.ArgumentParser, ordinary: dict[str, str]) -> list[str]:
    """A few of a parser's options with values of any sort. ordinary: values that suit some of them."""
    line = []
    options = [action for action in parser._actions if action.option_strings and action.dest not in ("help", "out")]
    for action in draw.sample(options, draw.randint(1, 3)):
        line.append(action.option_strings[-1])
        if action.nargs != 0:
            edges = INTEGERS if action.type is int else FLOATS if action.type is float else action.choices or TEXTS
            value = (
                draw.choice([*edges, *JUNK])
                if draw.random() < 0.5
                else ordinary.get(action.dest, action.default or "1")
            )
            line += [str(value)] * (action.nargs if isinstance(action.nargs, int) else 1)
    return line


@pytest.mark.filterwarnings("ignore")
def test_any_arguments_of_a_preparation_work_or_exit_with_2(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = prepare_script.parser()._actions
    (commands,) = (action.choices for action in actions if isinstance(action, argparse._SubParsersAction))
    for side in ("A", "B"):
        picture(workplace / "photos" / f"train{side}" / "1.png")
    picture(workplace / "pairs" / "train" / "1.png")
    base = {
        "street-scenes": ["--count", "1", "--test-count", "1"],
        "folders": ["photos"], "paired": ["pairs"], "cityscapes": ["photos"], "gta5": ["photos"],
    }  # fmt: skip
    draw, codes = random.Random(0), Counter[int]()
    for number in range(40):
        command = draw.choice(list(base))
        line = [command, *base[command], "--size", "32x32", "--workers", "1", "--out", f"made/{number}"]
        line += arguments(draw, commands[command], {"size": "40x32", "count": "2", "source_layout": "street_trees=0.5"})
        if "1000" not in line and "1000000000.0" not in line:  # scenes by the thousand take their time
            codes[exit_code(prepare_script, line, monkeypatch)] += 1
    assert codes.keys() == {0, 2} and min(codes.values()) >= 5, codes
    assert "Traceback" not in capsys.readouterr().err


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True)
    Image.new("RGB", (40, 32), "green").save(path)


@pytest.mark.filterwarnings("ignore")
def test_any_arguments_of_an_evaluation_work_or_exit_with_2(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(TRANSLATOR, [*TRANSLATOR.base, "--run-dir", "run"]) == "trained"
    ordinary = {"json": "a.json", "data": "data/gta2city", "segmenter": "judge"}
    draw, codes = random.Random(0), Counter[int]()
    for _ in range(100):
        run = draw.choice(
            ["run", "run/checkpoints/step_1"] if draw.random() < 0.7 else ["run/checkpoints", "data", *TEXTS]
        )
        line = [run, *arguments(draw, evaluate_script.parser(), ordinary)]
        codes[exit_code(evaluate_script, line, monkeypatch)] += 1
    assert codes.keys() == {0, 2} and min(codes.values()) >= 5, codes
    assert "Traceback" not in capsys.readouterr().err
