"""What a training says of itself when it starts, and that its method gets the images that it wants."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.json_lines import JsonLines
from infra.storage import LocalStorage
from infra.views import Tiles, View
from launch.runs import training, translator
from launch.runs.config import make_config
from launch.runs.training import losses_not_reached
from tests.pipelines.shardmaker import write_root
from trainer.methods import METHODS, CutConfig, Family
from trainer.optim import OptimConfig
from trainer.schedule import Schedule

TINY = {"method.generator.ngf": 2, "method.generator.blocks": 6, "method.discriminator.ndf": 2, "method.head_dim": 2}


def said(steps: int, *layers: dict[str, Any]) -> list[str]:
    """Of a run of 100 images, 10 epochs and so many steps."""
    trainer: Any = SimpleNamespace(
        method=make_config(TINY, *layers).method.build(seed=0, global_batch=1),
        schedule=Schedule(OptimConfig(epochs=5, decay_epochs=5), 100),
        total_steps=steps,
    )
    return losses_not_reached(trainer)


def test_a_run_that_ends_before_its_loss_begins_says_so() -> None:
    (words,) = said(250)
    assert words.startswith(
        "this run ends after step 250, before the loss of method.robust.start = 0.25 begins (step 251)"
    )
    assert not said(251)


@pytest.mark.parametrize(
    "options",
    [{"method.name": "cut"}, {"method.robust.beta": 0.0}, {"method.robust.start": 0.0}, {"method.name": "fastcut"}],
)
def test_a_run_without_such_a_loss_or_with_it_from_the_start_says_nothing(options: dict[str, Any]) -> None:
    assert not said(1, options)


def test_a_run_that_ends_before_g_is_updated_says_so() -> None:
    untrained, loss = said(250, {"method.name": "srunit-released"})
    assert untrained == (
        "this run ends after step 250, before the update of the generator begins (step 251), so it leaves it untrained: "
        "give an earlier start, or more steps"
    )
    assert "the loss of method.robust.start" in loss
    assert said(250, {"method.robust.rest": True, "method.robust.beta": 0.0}) == [untrained]
    assert not said(251, {"method.name": "srunit-released"})


def test_the_losses_that_srunit_is_compared_with_begin_late_too() -> None:
    (words,) = said(10, {"method.robust.beta": 0.0, "method.constraint.smoothness": 1.0})
    assert "before the loss of method.constraint.start = 0.25 begins (step 251)" in words


@dataclass(frozen=True, kw_only=True)
class TiledConfig(CutConfig):
    """CUT on tiles of one image, four of them an epoch."""

    @property
    def view(self) -> View:
        return Tiles(zoom=0.5, epoch=4)


def test_a_run_has_the_view_of_its_method(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_root(LocalStorage(place / "data"), source=(1,), target=(1,))
    monkeypatch.setitem(METHODS, "tiled", Family(TiledConfig))
    monkeypatch.setattr(training, "Follower", lambda folder: SimpleNamespace(finish=lambda: None))
    monkeypatch.setattr(translator, "save_pyfunc_model", lambda folder, *_: folder.mkdir())
    run = {
        "method.name": "tiled", "method.patches": 4, "data.root": "data", "data.crop": 32, "data.decoder": "pillow",
        "run_dir": "run", "optim.global_batch": 2, "optim.epochs": 1.0, "optim.decay_epochs": 1.0, "loop.samples": 1,
        "engine.device": "cpu", "engine.precision": "fp32",
    }  # fmt: skip
    translator.train(make_config(TINY, run))
    assert [row["epoch"] for row in JsonLines(place / "run" / "metrics.jsonl").read()] == [1, 1, 2, 2]


def test_what_a_run_compiles_is_kept_beside_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(Exception):
        pass

    def end(*_: Any, **__: Any) -> None:
        raise Ready

    kept: list[Path] = []
    write_root(LocalStorage(place / "data"), source=(1,), target=(1,))
    monkeypatch.setattr(training, "keep_compiled", kept.append)
    monkeypatch.setattr(training, "Trainer", end)
    run = {
        "data.root": "data", "data.crop": 32, "data.decoder": "pillow", "run_dir": "runs/one", "engine.device": "cpu",
        "engine.precision": "fp32", "engine.compile": "true",
    }  # fmt: skip
    with pytest.raises(Ready):
        translator.train(make_config(TINY, run))
    assert [folder.resolve() for folder in kept] == [place / "runs"]
