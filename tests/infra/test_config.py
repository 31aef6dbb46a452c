"""The configuration machinery on a small tree of its own."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from infra.config import (
    FORMAT,
    OptionParser,
    add_options,
    build,
    completed,
    differing,
    flatten,
    leaves,
    option,
    read_yaml,
    to_yaml,
)
from infra.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Oven:
    heat: float = option(180.0, "degrees; 100 % is too much", flag="--heat")
    racks: tuple[int, ...] = option((1, 3), "racks in use")
    fan: bool = option(True, "blow")
    mode: str = option("bake", "what it does", choices=("bake", "grill"))
    probe: float | None = option(None, "degrees inside, if measured", resumable=True)

    def __post_init__(self) -> None:
        if self.heat > 300:
            raise UserError("the oven melts: give 300 degrees or less")


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    cooks: int = option(1, "people", flag="--cooks")
    open_late: bool = option(False, "after ten")
    oven: Oven = field(default_factory=Oven)


def test_leaves_are_named_by_their_path() -> None:
    names = [name for name, _, _ in leaves(Kitchen)]
    assert names == ["cooks", "open_late", "oven.heat", "oven.racks", "oven.fan", "oven.mode", "oven.probe"]
    assert list(flatten(Kitchen())) == names


def test_later_layers_win() -> None:
    built = build(
        Kitchen, {"cooks": 2, "oven.heat": 200, "oven.fan": False}, {"oven.heat": 220, "cooks": 3}, {"cooks": 4}
    )
    assert built == Kitchen(cooks=4, oven=Oven(heat=220.0, fan=False))


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("cooks", "3", 3),
        ("cooks", 3.0, 3),
        ("oven.heat", "2e2", 200.0),
        ("oven.heat", 200, 200.0),
        ("oven.racks", "0,4,8", (0, 4, 8)),
        ("oven.racks", "0 4, 8", (0, 4, 8)),
        ("oven.racks", [2], (2,)),
        ("oven.racks", "", ()),
        ("oven.fan", "False", False),
        ("oven.fan", True, True),
        ("oven.probe", "none", None),
        ("oven.probe", None, None),
        ("oven.probe", "60", 60.0),
    ],
)
def test_values_become_what_the_field_says(name: str, given: Any, value: Any) -> None:
    result = flatten(build(Kitchen, {name: given}))[name]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("cooks", "many", "cooks = 'many' is not a whole number"),
        ("cooks", 1.5, "cooks = 1.5 is not a whole number"),
        ("cooks", float("inf"), "cooks = inf is not a whole number"),
        ("cooks", True, "cooks = True is not a whole number"),
        ("cooks", 10**400, "cooks = 10+ is not a whole number"),
        ("cooks", None, "cooks = None is not a whole number"),
        ("oven.heat", "hot", "oven.heat = 'hot' is not a number"),
        ("oven.heat", "nan", "oven.heat = 'nan' is not a number"),
        ("oven.heat", "inf", "oven.heat = 'inf' is not a number"),
        ("oven.racks", 4, "oven.racks = 4 is not a list of numbers such as 0,4,8"),
        ("oven.racks", "0,x", "oven.racks = '0,x' is not a list of numbers"),
        ("oven.fan", "yes", "oven.fan = 'yes' is not true or false"),
        ("oven.fan", 1, "oven.fan = 1 is not true or false"),
        ("oven.mode", ["bake"], r"oven.mode = \['bake'\] is not text"),
        ("oven.mode", "boil", "oven.mode = 'boil' is unknown: choose one of bake, grill"),
        ("oven.probe", "warm", "oven.probe = 'warm' is not a number"),
    ],
)
def test_wrong_values_are_named(name: str, given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(Kitchen, {name: given})


def test_the_classes_own_checks_are_heard() -> None:
    with pytest.raises(UserError, match="melts"):
        build(Kitchen, {"oven.heat": 301})


@pytest.mark.parametrize(("name", "near"), [("oven.heta", "oven.heat"), ("coks", "cooks")])
def test_an_unknown_name_brings_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"unknown option '{name}' \(did you mean '{near}'\?\)"):
        build(Kitchen, {name: 1})


def test_an_unknown_name_that_resembles_nothing() -> None:
    with pytest.raises(UserError, match="unknown option 'zzz': see --help"):
        build(Kitchen, {"zzz": 1})


def test_yaml_gives_back_what_was_written(tmp_path: Path) -> None:
    kitchen = build(Kitchen, {"oven.racks": (), "oven.heat": 1e-7, "oven.fan": False, "cooks": 12})
    path = tmp_path / "kitchen.yaml"
    path.write_text(to_yaml(flatten(kitchen)))
    assert build(Kitchen, read_yaml(path)) == kitchen
    assert list(read_yaml(path)) == list(flatten(kitchen))


def test_yaml_takes_sections_and_dotted_names(tmp_path: Path) -> None:
    path = tmp_path / "kitchen.yaml"
    path.write_text("cooks: 2\noven.heat: 2e-4\noven:\n  racks: [5]\n  probe: null\n")
    assert build(Kitchen, read_yaml(path)) == Kitchen(cooks=2, oven=Oven(heat=2e-4, racks=(5,)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"cooks: [1", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- cooks", "holds no options"),
        (b"", "holds no options"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "kitchen.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} {words}"):
        read_yaml(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"cannot read the configuration {tmp_path}/none \(No such file"):
        read_yaml(tmp_path / "none")


def parser() -> OptionParser:
    made = OptionParser(prog="cook", allow_abbrev=False)
    add_options(made, Kitchen, flatten(build(Kitchen, {"oven.heat": 250})))
    return made


def test_every_leaf_is_an_argument_and_absent_ones_leave_no_trace() -> None:
    assert parser().options([]) == {}
    given = parser().options(["--heat", "1", "--oven.racks", "1,2", "--open-late", "true", "--cooks", "9"])
    assert given == {"oven.heat": "1", "oven.racks": "1,2", "open_late": "true", "cooks": "9"}
    assert parser().options(["--oven.heat", "1"]) == {"oven.heat": "1"}


def test_help_shows_defaults_choices_and_kinds() -> None:
    text = " ".join(parser().format_help().split())
    assert "--heat X, --oven.heat X degrees; 100 % is too much [250.0]" in text
    assert "--oven.racks N,N,… racks in use [1 3]" in text
    assert "--oven.mode {bake,grill} what it does [bake]" in text
    assert text.endswith("--oven.probe X degrees inside, if measured")


def test_what_differs_leaves_the_resumable_out_and_sees_no_difference_between_list_and_tuple() -> None:
    before = {**flatten(Kitchen()), "oven.racks": [1, 3], "oven.probe": 5.0}
    assert differing(Kitchen, before, flatten(Kitchen())) == []
    assert differing(Kitchen, before, flatten(Kitchen(cooks=2, oven=Oven(fan=False)))) == ["cooks", "oven.fan"]


@dataclass(frozen=True, kw_only=True)
class LaterOven(Oven):
    steam: bool = option(True, "humid; ovens had none", before=False)
    shelves: tuple[int, ...] = option((), "those in use", formerly="boards")
    light: str = option("warm", "inside")


@dataclass(frozen=True, kw_only=True)
class LaterKitchen:
    oven: LaterOven = field(default_factory=LaterOven)
    staff: int = option(1, "people", formerly="cooks")


def test_what_an_earlier_version_saved_means_what_it_meant() -> None:
    saved = {"cooks": 3, "oven.boards": [2], "oven.heat": 200.0, "oven.coal": 5}
    whole = completed(LaterKitchen, saved)
    assert whole == {
        "staff": 3, "oven.shelves": [2], "oven.heat": 200.0, "oven.steam": False, "oven.light": "warm", "oven.coal": 5,
        **{name: value for name, value in flatten(LaterKitchen()).items() if name.split(".")[-1] in ("racks", "fan", "mode",
            "probe")},
    }  # fmt: skip
    now = flatten(build(LaterKitchen, {"staff": 3, "oven.shelves": "2", "oven.heat": 200, "oven.steam": False}))
    assert differing(LaterKitchen, whole, now) == []
    assert differing(LaterKitchen, whole, now | {"oven.steam": True}) == ["oven.steam"]


def test_a_former_name_in_a_file_of_options_is_todays() -> None:
    assert build(LaterKitchen, {"cooks": 2, "oven.boards": [5]}) == build(
        LaterKitchen, {"staff": 2, "oven.shelves": [5]}
    )
    with pytest.raises(UserError, match="unknown option 'boards'"):
        build(LaterKitchen, {"boards": [5]})


@pytest.mark.parametrize("format", [FORMAT + 1, "new", 1.5])
def test_a_format_that_this_version_cannot_read_is_named(tmp_path: Path, format: object) -> None:
    path = tmp_path / "kitchen.yaml"
    path.write_text(f"format: {format}\ncooks: 2\n")
    with pytest.raises(
        UserError, match=f"kitchen.yaml has the format {format}, and this version reads up to {FORMAT}: use"
    ):
        read_yaml(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--heta", "1"], r"unknown option '--heta' \(did you mean '--heat'\?\): see --help"),
        (["--oven.heta=1"], r"unknown option '--oven.heta' \(did you mean '--oven.heat'\?\)"),
        (["supper"], "unknown option 'supper': see --help"),
        (["--heat"], "argument --heat/--oven.heat: expected one argument: see --help"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_explained(line: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parser().options(line)


def laughs(levels: int) -> str:
    return "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, levels))


@pytest.mark.parametrize(
    "text",
    [
        laughs(10),
        laughs(30).replace("[", "{a: ", 1).replace("1, 2]", "1}"),
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}\n" for n in range(1, 30)),
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30)),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 1000,
        "when: 2026-13-01",
    ],
    ids=["lists", "more lists", "sections", "merged", "itself", "itself below", "deep", "no date"],
)
def test_yaml_that_explodes_is_refused_before_it_does(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"x.yaml is not valid YAML"):
        read_yaml(tmp_path / "x.yaml")
    assert time.monotonic() - began < 5


def test_yaml_with_a_few_aliases_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        f"base: &base {{lr: 1}}\noptim: {{<<: *base, steps: [1, 2]}}\nagain: *base\n{laughs(4)}"
    )
    assert read_yaml(tmp_path / "x.yaml").items() >= {"optim.lr": 1, "again.lr": 1}.items()
