import json
import shlex
from types import SimpleNamespace

import pytest
import torch

from infra.errors import UserError
from launch.bench import BENCHMARKS, parser
from launch.benchmarks import ops, published, scaling, step
from launch.benchmarks.measuring import Figure
from launch.benchmarks.profiling import KINDS, time_shares
from launch.benchmarks.published import PublishedStep
from launch.benchmarks.step import COLUMNS, goals_of, table
from launch.benchmarks.stepping import Stepper
from launch.benchmarks.work import all_reduce_bytes, flops_of, parameters, step_flops
from launch.runs.config import JobConfig, make_config
from trainer.draws import Draws
from trainer.engines import make_engine
from trainer.methods import Srunit, SrunitConfig
from trainer.methods.base import StepContext
from trainer.step import train_step

SMALL = {
    "method.generator.ngf": 8, "method.discriminator.ndf": 8, "method.head_dim": 8, "method.patches": 16, "method.buffer": 0,
    "method.robust.start": 0.0, "engine.device": "cpu", "engine.kind": "single", "engine.precision": "fp32",
}  # fmt: skip


def config_of(**options: object) -> JobConfig:
    return make_config(SMALL, {name.replace("__", "."): value for name, value in options.items()})


def ours_and_published(config: JobConfig, pairs: int = 1, dtype: torch.dtype = torch.float32):
    """Both as functions of a step's number, on the same images and from the same weights."""
    source, target = torch.rand(2, pairs, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1
    batch = SimpleNamespace(source=source, target=target, slots=torch.arange(pairs))

    def srunit() -> Srunit:
        return config.method.build(seed=0, global_batch=pairs).to(dtype)

    engine, method = make_engine(config.engine), srunit()
    engine.prepare(method, config.optim)
    baseline = PublishedStep(srunit(), config.optim, engine.device)
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
    """At 256x256 and full width, of which a quarter is counted: convolutions grow with the area and with both widths."""
    small = {f"method__robust__{name}": value for name, value in options.items()}
    sizes = {"method__generator__ngf": 16, "method__discriminator__ndf": 16, "data__crop": 64}
    counted = step_flops(config_of(**small, **sizes, method__taps=(0, 4, 8, 12, 16)))
    assert counted * (256 / 64) ** 2 * (64 / 16) ** 2 / 1e12 == pytest.approx(tera, rel=0.15)


def test_a_product_has_two_flops_for_each_multiplication():
    one, other = torch.rand(3, 4), torch.rand(4, 5)
    assert flops_of(lambda: one @ other) == 2 * 3 * 4 * 5


def test_all_reduce_sends_every_parameter_almost_twice():
    counts = parameters(SrunitConfig(name="srunit").build(seed=0, global_batch=1))
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


def test_a_process_that_ends_early_is_named(capfd):
    ends_early = pytest.raises(UserError, match="'odd one' ended early")
    with Stepper("odd one", "ours", {"method.name": "srunit"}) as stepper, ends_early:
        stepper.ask("steps", first=0, count=1)
    assert "None" in capfd.readouterr().err  # no data root


def test_an_option_without_a_value_is_refused():
    with pytest.raises(UserError, match="--set method.generator.blocks gives no value"):
        measured("step --set method.generator.blocks")


def test_goals_speak_of_the_best_of_ours():
    ratios = {"published/all": 1.0, "fp32/contiguous/eager/b1/all": 1.1, "fp32/channels_last/eager/b1/all": 1.3}
    figures = [Figure(f"{row}/{name}", row, "", (value,)) for row, value in ratios.items() for name in COLUMNS]
    (goal,) = goals_of(figures, "cpu")
    assert goal.name == "best/fp32" and goal.median == 1.3 and goal.to_json()["met"]
    assert "fp32/channels_last/eager/b1/all" in table([*figures, goal]).splitlines()[-1]


def test_warm_up_meets_every_tap_twice():
    drawn = [int(Draws(0, number).stream("robust", "choice").integers(5)) for number in range(step.WARM_UP["compile"])]
    assert min(drawn.count(tap) for tap in range(5)) >= 2


def test_ops_compares_stock_with_ours(monkeypatch):
    monkeypatch.setattr(ops, "AT_LEAST_S", 0)
    figures = measured("ops --device cpu --size small --precision fp32 --layout channels_last --repetitions 1")
    names = {figure.name for figure in figures}
    assert {"matmul/fp32", "copy", "conv 3x3 of the blocks/fp32/channels_last/stock"} <= names
    assert "norm and ReLU, first/fp32/channels_last/to_stock" in names and "Adam/fp32/contiguous/to_stock" in names
    shown = ops.table(figures)
    assert "stock / ours" in shown and "GB/s" in shown


def test_scaling_counts_the_pairs_of_all_ranks(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"pairs_per_s": rate} for rate in (1.0, 1.0, 1.0, 5.0, 7.0, 9.0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scaling.rate_of(file) == 7.0  # the first steps do not count
    figures = scaling.figures_of(2, {"alone": [1.0], "apart": [1.6], "together": [1.5]})
    assert {figure.name: figure.median for figure in figures} == pytest.approx(
        {"2/alone": 1.0, "2/apart": 1.6, "2/together": 1.5, "2/speed_up": 1.5, "2/shared_machine": 0.8,
         "2/communication": 1.5 / 1.6}
    )  # fmt: skip
    assert [figure.to_json()["met"] for figure in figures if figure.target] == [False]


def test_scaling_trains_alone_apart_and_together(data):
    options = "--device cpu --size small --precision fp32 --repetitions 1 --set data.decoder=pillow"
    figures = {figure.name: figure.median for figure in measured(f"scaling {options} --data {data}")}
    assert min(figures[f"2/{name}"] for name in ("alone", "apart", "together")) > 0


def test_scaling_needs_a_core_for_each_rank():
    with pytest.raises(UserError, match="give --ranks"):
        measured("scaling --device cpu --ranks 1000")
