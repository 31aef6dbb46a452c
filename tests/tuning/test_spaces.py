"""What a search varies: parsing, checks against the configuration tree, grids, draws."""

import math
import statistics
from collections.abc import Callable

import pytest

from infra.errors import UserError
from tuning.spaces import Dimension, Params, grid, parse_space, suggest

BETA, T = "method.robust.beta", "method.robust.T"
TRIALS = 10  # of a search by default


def test_the_papers_sweep() -> None:
    beta, temperature = parse_space(["beta-T"], [{}])
    assert beta == Dimension(BETA, "loguniform", (1e-5, 1e-3))
    assert temperature == Dimension(T, "uniform", (0.01, 0.2))


def test_taps_are_all_layers_or_all_but_one_of_those_in_use() -> None:
    (taps,) = parse_space(["taps"], [{"method.taps": "0,4,8"}])
    assert taps.field == "method.robust.taps"
    assert taps.values == ((0, 4, 8), (4, 8), (0, 8), (0, 4))


def test_a_preset_beside_fields_with_texts_and_whole_numbers() -> None:
    space = parse_space(["lr-batch", "optim.schedule=choice(linear, 'cosine')", "method.patches=randint(16,64)"], [{}])
    assert [dimension.field for dimension in space] == [
        "optim.lr", "optim.global_batch", "optim.schedule", "method.patches"
    ]  # fmt: skip
    assert space[2].values == ("linear", "cosine")
    assert space[3].values == (16, 64)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("beta_T", "unknown space 'beta_T'.*beta-T"),
        ("optim.lrr=uniform(0,1)", "did you mean 'optim.lr'"),
        ("optim.lr=uniform(1e-3,1e-5)", "from 0.001 to 1e-05 is empty"),
        ("optim.lr=uniform(1,1)", "is empty"),
        ("optim.lr=uniform(1)", "needs two numbers"),
        ("optim.lr=uniform(a,b)", "needs two numbers"),
        ("optim.lr=loguniform(0,1)", "begin above 0"),
        ("optim.lr=normal(0,1)", "normal is no known distribution"),
        ("optim.lr=__import__('os').getcwd()", "no distribution"),
        ("optim.lr=1e-3", "no distribution"),
        ("optim.lr=choice()", "choice is empty"),
        ("optim.lr=choice(1e-3,1e-3)", "names a value twice"),
        ("optim.lr=uniform(-1,1)", "lr > 0"),
        ("optim.global_batch=uniform(1,4.5)", "not a whole number"),
        ("method.patches=randint(2.5,9)", "whole numbers"),
        ("optim.schedule=choice(linear,sudden)", "sudden"),
        ("run_dir=choice(a,b)", "same for all trials"),
        ("evaluation.images=choice(10,20)", "same for all trials"),
    ],
)
def test_an_impossible_space_is_a_sentence(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_space([text], [{}])


def test_a_field_has_one_distribution() -> None:
    with pytest.raises(UserError, match="names method.robust.T twice"):
        parse_space(["beta-T", "method.robust.T=uniform(0.1,0.2)"], [{}])


def test_a_grid_fits_into_the_trials_and_reaches_the_ends() -> None:
    space = parse_space(["beta-T", "method.robust.per_step=choice(all,one)"], [{}])
    points = grid(space, 20)  # 3 x 3 x 2
    assert len(points) == 18 and len({tuple(point.values()) for point in points}) == 18
    assert sorted({point[BETA] for point in points}) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert sorted({point[T] for point in points}) == pytest.approx([0.01, 0.105, 0.2])
    assert len(grid(space, None)) == 18
    with pytest.raises(UserError, match="has 8 points or more, not 7"):
        grid(space, 7)


def test_a_draw_is_a_function_of_seed_and_number() -> None:
    space = parse_space(["beta-T", "taps"], [{}])

    def draw(seed: int, number: int) -> Params:
        return suggest(space, "random", seed, number, [], maximise=True, trials=60)

    draws = [draw(3, number) for number in range(60)]
    assert draws[7] == draw(3, 7)
    assert not {draw[BETA] for draw in draws} & {draw(4, number)[BETA] for number in range(60)}
    assert draw(2**40, 0) != draw(2**40 + 1, 0)  # as large a seed as a training takes
    assert len({draw[BETA] for draw in draws}) == 60
    assert all(1e-5 <= draw[BETA] <= 1e-3 and 0.01 <= draw[T] <= 0.2 for draw in draws)
    assert 15 < sum(draw[BETA] < 1e-4 for draw in draws) < 45  # half of a loguniform range
    assert len({draw["method.robust.taps"] for draw in draws}) == 6


@pytest.mark.parametrize(("trials", "seeds"), [(TRIALS, 4), (30, 1)])
@pytest.mark.parametrize("maximise", [True, False])
def test_optuna_goes_where_the_figures_are_better(maximise: bool, trials: int, seeds: int) -> None:
    space = parse_space(["beta-T", "taps"], [{}])
    peak = {BETA: 3e-4, T: 0.05}

    def figure(params: dict[str, float]) -> float:
        distance = abs(math.log(params[BETA] / peak[BETA])) + 20 * abs(params[T] - peak[T])
        return -distance if maximise else distance

    def average(searcher: str) -> float:
        """Of the second half of each search."""
        values: list[float] = []
        for seed in range(seeds):
            done: list[tuple[Params, float]] = []
            for number in range(trials):
                params = suggest(space, searcher, seed, number, done, maximise=maximise, trials=trials)
                done.append((params, figure(params)))
            values += [abs(value) for _, value in done[trials // 2 :]]
        return statistics.mean(values)

    assert average("optuna") < 0.7 * average("random")


def optuna_draws(good: Callable[[Params], float], seed: int = 0) -> list[Params]:
    """What a search of the default length proposes, one trial after the other, where figures are so good."""
    space = parse_space(["beta-T"], [{}])
    done: list[tuple[Params, float]] = []
    for number in range(TRIALS):
        params = suggest(space, "optuna", seed, number, done, maximise=True, trials=TRIALS)
        done.append((params, good(params)))
    return [params for params, _ in done]


def test_optuna_learns_within_the_default_number_of_trials() -> None:
    def high(params: Params) -> float:
        return params[BETA]

    def low(params: Params) -> float:
        return -params[BETA]

    up, down = optuna_draws(high), optuna_draws(low)
    assert up == optuna_draws(high)  # a function of seed, number and history
    assert not {p[BETA] for p in up} & {p[BETA] for p in optuna_draws(high, seed=1)}
    first = next(number for number in range(TRIALS) if up[number] != down[number])
    assert first <= TRIALS // 2
    assert all(up[number][BETA] != down[number][BETA] for number in range(first, TRIALS))

    def middle(draws: list[Params]) -> float:
        return statistics.median(params[BETA] for params in draws[first:])

    assert middle(up) > 5 * middle(down)


def test_optuna_begins_with_chance_for_at_most_ten_trials() -> None:
    space = parse_space(["beta-T"], [{}])

    def proposal(known: int, best: int) -> Params:
        """The one after `known` trials of a long search, of which number `best` was the best."""
        done = [(suggest(space, "random", 0, k, [], maximise=True, trials=90), float(k == best)) for k in range(known)]
        return suggest(space, "optuna", 0, known, done, maximise=True, trials=90)

    assert proposal(9, 0) == proposal(9, 5)
    assert proposal(10, 0) != proposal(10, 5)


def test_optuna_learns_which_choice_is_good() -> None:
    space = parse_space(["taps"], [{}])
    (taps,) = space
    for best in taps.values[1], taps.values[-1]:
        done = [({taps.field: value}, float(value == best)) for value in taps.values * 2]
        drawn = [suggest(space, "optuna", 0, 12 + k, done, maximise=True, trials=30)[taps.field] for k in range(8)]
        assert drawn.count(best) > 4
