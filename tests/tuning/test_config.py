"""What a command line asks a search for, and what of it is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

import launch.runs.config
from infra.config import flatten, to_yaml
from infra.errors import UserError
from infra.ray_cluster import Machine, check_address
from launch.runs.config import make_config
from tuning import embedded
from tuning.ablations import BASELINES, SCHEDULE, options
from tuning.cluster import share_out
from tuning.config import SearchConfig, from_file, parse_arguments
from tuning.settle import _embedded, design, evaluations, first_decision


def test_a_request_survives_its_file(tmp_path: Path) -> None:
    request = parse_arguments(
        [
            "--space",
            "beta-T",
            "optim.lr=loguniform(1e-5,1e-3)",
            "--trials",
            "4",
            "--gpus-per-trial",
            "0.5",
            "--ngf",
            "8",
        ]
    )
    assert request.search.trials == 4 and request.space == ("beta-T", "optim.lr=loguniform(1e-5,1e-3)")
    file = tmp_path / "search.yaml"
    file.write_text(to_yaml(request.flat()))
    assert from_file(file) == request


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("options", [{}, {"--ngf": 32}, {"--method.patches": 128, "--method.robust.per-step": "all"}])
def test_the_command_line_holds_over_a_file_as_in_a_training(
    options: dict[str, object], own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over what a file says of one method alone, and that of the embedded scenes does."""
    monkeypatch.setattr("tuning.embedded.draw", lambda _: tmp_path)
    given = [str(text) for pair in options.items() for text in pair]
    file = ["--config", str(embedded.SMALL.config)]
    request = parse_arguments([*(file if own else []), *given, "--metric", "Dist"])
    layer = request.options if own else _embedded(request, embedded.SMALL)
    expected = flatten(launch.runs.config.parse_arguments([*file, *given]))
    found = flatten(make_config(layer)) | {"data.root": expected["data.root"]}
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--trials", "0"], "--trials 0 is impossible"),
        (["--trails", "3"], "did you mean '--trials'"),
        (["--metric", "accuracy"], "accuracy.*choose one of mIoU"),
        (["--searcher", "bayes"], "choose one of grid, random, optuna"),
        (["--ngf", "x"], "method.generator.ngf = 'x' is not a whole number"),
        (["--run-dir", "runs/x"], "a run folder of its own"),
        (["--loop.mirror", "s3://bucket/x"], "leave out --loop.mirror"),
        (["--loop.max-steps", "9"], "leave out --loop.max-steps, and give fewer epochs"),
        (["--name", "../x"], "no name of a folder"),
        (["--gpus-per-trial", "0.5", "--ranks-per-trial", "2"], "cannot share a GPU"),
        (["--ablations", "srunit", "--space", "taps"], "exclude each other"),
        (["--resume", "x", "--trials", "3"], "trials has no place beside it"),
        (["--resume", "x", "--ngf", "3"], "method.generator.ngf has no place beside it"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(arguments: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_arguments(arguments)


def test_how_many_trials() -> None:
    def total(*arguments: str) -> int:
        return design(parse_arguments(arguments)).total

    assert total() == 10
    assert total("--trials", "3") == 3
    assert total("--space", "taps") == 6
    assert total("--searcher", "grid") == 9
    assert total("--searcher", "grid", "--trials", "16") == 16
    assert total("--ablations", "srunit", "--seeds", "2") == 16


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--trials", "1"], "trials that take over from each other"),
        (["--ablations", "srunit"], "pbt needs a space"),
        (["--searcher", "optuna"], "leave out --searcher optuna"),
        (["--space", "taps"], "which method.robust.taps does not bear"),
        (["--space", "method.head_dim=randint(4,8)"], "which method.head_dim does not bear.*method.robust.beta.*optim.lr"),
        (["--space", "optim.lr=choice(1e-4,1e-3)"], "which optim.lr does not bear"),
        *(
            (["--space", f"{field}={distribution}"], f"which {field} does not bear")
            for field, distribution in {
                "optim.global_batch": "randint(1,4)", "optim.accumulation": "randint(1,4)",
                "optim.epochs": "uniform(1,3)", "optim.decay_epochs": "uniform(1,3)", "optim.ema": "uniform(0.9,0.999)",
                "optim.step_epochs": "randint(1,9)", "method.buffer": "randint(0,9)",
                "method.bank.size": "randint(8,64)", "method.robust.start": "uniform(0,1)",
                "method.constraint.start": "uniform(0,1)", "method.constraint.self_distance": "uniform(0,1)",
            }.items()
        ),
    ],
)  # fmt: skip
def test_what_pbt_cannot_do(arguments: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        design(parse_arguments(["--scheduler", "pbt", *arguments]))


def test_what_pbt_can_do() -> None:
    space = [
        "beta-T",
        "optim.lr=loguniform(1e-5,1e-3)",
        "method.patches=randint(16,64)",
        "method.lambda_nce=uniform(1,2)",
    ]
    assert design(parse_arguments(["--scheduler", "pbt", "--space", *space])).total == 10


FOUR_EPOCHS = ["--optim.epochs", "2", "--optim.decay-epochs", "2"]


@pytest.mark.parametrize(("every", "count"), [("1", 4), ("1.25", 4), ("1.5", 3), ("0.4", 10), ("0.3", 14), ("5", 1)])
def test_the_end_of_a_trial_is_an_evaluation(every: str, count: int) -> None:
    assert evaluations(parse_arguments([*FOUR_EPOCHS, "--evaluation.every", every])) == count


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["--evaluation.every", "1"], 2),  # the first one is where L_robust begins
        (["--evaluation.every", "1.1"], 2),
        (["--evaluation.every", "0.5"], 3),
        (["--evaluation.every", "0.4"], 4),
        (["--evaluation.every", "1", "--method.robust.start", "0"], 1),
        (["--evaluation.every", "1", "--method.robust.start", "0.5"], 3),
        (["--evaluation.every", "1", "--space", "optim.lr=uniform(0.1,1)", "--method.robust.start", "0.5"], 1),
        (["--evaluation.every", "1", "--space", "optim.lr=uniform(0.1,1)", "beta-T"], 2),
        (["--evaluation.every", "1", "--space", "beta-T", "method.robust.start=uniform(0,0.5)"], 3),
        (["--evaluation.every", "1", "--space", "beta-T", "optim.epochs=uniform(1,6)"], 3),
        (["--evaluation.every", "1", "--space", "method.constraint.smoothness=uniform(0,2)"], 2),
        (["--evaluation.every", "1", "--space", "method.name=choice(cut,srunit)"], 2),
        (["--evaluation.every", "1", "--space", "taps"], 2),
        (["--evaluation.every", "1", "--searcher", "grid"], 2),
        (["--evaluation.every", "1", "--ablations", "srunit"], 2),
        (["--evaluation.every", "1", "--ablations", "cut"], 1),
    ],
)
def test_trials_are_compared_after_what_they_differ_in_has_acted(arguments: list[str], first: int) -> None:
    request = parse_arguments(["--scheduler", "asha", *FOUR_EPOCHS, *arguments])
    assert first_decision(request, design(request)) == first


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--evaluation.every", "2"], "at 25% of the epochs.*give a lower --evaluation.every or an earlier start"),
        (["--evaluation.every", "1", "--method.robust.start", "0.75"], "at 75% of the epochs"),
        (["--evaluation.every", "4", "--space", "optim.lr=uniform(0.1,1)"], "before the end of a trial: give a lower"),
    ],
)
def test_trials_that_end_before_they_could_be_compared(arguments: list[str], complaint: str) -> None:
    request = parse_arguments(["--scheduler", "asha", *FOUR_EPOCHS, *arguments])
    with pytest.raises(UserError, match=complaint):
        first_decision(request, design(request))


def search(**options: Any) -> SearchConfig:
    return SearchConfig(**options)


def test_resources_are_shared_out() -> None:
    one, pair = [Machine(8, 0)], [Machine(8, 2), Machine(8, 2)]
    assert share_out(search(), one).concurrent == 8
    assert share_out(search(ranks_per_trial=3), one).concurrent == 2
    alone = share_out(search(max_concurrent=1), one)
    assert (alone.concurrent, alone.cpus) == (1, 8)
    assert share_out(search(), pair).concurrent == 4 and share_out(search(), pair).gpus == 1
    small = share_out(search(gpus_per_trial=0.25), pair)
    assert (small.concurrent, small.gpus, small.cpus) == (16, 0.25, 1)
    assert share_out(search(ranks_per_trial=4), pair).concurrent == 1
    assert share_out(search(gpus_per_trial=0.0), pair).gpus == 0


@pytest.mark.parametrize(
    ("options", "machines", "complaint"),
    [
        ({"gpus_per_trial": 4.0}, [Machine(2, 0)], "4 GPUs per trial, 0 found"),
        ({"ranks_per_trial": 3}, [Machine(2, 0)], "3 ranks per trial, 2 CPUs found"),
        ({"gpus_per_trial": 2.0}, [Machine(8, 2)], "one GPU to each rank"),
    ],
)
def test_impossible_resources(options: dict, machines: list[Machine], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        share_out(search(**options), machines)


def test_a_dead_cluster() -> None:
    with pytest.raises(UserError, match="no Ray cluster answers at 127.0.0.1:1"):
        check_address("127.0.0.1:1")
    with pytest.raises(UserError, match="no HOST:PORT"):
        check_address("head")


@pytest.mark.parametrize("task", ["horse2zebra", "gta2city"])
def test_methods_are_compared_on_one_schedule_whatever_their_papers_have(task: str) -> None:
    shared = {"task": task, "evaluation.every": 10.0}
    usual = flatten(make_config(shared))
    for row in BASELINES:
        config = flatten(make_config(shared, options("baselines", {"row": row, "seed": 0}, shared)))
        assert config["method.name"] == row.lower() and config["optim.global_batch"] == 2
        assert {name: config[name] for name in SCHEDULE} == {name: usual[name] for name in SCHEDULE}
    cut, munit = (options("baselines-time", {"row": row, "seed": 0}, shared) for row in ("CUT", "MUNIT"))
    assert munit["optim.epochs"] == pytest.approx(cut["optim.epochs"] * 119 / 312)
