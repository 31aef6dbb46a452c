import shlex
import shutil
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infra.errors import UserError
from launch.bench import BENCHMARKS, parser
from launch.benchmarks import ops, published, scaling, step
from launch.benchmarks.measuring import Figure
from launch.benchmarks.profiling import KINDS, time_shares
from launch.benchmarks.published import PublishedStep
from launch.benchmarks.step_report import COLUMNS, Combination, goals_of, table
from launch.benchmarks.steppers import Stepper
from launch.benchmarks.work import all_reduce_bytes, layers, parameters, step_flops
from launch.config import JobConfig, make_config
from trainer.draws import Draws
from trainer.engines import make_engine
from trainer.methods import Cut, CutConfig
from trainer.methods.base import StepContext
from trainer.methods.config import RobustConfig
from trainer.networks.config import ModelConfig
from trainer.step import train_step

SMALL = {
    "model.ngf": 8, "model.ndf": 8, "model.head_dim": 8, "method.patches": 16, "method.buffer": 0,
    "method.robust.start": 0.0, "engine.device": "cpu", "engine.kind": "single", "engine.precision": "fp32",
}  # fmt: skip


def config_of(**options: object) -> JobConfig:
    return make_config(SMALL, {name.replace("__", "."): value for name, value in options.items()})


def ours_and_published(config: JobConfig, pairs: int = 1, dtype: torch.dtype = torch.float32):
    """Both as functions of a step's number, on the same images and from the same weights."""
    source, target = torch.rand(2, pairs, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1
    batch = SimpleNamespace(source=source, target=target, slots=torch.arange(pairs))

    def cut() -> Cut:
        return Cut(config.method, config.model, seed=0, global_batch=pairs).to(dtype)

    engine, method = make_engine(config.engine), cut()
    engine.prepare(method, config.optim)
    baseline = PublishedStep(cut(), config.model, config.optim, engine.device)
    for network in (baseline.generator, baseline.discriminator):
        network.to(dtype)
    contexts = [StepContext(Draws(0, number), 0.5) for number in range(2)]
    return (
        lambda number: train_step(method, engine, [batch], contexts[number]),
        lambda number: baseline(batch, contexts[number]),
    )


def measured(command: str) -> list[Figure]:
    args = parser().parse_args(shlex.split(command))
    return BENCHMARKS[args.benchmark].run(args)


@pytest.fixture(scope="module")
def data():
    with step.scenes(None, "small") as root:
        yield root


# ---- the baseline, and the work of a step ---------------------------------------------------------------------------


def test_the_baseline_trains_as_we_do():
    config = config_of(method__robust__beta=1e-2)
    ours, baseline = ours_and_published(config, pairs=2, dtype=torch.float64)
    for number in range(2):  # the second step sees the first one's updates of all networks
        expected = {name: value.item() for name, value in baseline(number).items()}
        assert {name: value.item() for name, value in ours(number).items()} == pytest.approx(
            expected, rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize(
    ("options", "tera"), [({"beta": 0.0}, 1.24), ({"per_step": "one"}, 1.6), ({"per_step": "all"}, 3.2)]
)
def test_the_work_of_a_step_agrees_with_the_count_by_hand(options, tera):
    method = CutConfig(robust=RobustConfig(**options))
    assert step_flops(method, ModelConfig(), 256) / 1e12 == pytest.approx(tera, rel=0.05)


def test_the_work_of_the_generator_agrees_with_the_count_by_hand():
    found = layers(published.generator(64, 9), 256)
    assert sum(layer.macs for layer in found) / 1e9 == pytest.approx(64, rel=0.01)
    assert sum(layer.macs for layer in found if layer.at <= 16) / 1e9 == pytest.approx(34, rel=0.02)
    convolution = next(layer for layer in found if layer.shape == (256, 64, 64) and layer.macs)
    assert convolution.macs == 256 * 256 * 9 * 64 * 64
    assert convolution.moved == 3 * 256 * 66 * 66 + 3 * 256 * 64 * 64


@pytest.mark.parametrize("options", [{"method__robust__beta": 0.0}, {"method__robust__per_step": "one"}, {}])
def test_the_work_of_a_step_agrees_with_torchs_counter(options):
    config = config_of(**options)
    ours, _ = ours_and_published(config)
    with FlopCounterMode(display=False) as counter:
        ours(0)
    operators = counter.get_flop_counts()["Global"]
    convolutions = sum(flops for operator, flops in operators.items() if "conv" in str(operator))
    assert convolutions == pytest.approx(step_flops(config.method, config.model, 64), rel=0.02)
    assert counter.get_total_flops() == pytest.approx(convolutions, rel=0.02)  # nothing else is worth counting


def test_all_reduce_sends_every_parameter_almost_twice():
    counts = parameters(ModelConfig(), CutConfig())
    assert counts == {"generator": 11_378_179, "discriminator": 2_764_737, "heads": 560_384}
    assert all_reduce_bytes(100, 2) == 400
    assert all_reduce_bytes(100, 64) == pytest.approx(2 * 400, rel=0.02)


# ---- where the time goes --------------------------------------------------------------------------------------------


def test_a_step_is_shared_out_among_all_kinds_of_work():
    ours, _ = ours_and_published(config_of(method__robust__per_step="one"))
    ours(0)
    shares = time_shares(lambda: ours(1), torch.device("cpu"))
    assert tuple(shares) == KINDS and sum(shares.values()) == pytest.approx(1)
    assert all(share > 0.001 for share in shares.values())


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (torch.nn.Conv2d(8, 8, 3), "convolution"), (torch.nn.ReflectionPad2d(1), "padding"),
        (torch.nn.InstanceNorm2d(8), "norm"), (torch.nn.ReLU(), "norm"),
        (published.Blur(8), "resampling"), (published.Upsample(8), "resampling"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_forward_and_backward_of_an_operator_are_of_its_kind(module, kind):
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    shares = time_shares(lambda: module(x).sum().backward(), torch.device("cpu"))
    found = {name for name, share in shares.items() if share > 0}
    assert found - {"other", *(["padding"] if kind == "resampling" else [])} == {kind}


def test_the_lengths_of_vectors_are_no_norm():
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    assert time_shares(lambda: x.norm(dim=1).sum().backward(), torch.device("cpu"))["norm"] == 0


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_step_measures_ours_beside_the_published_step(data):
    options = "--device cpu --size small --precision fp32 --layout contiguous --taps one --repetitions 1"
    figures = measured(f"step {options} --data {data} --set data.decoder=pillow")
    by_name = {figure.name: figure for figure in figures}
    rows = ["fp32/contiguous/eager/b1/one", "published/one"]
    assert list(dict.fromkeys(name.rpartition("/")[0] for name in by_name)) == rows
    seconds = [by_name[f"{row}/seconds"].values for row in rows]
    ratio = by_name[f"{rows[0]}/to_published"].values
    assert ratio == pytest.approx([slow / fast for fast, slow in zip(*seconds, strict=True)])
    assert set(by_name["published/one/to_published"].values) == {1.0}
    assert 0 < by_name[f"{rows[0]}/matmul_share"].median < 1
    assert 0.1 < by_name[f"{rows[0]}/peak"].median < 4
    documented = step.__doc__
    assert documented and all(name.rpartition("/")[2].split("_")[0] in documented for name in by_name)
    assert [line.split()[0] for line in table(figures).splitlines()[1:]] == rows


@pytest.mark.gpu
def test_step_runs_on_a_gpu(data):
    options = "--device cuda --size small --precision bf16 --compile eager --batch 2 --taps one --steps 2"
    figures = measured(f"step {options} --data {data}")
    by_name = {figure.name: figure for figure in figures}
    assert by_name["bf16/channels_last/eager/b2/one/share_convolution"].median > 0
    assert by_name["bf16/channels_last/eager/b2/one/peak"].median > 0


def test_a_process_that_ends_early_is_named(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with Stepper("odd one", "ours", {}) as stepper, pytest.raises(UserError, match="'odd one' ended early"):
        stepper.ask(do="steps", first=0, count=1)


def test_an_option_without_a_value_is_refused():
    with pytest.raises(UserError, match="--set model.blocks gives no value"):
        measured("step --set model.blocks")


def test_goals_speak_of_the_best_of_ours():
    ratios = {"published/all": 1.0, "fp32/contiguous/eager/b1/all": 1.1, "fp32/channels_last/eager/b1/all": 1.3}
    figures = [Figure(f"{row}/{name}", row, "", (value,)) for row, value in ratios.items() for name in COLUMNS]
    (goal,) = goals_of(figures, "cpu")
    assert goal.name == "best/fp32" and goal.median == 1.3 and goal.to_json()["met"]
    assert "fp32/channels_last/eager/b1/all" in table([*figures, goal]).splitlines()[-1]


def test_warm_up_meets_every_tap_twice():
    config = config_of()
    compiled = Combination("ours", "fp32", "contiguous", "compile", 1, "one")
    count = step._warm_up(compiled, config, "cpu")
    drawn = [Draws(0, number).choice("robust", 5) for number in range(count)]
    assert min(drawn.count(tap) for tap in range(5)) == 2
    assert step._warm_up(Combination.published("all"), config, "cpu") == 1


def test_ops_compares_stock_with_ours(monkeypatch):
    monkeypatch.setattr(ops, "AT_LEAST_S", 0)
    figures = measured("ops --device cpu --size small --precision fp32 --layout channels_last --repetitions 1")
    names = {figure.name for figure in figures}
    assert {"matmul/fp32", "copy", "conv 3x3 of the blocks/fp32/channels_last/stock"} <= names
    assert "norm and ReLU, first/fp32/channels_last/to_stock" in names and "Adam/fp32/contiguous/to_stock" in names
    shown = ops.table(figures)
    assert "stock / ours" in shown and "GB/s" in shown


@dataclass
class FakeRanks:
    """Trainings whose every repetition takes so many seconds."""

    seconds: float
    processes: tuple[int, ...]
    told: int = 0

    def tell(self, **request):
        self.told += 1

    def hear(self):
        assert self.told == 1
        return {"seconds": self.seconds}


def test_scaling_counts_the_pairs_of_all_ranks():
    args = parser().parse_args(["scaling", "--batch", "4", "--steps", "3"])
    trainings = scaling.Trainings(args, "cpu", "", None)
    assert trainings.rate("apart", [FakeRanks(2.0, (0,)), FakeRanks(4.0, (1,))]) == {"apart": 12 / 2 + 12 / 4}
    assert trainings.rate("together", [FakeRanks(3.0, (0, 1))]) == {"together": 24 / 3}
    figures = scaling.figures_of(2, {"alone": [1.0], "apart": [1.6], "together": [1.5]})
    assert {figure.name: figure.median for figure in figures} == pytest.approx(
        {"2/alone": 1.0, "2/apart": 1.6, "2/together": 1.5, "2/speed_up": 1.5, "2/shared_machine": 0.8,
         "2/communication": 1.5 / 1.6}
    )  # fmt: skip
    assert [figure.to_json()["met"] for figure in figures if figure.target] == [False]


def test_scaling_needs_a_core_for_each_rank():
    with pytest.raises(UserError, match="give --ranks"):
        measured("scaling --device cpu --ranks 1000")
