"""The configuration tree of a training job: presets, precedence, short flags, help."""

import ast
from pathlib import Path
from typing import Any

import pytest

from infra.config import build, flatten, leaves, read_yaml, to_yaml
from infra.errors import UserError
from launch.runs.config import JobConfig, job_class, make_config, parse_arguments
from trainer.methods import METHODS, CutConfig, SrunitConfig
from trainer.tasks import TASKS

ROOT = Path(__file__).parents[2]


def flat(*line: str) -> dict[str, Any]:
    return flatten(parse_arguments(line))


# ---- presets ------------------------------------------------------------------------------------------------------


EPOCHS = {
    "fastcut": (150.0, 50.0),
    "munit": (800.0, 0.0),
    "drit": (600.0, 600.0),
    **dict.fromkeys(("cyclegan", "distancegan", "gcgan"), (100.0, 100.0)),
}  # at the full rate and falling, where not CUT's


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_with_every_method(task: str, method: str) -> None:
    config = make_config({"task": task, "method.name": method})
    assert (config.task, config.method.name, config.data.crop) == (task, method, 64 if method == "sincut" else 256)
    epochs = (10.0, 10.0) if task == "gta2city" else EPOCHS.get(method, (200.0, 200.0))
    epochs = (8.0, 8.0) if method == "sincut" else epochs  # of crops, and not of images
    assert (config.optim.epochs, config.optim.decay_epochs) == epochs
    assert TASKS[task].crop <= min(TASKS[task].size)


def test_the_tasks_of_the_papers() -> None:
    sizes = {name: task.size for name, task in TASKS.items()}
    square = dict.fromkeys(("map2photo", "photo2map", "horse2zebra", "summer2winter", "day2night"), (256, 256))
    streets = dict.fromkeys(("gta2city", "label2city"), (512, 256))
    assert sizes == {**streets, **square, "apple2orange": (286, 286), "cat2dog": (286, 286)}
    labelled = {name for name, task in TASKS.items() if task.label_space == "cityscapes19"}
    assert labelled == {"gta2city", "label2city"}


def test_the_methods_of_the_papers() -> None:
    cut, fastcut, srunit = (make_config({"method.name": name}).method for name in ("cut", "fastcut", "srunit"))
    assert isinstance(cut, CutConfig) and isinstance(fastcut, CutConfig) and isinstance(srunit, SrunitConfig)
    assert not isinstance(cut, SrunitConfig) and cut.normalisation == fastcut.normalisation == "cut"
    assert (cut.buffer, cut.identity, cut.lambda_nce, cut.flip_equivariance) == (0, True, 1, False)
    assert (fastcut.buffer, fastcut.identity, fastcut.lambda_nce, fastcut.flip_equivariance) == (0, False, 10, True)
    robust = srunit.robust
    assert (robust.beta, robust.T, robust.start, robust.per_step, robust.rule) == (1e-4, 0.1, 0.25, "all", "paper")
    assert srunit.buffer == 50 and srunit.normalisation == "srunit"
    assert robust.taps == () and srunit.taps == cut.taps == (0, 4, 8, 12, 16)


def test_srunit_as_released() -> None:
    """SeanJia/SRUNIT at 76231f1: reg_noise and reg 0.001, one random layer a step, no image pool, D alone in a quarter."""
    paper, released = (flatten(make_config({"method.name": name})) for name in ("srunit", "srunit-released"))
    changed = {name: value for name, value in released.items() if value != paper[name]}
    assert changed == {
        "method.name": "srunit-released", "method.buffer": 0, "method.robust.T": 1e-3, "method.robust.beta": 1e-3,
        "method.robust.rule": "published", "method.robust.per_step": "one", "method.robust.rest": True,
    }  # fmt: skip
    kept = ("robust.start", "robust.gradient", "robust.reference", "robust.semantics", "robust.taps", "normalisation")
    assert [released[f"method.{name}"] for name in kept] == [0.25, "both", "source", "heads", (), "srunit"]


def test_optimiser_as_published() -> None:
    optim = make_config().optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.global_batch, optim.schedule) == (2e-4, 0.5, 0.999, 1, "linear")


def test_an_option_of_another_method_is_unknown() -> None:
    with pytest.raises(UserError, match=r"unknown option '--beta' .*see --help"):
        parse_arguments(["--method", "cut", "--beta", "1e-4"])
    with pytest.raises(UserError, match=r"unknown option 'method.robust.T'"):
        make_config({"method.name": "fastcut", "method.robust.T": 0.2})


def test_a_file_may_have_options_for_each_method(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("method: {patches: 64}\nmethods: {srunit: {robust: {T: 0.2}}, cut: {buffer: 3}}\n")
    srunit, cut, fastcut = (flat("--config", str(file), "--method", name) for name in ("srunit", "cut", "fastcut"))
    assert (srunit["method.robust.T"], srunit["method.buffer"], srunit["method.patches"]) == (0.2, 50, 64)
    assert (cut["method.buffer"], fastcut["method.buffer"], cut["method.patches"]) == (3, 0, 64)
    file.write_text("methods: {cut: {robust: {T: 0.2}}}\n")
    with pytest.raises(UserError, match=r"unknown option 'method.robust.T'"):
        parse_arguments(["--config", str(file)])
    file.write_text("methods: {cute: {buffer: 2}}\n")
    with pytest.raises(UserError, match="unknown method 'cute': choose one of cut, fastcut, srunit"):
        parse_arguments(["--config", str(file)])


def test_help_has_the_options_of_the_method_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("method: {name: cut}\n")
    for line, shown in ([], True), (["--config", str(file)], False), (["--method", "cut"], False):
        with pytest.raises(SystemExit):
            parse_arguments([*line, "--help"])
        assert ("--method.robust.start" in capsys.readouterr().out) == shown


# ---- precedence ---------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_over_the_preset_over_the_defaults(tmp_path: Path) -> None:
    assert flat("--task", "horse2zebra")["optim.epochs"] == 200
    assert flat("--task", "gta2city")["optim.epochs"] == 10
    file = tmp_path / "job.yaml"
    file.write_text("optim: {epochs: 3, lr: 1e-3}\n")
    assert flat("--config", str(file))["optim.epochs"] == 3
    given = flat("--config", str(file), "--optim.epochs", "4")
    assert (given["optim.epochs"], given["optim.lr"], given["optim.decay_epochs"]) == (4, 1e-3, 10)


def test_the_file_may_name_task_and_method_and_the_command_line_others(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("task: horse2zebra\nmethod: {name: fastcut, buffer: 7}\n")
    config = parse_arguments(["--config", str(file)])
    assert isinstance(config.method, CutConfig)
    assert (config.task, config.optim.epochs, config.method.lambda_nce, config.method.buffer) == (
        "horse2zebra",
        150,
        10,
        7,
    )
    config = parse_arguments(["--config", str(file), "--method", "cut"])
    assert isinstance(config.method, CutConfig)
    assert (config.optim.epochs, config.method.lambda_nce, config.method.buffer) == (200, 1, 7)


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_configuration_read_back_is_the_same(tmp_path: Path, method: str) -> None:
    config = make_config({"method.name": method, "optim.lr": 1e-4, "loop.max_steps": 5, "data.flip": False})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(flatten(config)))
    assert build(type(config), read_yaml(file)) == config
    assert parse_arguments(["--config", str(file)]) == config


# ---- the command line ---------------------------------------------------------------------------------------------

SHORT_FLAGS = [
    ("--task", "task", "cat2dog", "cat2dog"),
    ("--seed", "seed", "7", 7),
    ("--run-dir", "run_dir", "runs/x", "runs/x"),
    ("--data", "data.root", "s3://bucket/x", "s3://bucket/x"),
    ("--crop", "data.crop", "128", 128),
    ("--on-bad-sample", "data.on_bad_sample", "skip", "skip"),
    ("--on-bad-shard", "data.on_bad_shard", "skip", "skip"),
    ("--ngf", "method.generator.ngf", "16", 16),
    ("--ndf", "method.discriminator.ndf", "16", 16),
    ("--method", "method.name", "cut", "cut"),
    ("--beta", "method.robust.beta", "3e-4", 3e-4),
    ("--T", "method.robust.T", "0.05", 0.05),
    ("--global-batch", "optim.global_batch", "4", 4),
    ("--engine", "engine.kind", "ddp", "ddp"),
    ("--precision", "engine.precision", "bf16", "bf16"),
    ("--max-steps", "loop.max_steps", "9", 9),
    ("--on-nonfinite", "loop.on_nonfinite", "skip", "skip"),
]


@pytest.mark.parametrize(("flag", "name", "text", "value"), SHORT_FLAGS)
def test_a_short_flag_reaches_its_leaf(flag: str, name: str, text: str, value: Any) -> None:
    assert flat(flag, text)[name] == value != flat()[name]


def test_no_short_flag_is_left_untested() -> None:
    flags = [f.metadata["flag"] for _, f, _ in leaves(job_class("srunit")) if f.metadata["flag"]]
    assert sorted(flags) == sorted(flag for flag, *_ in SHORT_FLAGS)


def test_every_leaf_has_a_long_option_and_a_help_text() -> None:
    for name, field, _ in leaves(job_class("srunit")):
        value = flatten(make_config())[name]
        text = (
            ",".join(map(str, value))
            if isinstance(value, tuple)
            else str(value).lower()
            if value is None
            else str(value)
        )
        assert flat(f"--{name.replace('_', '-')}", text)[name] == value
        assert field.metadata["help"], name


def test_the_launcher_may_add_its_rank() -> None:
    assert flat("--local_rank=1", "--seed", "3") == flat("--seed", "3")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            (),
            (
                "epochs (of the source) at the full learning rate [10.0]",
                "the method, whose options are those of the section method [srunit]",
            ),
        ),
        (
            ("--method", "fastcut"),
            ("weight of PatchNCE [10.0]", "the pair of domains: a preset of everything below [gta2city]"),
        ),
        (("--task", "cat2dog", "--method", "fastcut"), ("at the full learning rate [150.0]",)),
        (("--task", "cat2dog"), ("at the full learning rate [200.0]", "weight of PatchNCE [1.0]")),
    ],
)
def test_help_shows_the_defaults_of_the_task_and_method_named(
    line: tuple[str, ...], shown: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        parse_arguments([*line, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in shown:
        assert words in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--task", "gta2mars"], "unknown task 'gta2mars': choose one of gta2city, "),
        (["--method", "pix2pix"], "unknown method 'pix2pix': choose one of cut, fastcut, srunit"),
        (["--optim.lrr", "1"], r"unknown option '--optim.lrr' \(did you mean '--optim.lr'\?\)"),
        (
            ["--method.lambda_nce", "1"],
            r"unknown option '--method.lambda_nce' \(did you mean '--method.lambda-nce'\?\)",
        ),
        (["--glob", "4"], "unknown option '--glob'"),
        (["--task"], "argument --task: expected one argument"),
        (["--precision", "fp99"], "engine.precision = 'fp99' is unknown: choose one of auto, fp32, bf16, fp16"),
        (["--engine", "horovod"], "engine.kind = 'horovod' is unknown: choose one of auto, single, ddp, deepspeed"),
        (["--T", "0"], "to T = 0.0 are impossible"),
        (["--T", "-1"], "to T = -1.0 are impossible"),
        (["--T", "nan"], "method.robust.T = 'nan' is not a number"),
        (["--beta=-1e-4"], "beta = -0.0001 is negative"),
        (["--method.robust.start", "1.5"], "method.robust.start = 1.5 is a share"),
        (["--method.robust.rest", "true", "--method.robust.start", "1"], "never reached: give a start below 1"),
        (
            ["--method.robust.least-relative", "0.5"],
            "perturbations from 0.5 to 0.5 of the features' norm are impossible",
        ),
        (["--method.robust.taps", "3"], "robust tap 3 has no projection head: choose taps among 0, 4, 8, 12, 16"),
        (["--method.taps", ""], "method.taps is empty"),
        (["--method.buffer", "-1"], "method.buffer = -1 counts images"),
        (["--method.patches", "1"], "method.patches 2 or more"),
        (["--method.lambda-nce", "0"], "lambda_nce must be positive"),
        (["--seed", "-1"], "seed -1 is negative"),
        (["--seed", "1.5"], "seed = '1.5' is not a whole number"),
        (["--crop", "0"], "crop is 0: give at least 1"),
        (["--ngf", "0"], "--ngf 0 counts channels: it must be 1 or more"),
        (["--method.generator.blocks", "7"], "method.generator.blocks = 7 is unknown: choose one of 6, 9"),
        (["--max-steps", "0"], "--max-steps 0 trains nothing"),
        (["--global-batch", "0"], "global_batch.*must be 1 or more"),
        (["--optim.lr", "0"], "Adam needs lr > 0"),
        (["--optim.ema", "1"], r"optim.ema = 1.0 must lie in \[0, 1\)"),
        (["--optim.epochs", "0", "--optim.decay-epochs", "0"], "not both 0"),
        (["--loop.keep", "0"], "must be 1 or more"),
        (["--optim.schedule", "step", "--optim.step-epochs", "0"], "optim.step_epochs must be 1 or more"),
        (["--optim.schedule", "cosine-published", "--optim.epochs", "0"], "optim.epochs above 0 for schedule cosine"),
    ],
)
def test_an_impossible_command_line_is_explained(line: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_arguments(line)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("task: [a]", r"unknown task \"\['a'\]\""),
        ("optim: {lrr: 1}", r"unknown option 'optim.lrr' \(did you mean 'optim.lr'\?\)"),
        ("seed: {a: 1}", r"unknown option 'seed.a'"),
        ("optim: 3", "unknown option 'optim'"),
        ("method: {taps: 4}", "method.taps = 4 is not a list of numbers such as 0,4,8"),
        ("data: {flip: 1}", "data.flip = 1 is not true or false"),
    ],
)
def test_an_impossible_file_is_explained(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=words):
        parse_arguments(["--config", str(file)])


# ---- the house ----------------------------------------------------------------------------------------------------


class Reads(ast.NodeVisitor):
    """The attributes that a module reads, in checks of configurations (`__post_init__`) apart."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "__post_init__":
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)


def test_every_option_is_read_somewhere() -> None:
    reads = Reads()
    for package in ("infra", "pipelines", "trainer", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            reads.visit(ast.parse(path.read_text()))
    options = {name.rpartition(".")[2] for name, _, _ in leaves(JobConfig)}
    assert options - reads.names == set()
