"""Configuration as one tree of frozen dataclasses: each leaf has a default, a help text and perhaps a short flag.

Order of precedence: the dataclass defaults < a preset < a YAML file < the command line. Inside this module a
configuration travels as a flat mapping of dotted names ("optim.lr") to values, which is also what MLflow gets.

What one version saves, later versions read: `before` and `formerly` of an option say what its absence means, `completed`
applies them, and a file says its FORMAT, which is raised when older versions would misread it.
"""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from infra.errors import UserError
from infra.redaction import holds_secret

Config = TypeVar("Config")

FORMAT = 1  # of saved configurations and of checkpoints; what has no number is older, and read all the same
MAX_VALUES = 100_000  # in a file
_FORMAT_KEY = "format"  # in a file, beside the options
_DEFAULT = object()


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    flag: str | None = None,
    choices: tuple[Any, ...] | None = None,
    resumable: bool = False,
    adjustable: bool = False,
    before: Any = _DEFAULT,
    formerly: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line option (`--section.field`, and `flag` as a short form).

    resumable: may differ when an existing run is continued (it does not change what is learned).
    adjustable: a search may change it in the middle of a run. Nothing that is kept (networks, memories, buffers) and no
    length or start in the schedule depends on it.
    before: the value that stands for what was done before there was this option, where that is not its default.
    formerly: the field's name in this section until it was renamed, under which files may still have it.
    """
    metadata = {
        "help": help, "flag": flag, "choices": choices, "resumable": resumable, "adjustable": adjustable,
        "before": default if before is _DEFAULT else before, "formerly": formerly,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(dotted name, field, type) of every leaf of a configuration class."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from leaves(typing.cast(type, kind), name + ".")
        else:
            yield name, field, kind


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 2e-4, …}: every leaf of a configuration by its dotted name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def build(cls: type[Config], *layers: Mapping[str, Any]) -> Config:
    """A configuration from flat layers, later ones winning.

    Raises UserError for an unknown name (with the nearest known one), a value of the wrong type or outside its
    choices, and whatever the classes' own checks find impossible.
    """
    known = {name: (field, kind) for name, field, kind in leaves(cls)}
    renamed = _renamed(cls)
    values: dict[str, Any] = {}
    for layer in layers:
        check_names(cls, (renamed.get(name, name) for name in layer))
        for name, value in layer.items():
            name = renamed.get(name, name)
            field, kind = known[name]
            values[name] = _coerce(name, value, kind, field.metadata.get("choices"))
    return _assemble(cls, values)


def check_names(cls: type, names: Iterable[str]) -> None:
    """UserError, with the nearest known one, for a name that is no leaf of a configuration class."""
    known = {name: field for name, field, _ in leaves(cls)}
    for name in names:
        if name not in known:
            raise UserError(f"unknown option {name!r}{_nearest(name, known)}: see --help for all options")


def _assemble(cls: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            arguments[field.name] = _assemble(typing.cast(type, kind), values, name + ".")
        elif name in values:
            arguments[field.name] = values[name]
    return cls(**arguments)


def completed(cls: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration that some version saved whole, as this version would have saved it: a renamed option has its
    new name, one that is newer has the value that stands for its absence. Names unknown to this version stay."""
    renamed = _renamed(cls)
    before = {name: field.metadata["before"] for name, field, _ in leaves(cls)}
    return before | {renamed.get(name, name): value for name, value in saved.items()}


def _renamed(cls: type) -> dict[str, str]:
    """Today's dotted names by the former ones."""
    former = ((name, field.metadata.get("formerly")) for name, field, _ in leaves(cls))
    return {name.removesuffix(name.rpartition(".")[2]) + old: name for name, old in former if old}


def check_format(what: str, format: object) -> None:
    """UserError for a format that this version cannot read; None, where there is no number, is the oldest."""
    if format is not None and not (isinstance(format, int) and format <= FORMAT):
        raise UserError(f"{what} has the format {format}, and this version reads up to {FORMAT}: "
                        "use the version that wrote it, or a later one")  # fmt: skip


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _coerce(name: str, value: Any, kind: Any, choices: tuple[Any, ...] | None) -> Any:
    """A value from YAML or the command line as the field's type."""
    if choices and "true" in choices:  # a switch that has more choices than on and off
        value = str(value).lower()
    try:
        result = _convert(value, kind)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} = {value!r} is not {_describe(kind)}: correct it or leave it out") from None
    if isinstance(value, str) and holds_secret(value):
        raise UserError(f"{name} holds a password or a key, and options are written down with the run: take it out, and give it "
                        "by an environment variable, such as AWS_SECRET_ACCESS_KEY")  # fmt: skip
    if choices is not None and result is not None and result not in choices:
        raise UserError(f"{name} = {result!r} is unknown: choose one of {', '.join(map(str, choices))}")
    return result


def _convert(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return _convert(value, kind)
    if origin is tuple:
        items = value.replace(",", " ").split() if isinstance(value, str) else list(value)
        return tuple(_convert(item, arguments[0]) for item in items)
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool | list) or value is None:
        raise TypeError
    if kind is not str and not math.isfinite(float(value)):  # a check such as T <= 0 lets nan pass
        raise ValueError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return kind(value)


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    arguments = [a for a in typing.get_args(kind) if a not in (type(None), ...)]
    if typing.get_origin(kind) is tuple:
        return f"a list of {names[arguments[0]].split()[-1]}s such as 0,4,8"
    return names.get(kind) or " or ".join(_describe(a) for a in arguments)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of nested sections or dotted names as a flat layer, its format number taken off. UserError if it cannot
    be read as one."""
    try:
        tree = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path} ({error.strerror}): check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: no UTF-8, or no date, such as 2026-13-01
        raise UserError(
            f"{path} is not valid YAML: correct it, or start from the config.yaml of a run folder"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no options: it should have lines such as 'optim: {{lr: 0.0002}}'")
    check_format(str(path), tree.pop(_FORMAT_KEY, None))
    return dict(flat_items(tree))


def load_yaml(text: str) -> Any:
    """YAML of at most MAX_VALUES values: a few lines of aliases to lists of aliases can stand for billions. ValueError for
    more, RecursionError and what YAML raises for what is none."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MAX_VALUES:
            raise ValueError("too many values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many there are below a node, each counted as often as aliases repeat it; infinitely many where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        below: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in below for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def flat_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings by its dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(flat: Mapping[str, Any]) -> str:
    """A flat layer as YAML with one section per prefix, under the format number; `read_yaml` gives the layer back."""
    tree: dict[str, Any] = {_FORMAT_KEY: FORMAT}
    for name, value in flat.items():
        node = tree
        *sections, leaf = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(tree, sort_keys=False)


def as_arguments(flat: Mapping[str, Any]) -> list[str]:
    """A flat layer as options of a command line, which give the layer back."""
    return [f"--{name.replace('_', '-')}={_as_text(value)}" for name, value in flat.items()]


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors, with the nearest option where one is unknown."""

    def options(self, arguments: Sequence[str]) -> dict[str, Any]:
        """What a command line gives, by destination."""
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = self._option_string_actions
            raise UserError(f"unknown option {name!r}{_nearest(name, known)}: see --help for all options")
        return vars(given)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see --help for all options")


def add_options(parser: argparse.ArgumentParser, cls: type, defaults: Mapping[str, Any]) -> None:
    """One argument per leaf, in a group per section; an absent argument leaves no attribute in the namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field, kind in leaves(cls):
        section = name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "job")
        flags = [field.metadata["flag"]] if field.metadata.get("flag") else []
        if f"--{name}" not in flags and (section or not flags):
            flags.append(f"--{name.replace('_', '-')}")
        choices = field.metadata.get("choices")
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _metavar(kind)
        default = defaults.get(name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = field.metadata.get("help", "").replace("%", "%%") + ("" if shown is None else f" [{shown}]")
        groups[section].add_argument(*flags, dest=name, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "N,N,…" if typing.get_args(kind)[0] is int else "X,X,…"
    kinds = (kind, *typing.get_args(kind))
    for candidate, shown in ((bool, "BOOL"), (int, "N"), (float, "X")):
        if candidate in kinds:
            return shown
    return "TEXT"


def differing(cls: type, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ between two whole flat configurations, except those marked `resumable`."""
    return [name for name in _fixed(cls) if _plain(before.get(name)) != _plain(now.get(name))]


def fixed(config: Config) -> dict[str, Any]:
    """The flat options of a configuration that decide what comes of it: all but those marked `resumable`."""
    flat = flatten(config)
    return {name: flat[name] for name in _fixed(type(config))}


def _fixed(cls: type) -> list[str]:
    return [name for name, field, _ in leaves(cls) if not field.metadata.get("resumable")]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
