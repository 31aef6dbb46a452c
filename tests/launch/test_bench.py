"""launch/bench.py: each benchmark at a small size, and what its metrics rest on."""

import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from infra.errors import UserError
from infra.storage import LocalStorage, open_storage
from launch.bench import measure, parser
from launch.benchmarks import data as data_benchmark
from launch.benchmarks import ops, scaling, step
from launch.benchmarks import translate as translate_benchmark
from launch.benchmarks.measuring import Measurement, interleaved, ratios, table
from launch.benchmarks.profiling import KINDS, time_shares
from launch.benchmarks.step import Training, flops_of
from launch.runs.config import JobConfig, make_config
from launch.runs.folder import RunFolder
from pipelines.loader import Loader
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.conftest import S3Server
from trainer.draws import Draws
from trainer.networks import compiling

pytestmark = pytest.mark.slow

SMALL = {
    "method.generator.ngf": 8, "method.discriminator.ndf": 8, "method.head_dim": 8, "method.patches": 16,
    "method.robust.start": 0.0, "engine.device": "cpu", "engine.precision": "fp32",
    "data.crop": 64, "data.decoder": "pillow", "data.threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("scenes")
    prepare(street_scenes(6, test_count=0), LocalStorage(root), Encoding((128, 64)), progress=False)
    return str(root)


def config_of(root: str, **options: object) -> JobConfig:
    given = {name.replace("__", "."): value for name, value in options.items()}
    return make_config(SMALL, {"data.root": root}, given)


def check_documented(benchmark: ModuleType, metrics: list[Measurement]) -> None:
    """Every metric is positive, finite and named by the module's docstring."""
    documented = str(benchmark.__doc__)
    for metric in metrics:
        assert all(0 <= value < float("inf") for value in metric.values), metric
        names = metric.name.split("/")
        assert names[-1] in documented or f"{names[0]}/" in documented, metric


# ---- what all share -------------------------------------------------------------------------------------------------


def test_measures_are_taken_in_turn() -> None:
    taken: list[str] = []

    def take(name: str) -> dict[str, float]:
        taken.append(name)
        return {name: float(len(taken))}

    found = interleaved([lambda: take("one"), lambda: take("two")], 3)
    assert taken == ["one", "two"] * 3
    assert found == {"one": [1.0, 3.0, 5.0], "two": [2.0, 4.0, 6.0]}


def test_ratios_are_of_neighbours() -> None:
    assert ratios((10.0, 1.0), (5.0, 2.0)) == [2.0, 0.5]


def test_a_table_has_the_median_of_all_repetitions() -> None:
    lines = table([Measurement("matmul_share", "", (0.5, 0.95, 2.0)), Measurement("peak", "GiB", [4.0])]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["matmul_share", "0.95", "0.5", "2"],
        ["peak", "4", "4", "4", "GiB"],
    ]


def test_options_of_the_job_pass_through_and_figures_are_kept(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "run", lambda config, repetitions, steps: [Measurement(str(steps), "s", [config.seed])])
    file = tmp_path / "new" / "ops.json"
    shown = measure(["ops", "--steps", "3", "--seed", "7", "--method.robust.T", "0.2", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["benchmark"] == "ops" and report["options"]["method.robust.T"] == 0.2
    assert report["metrics"] == {"3": {"unit": "s", "median": 7, "least": 7, "most": 7, "values": [7]}}
    assert report["machine"]["cores"] >= 1 and "torch" in report["versions"]
    assert shown.splitlines()[1].split() == ["3", "7", "7", "7", "s"]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("step --step 3", "unknown option '--step'"),
        ("step --repetitions 0", "give at least 1"),
        ("scaling runs/one --method cut", "scaling has no option --method"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(command: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        measure(command.split())


def test_the_launcher_of_deepspeed_may_add_its_option() -> None:
    args, options = parser().parse_known_args(["--local_rank=1", "step", "--data", "ROOT", "--steps", "2"])
    assert (args.benchmark, args.steps, options) == ("step", 2, ["--local_rank=1", "--data", "ROOT"])


# ---- step -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(root: str) -> dict[str, Measurement]:
    metrics = step.run(config_of(root, method__robust__per_step="one"), repetitions=2, steps=2)
    check_documented(step, metrics)
    return {metric.name: metric for metric in metrics}


def test_a_step_is_measured(steps: dict[str, Measurement]) -> None:
    assert len(steps["seconds"].values) == 2
    assert steps["pairs_per_s"].values == pytest.approx([1 / seconds for seconds in steps["seconds"].values])
    (work,) = steps["tflop"].values
    assert steps["tflops"].values == pytest.approx([work / seconds for seconds in steps["seconds"].values])
    assert all(0 < share < 1 for share in steps["matmul_share"].values)
    assert 0.1 < steps["peak"].values[0] < 4
    assert {name for name in steps if name.startswith("parameters/")} == {
        f"parameters/{name}" for name in ("generator", "discriminator", "heads")
    }


def test_a_step_is_shared_out_among_all_kinds_of_work(steps: dict[str, Measurement]) -> None:
    shares = {name: steps[f"share/{name}"].values[0] for name in KINDS}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0.001


def test_a_step_has_all_its_losses_and_draws_of_its_own(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(config_of(root, method__robust__start=0.25))
    seen: list[tuple[int, bool]] = []

    def taken(batches: object, context: step.StepContext) -> None:
        seen.append((context.draws.step, context.progress >= 0.25))

    monkeypatch.setattr(training, "take", taken)
    training.steps(2)
    training.close()
    assert seen == [(0, True), (1, True)]


def test_two_ranks_take_steps_together_and_the_first_one_tells(root: str) -> None:
    small = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    script = [str(Path(__file__).parents[2] / "launch/bench.py"), "step", "--repetitions", "1", "--global-batch", "2"]
    done = subprocess.run([*command, *script, "--data", root, *small], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:]}
    assert done.stdout.count("seconds") == 2 and float(rows["pairs_per_s"]) == pytest.approx(
        2 / float(rows["seconds"]), rel=0.01
    )


def test_steps_that_take_turns_are_counted_as_they_are_timed(root: str) -> None:
    """Two of three steps of DRIT are its content discriminator alone, a small part of the work; a repetition has all three."""
    small = {"method.name": "drit", "method.generator.ngf": 4, "method.discriminator.ndf": 4,
             "method.content_layers": 1, "data.crop": 64, "data.decoder": "pillow",
             "engine.device": "cpu", "engine.precision": "fp32", "data.threads": 1, "optim.global_batch": 2}  # fmt: skip
    config = make_config(small, {"data.root": root})
    training = Training(config)
    work = [flops_of(training.step) / 1e12 for _ in range(3)]
    training.close()
    assert max(work) > 3 * min(work)
    metrics = {metric.name: metric.values for metric in step.run(config, repetitions=1, steps=3)}
    assert metrics["tflop"] == pytest.approx([sum(work) / 3])
    assert metrics["tflops"] == pytest.approx(
        [work / seconds for work, seconds in zip(metrics["tflop"], metrics["seconds"], strict=True)]
    )


def test_a_compiled_step_has_the_work_of_one_that_is_not(
    root: str, steps: dict[str, Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(compiling, "_compiled", cache(compiled))
    monkeypatch.setattr(compiling, "_refused", set())
    config = config_of(root, method__robust__per_step="one", engine__compile="true")
    monkeypatch.setattr(step, "WARM_UP", 1)
    metrics = {metric.name: metric.values for metric in step.run(config, repetitions=2, steps=2)}
    assert not compiling._refused and metrics["tflop"] == pytest.approx(steps["tflop"].values)


@pytest.mark.gpu
def test_a_step_is_measured_on_a_gpu(root: str) -> None:
    config = config_of(root, engine__device="cuda", engine__precision="bf16", data__decoder="auto")
    metrics = {metric.name: metric.values[0] for metric in step.run(config, repetitions=1, steps=2)}
    assert metrics["share/convolution"] > 0 and metrics["peak"] > 0


def test_warm_up_meets_every_tap_twice() -> None:
    drawn = [int(Draws(0, number).stream("robust", "choice").integers(5)) for number in range(step.WARM_UP)]
    assert min(drawn.count(tap) for tap in range(5)) >= 2


@pytest.mark.parametrize(
    ("options", "tera"), [({"beta": 0.0}, 1.24), ({"per_step": "one"}, 1.6), ({"per_step": "all"}, 3.2)]
)
def test_the_work_of_a_step_agrees_with_the_count_by_hand(root: str, options: dict[str, object], tera: float) -> None:
    """At 256x256 and full width, of which a quarter is counted: convolutions grow with the area and with both widths."""
    given = {f"method__robust__{name}": value for name, value in options.items()}
    sizes = {"method__generator__ngf": 16, "method__discriminator__ndf": 16, "method__taps": (0, 4, 8, 12, 16)}
    training = Training(config_of(root, **given, **sizes))
    counted = flops_of(training.step)
    training.close()
    assert counted * (256 / 64) ** 2 * (64 / 16) ** 2 / 1e12 == pytest.approx(tera, rel=0.15)


def test_a_product_has_two_flops_for_each_multiplication() -> None:
    one, other = torch.rand(3, 4), torch.rand(4, 5)
    assert flops_of(lambda: one @ other) == 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (torch.nn.Conv2d(8, 8, 3), "convolution"), (torch.nn.ReflectionPad2d(1), "padding"),
        (torch.nn.InstanceNorm2d(8), "norm"), (torch.nn.ReLU(), "norm"),
        (ops.BlurDownsample(8), "resampling"), (ops.BlurUpsample(8), "resampling"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_forward_and_backward_of_an_operator_are_of_its_kind(module: torch.nn.Module, kind: str) -> None:
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    shares = time_shares(lambda: module(x).sum().backward(), torch.device("cpu"))
    found = {name for name, share in shares.items() if share > 0}
    assert found - {"other", *(["padding"] if kind == "resampling" else [])} == {kind}


def test_the_lengths_of_vectors_are_no_norm() -> None:
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    assert time_shares(lambda: x.norm(dim=1).sum().backward(), torch.device("cpu"))["norm"] == 0


# ---- ops ------------------------------------------------------------------------------------------------------------


def test_operators_of_torch_are_compared_with_ours() -> None:
    metrics = ops.run(make_config(SMALL, {"data.crop": 32}), repetitions=1, steps=1)
    check_documented(ops, metrics)
    names = {metric.name for metric in metrics}
    assert {
        "conv 3x3 of the blocks/stock",
        "norm and ReLU, first/stock_to_ours",
        "Adam/ours",
        "matmul",
        "copy",
    } <= names
    assert "conv 3x3 of the blocks/ours" not in names


@pytest.mark.parametrize("name", [name for name, (_, modules) in ops.operators(4, 32).items() if len(modules) == 2])
def test_both_modules_of_an_operator_do_the_same_work(name: str) -> None:
    shape, (stock, ours) = ops.operators(4, 32)[name]
    outputs = [module(torch.randn(2, *shape)) for module in (stock, ours)]
    assert outputs[0].shape == outputs[1].shape


# ---- data -----------------------------------------------------------------------------------------------------------


def test_the_loader_is_measured_beside_others(root: str) -> None:
    pytest.importorskip("nvidia.dali")
    metrics = data_benchmark.run(config_of(root, data__decoder="dali", optim__global_batch=2), repetitions=1, steps=2)
    check_documented(data_benchmark, metrics)
    found = {metric.name: metric.values[0] for metric in metrics}
    assert found["loader_to_bare_dali"] == pytest.approx(found["loader"] / found["bare_dali"])
    assert found["pillow_dataloader"] > 0 and found["first_batch"] > 0


def test_an_empty_cache_is_measured_before_a_filled_one(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"s3://{s3_server.make_bucket()}/scenes"
    prepare(street_scenes(6, test_count=0), open_storage(root), Encoding((128, 64)), progress=False)
    fetched: list[float] = []
    make = data_benchmark._loader

    def watched(config: JobConfig, root: str, device: torch.device) -> Loader:
        loader = make(config, root, device)
        close = loader.close

        def noting() -> None:
            fetched.append(loader.health.metrics()["data/fetched_MiB"])
            close()

        monkeypatch.setattr(loader, "close", noting)
        return loader

    monkeypatch.setattr(data_benchmark, "_loader", watched)
    metrics = data_benchmark.run(config_of(root), repetitions=2, steps=3)
    check_documented(data_benchmark, metrics)
    assert len(metrics[0].values) == 2
    assert [amount > 0 for amount in fetched] == [True, False] * 2


def test_images_that_others_do_not_read_are_refused(root: str, tmp_path: Path) -> None:
    prepare(street_scenes(2, test_count=0), LocalStorage(tmp_path), Encoding((64, 32), "png"), progress=False)
    with pytest.raises(UserError, match="data prepared with --format jpg"):
        data_benchmark.run(config_of(str(tmp_path)), 1, 1)
    with pytest.raises(UserError, match="give --crop"):
        data_benchmark.run(config_of(root, data__crop=None), 1, 1)


# ---- scaling --------------------------------------------------------------------------------------------------------


def run_folder(path: Path, batch: int, rates: list[float]) -> Path:
    config = make_config({"optim.global_batch": batch, "loop.report_every": 2})
    folder = RunFolder(path)
    folder.open(config)
    rows = [{"step": step, "pairs_per_s": rate} for step, rate in enumerate(rates, 1)]
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scaling_compares_the_median_steps_after_the_first_report(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one", 1, [1.0, 1.0, 5.0, 7.0, 9.0])
    two = run_folder(tmp_path / "two", 2, [1.0, 1.0, 10.5])
    header, *rows = measure(["scaling", str(one), str(two)]).splitlines()
    assert header.split() == ["pairs", "a", "step", "pairs/s", "speed-up", "efficiency"]
    assert [row.split() for row in rows] == [
        [str(one), "1", "7", "1", "100.0%"], [str(two), "2", "10.5", "1.5", "75.0%"]
    ]  # fmt: skip


def test_runs_without_rates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder with metrics"):
        scaling.report([tmp_path / "nothing"])
    with pytest.raises(UserError, match="no steps after the first report"):
        scaling.report([run_folder(tmp_path / "short", 1, [1.0, 1.0])])


# ---- translating ----------------------------------------------------------------------------------------------------


def test_translating_is_measured_beside_a_plain_loop(root: str) -> None:
    metrics = translate_benchmark.run(config_of(root, data__crop=80, method__generator__blocks=6), 2, 3)
    check_documented(translate_benchmark, metrics)
    by_name = {metric.name: metric.values for metric in metrics}
    assert by_name["ours_to_loop"] == ratios(by_name["ours"], by_name["loop"])
    assert by_name["tile_difference"][0] <= 1
