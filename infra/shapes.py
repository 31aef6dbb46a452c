"""What JSON that is read must look like, said by dataclasses and type hints: what is else is refused before it is used."""

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def read_shape(kind: type[T], text: str | bytes) -> T:
    """JSON as a value of that kind: a dataclass (whose fields with defaults may be absent), tuple[X, ...], tuple[X, Y],
    dict[str, X], X | None, int, float, str, bool or Any.

    ValueError says in one line what is wrong and where, such as "shards.3.bytes is not a whole number".
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return typing.cast(T, shaped(kind, value))


def shaped(kind: Any, value: Any, where: str = "") -> Any:
    """What JSON gave as a value of that kind, as `read_shape` says. where: the place that a ValueError names."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        (other,) = (each for each in arguments if each is not types.NoneType)
        return None if value is None else shaped(other, value, where)
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type, kind), _of(dict, value, "an object", where), where)
    if origin is dict:
        items = _of(dict, value, "an object", where)
        return {name: shaped(arguments[1], item, _below(where, name)) for name, item in items.items()}
    if origin is tuple:
        listed = _of(list, value, "a list", where)
        kinds = arguments[:1] * len(listed) if arguments[1:] == (...,) else arguments
        if len(kinds) != len(listed):
            raise _wrong(where, f"a list of {len(kinds)}")
        return tuple(
            shaped(each, item, _below(where, i)) for i, (each, item) in enumerate(zip(kinds, listed, strict=True))
        )
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise _wrong(where, _NAMES[float]) from None
    if type(value) is not kind or (kind is float and not math.isfinite(value)):  # True is an int, for Python
        raise _wrong(where, _NAMES[kind])
    return value


def _object(kind: type, items: dict[str, Any], where: str) -> Any:
    hints, fields = _hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    for name in sorted(items.keys() - fields.keys()):
        raise ValueError(f"{_below(where, name)} is unknown")
    for name, field in fields.items():
        if name not in items and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_below(where, name)} is missing")
    return kind(**{name: shaped(hints[name], item, _below(where, name)) for name, item in items.items()})


_hints = functools.cache(typing.get_type_hints)


def _of(kind: type[T], value: object, name: str, where: str) -> T:
    if not isinstance(value, kind):
        raise _wrong(where, name)
    return value


def _wrong(where: str, expected: str) -> ValueError:
    return ValueError(f"{where or 'it'} is not {expected}")


def _below(where: str, name: object) -> str:
    shown = str(name)[:60]
    return f"{where}.{shown}" if where else shown
