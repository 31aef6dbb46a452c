"""The baseline of speed does the same work as the step of ours."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infra.storage import LocalStorage
from launch.runs.config import make_config
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.trainer.published_step import PublishedStep, compare
from trainer.draws import Draws
from trainer.engines import make_engine
from trainer.methods import Srunit, SrunitConfig
from trainer.methods.base import StepContext
from trainer.step import NORM, train_step

pytestmark = pytest.mark.slow

SMALL = {
    "method.generator.ngf": 8, "method.discriminator.ndf": 8, "method.head_dim": 8, "method.patches": 16, "method.buffer": 0,
    "method.robust.start": 0.0, "engine.device": "cpu", "engine.kind": "single", "engine.precision": "fp32",
}  # fmt: skip


def test_the_baseline_trains_as_we_do() -> None:
    config, pairs = make_config(SMALL, {"method.robust.beta": 1e-2}), 2
    source, target = torch.rand(2, pairs, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    batch = SimpleNamespace(source=source, target=target, slots=torch.arange(pairs))

    options = config.method
    assert isinstance(options, SrunitConfig)

    def srunit() -> Srunit:
        return options.build(seed=0, global_batch=pairs).double()

    engine, method = make_engine(config.engine), srunit()
    engine.prepare(method, config.optim)
    baseline = PublishedStep(srunit(), config.optim, engine.device)
    for network in (baseline.generator, baseline.discriminator):
        network.double()
    for number in range(2):  # the second step sees the first one's updates of all networks
        context = StepContext(Draws(0, number), 0.5)
        expected = {name: value.item() for name, value in baseline(batch, context).items()}
        ours = train_step(method, engine, [batch], context)
        losses = {name: value.item() for name, value in ours.items() if not name.startswith((NORM, "acc/"))}
        assert losses == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_both_are_timed_in_turn(tmp_path: Path) -> None:
    prepare(street_scenes(4, test_count=0), LocalStorage(tmp_path), Encoding((128, 64)), progress=False)
    config = make_config(SMALL, {"data.root": str(tmp_path), "data.crop": 64, "data.decoder": "pillow"})
    published, ours, gain = compare(config, repetitions=2)
    assert (published.name, ours.name) == ("published", "ours") and min(*published.values, *ours.values) > 0
    assert gain.values == pytest.approx([a / b for a, b in zip(published.values, ours.values, strict=True)])
