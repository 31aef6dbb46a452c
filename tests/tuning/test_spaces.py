"""What a search varies: parsing, checks against the configuration tree, grids."""

import pytest

from infra.errors import UserError
from tuning.spaces import Dimension, grid, parse_space

BETA, T = "method.robust.beta", "method.robust.T"


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
        ("optim.lr=choice({[]:1})", "no distribution"),
        (f"optim.lr=uniform(0,{10**400})", "no distribution"),
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
    assert points[BETA] == pytest.approx([1e-5, 1e-4, 1e-3]) and points[T] == pytest.approx([0.01, 0.105, 0.2])
    assert points["method.robust.per_step"] == ["all", "one"]
    assert grid(space, None) == points
    with pytest.raises(UserError, match="has 8 points or more, not 7"):
        grid(space, 7)
    whole = parse_space(["method.patches=randint(2,5)"], [{}])
    assert grid(whole, 3) == {"method.patches": [2, 4, 5]} and grid(whole, 9) == {"method.patches": [2, 3, 4, 5]}
