"""Settings as dataclass fields: how one is declared, and how JSON is checked against them.

Standard library only: a wrong key is reported before torch is imported.
"""

import dataclasses
import difflib
import math
import operator
import reprlib
import sys
import types
import typing
from dataclasses import field
from typing import Any, TypeVar

from mypt_fast.errors import ConfigError

T = TypeVar("T")


def opt(
    default: Any,
    help: str,
    *,
    lo: float | None = None,
    hi: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    role: str = "run",
    flag: bool = True,
) -> Any:
    """Declare a setting: default, help, inclusive (`lo`, `hi`) or open (`above`, `below`) range."""
    metadata = {
        "help": help, "lo": lo, "hi": hi, "above": above, "below": below,
        "choices": choices, "role": role, "flag": flag,
    }  # fmt: skip
    if isinstance(default, (dict, list)):
        raise TypeError("mutable default")
    return field(default=default, metadata=metadata)


def arch(default: Any, help: str, **limits: Any) -> Any:
    """Declare a setting that fixes the shape or meaning of the weights."""
    return opt(default, help, role="arch", **limits)


def field_names(cls: type, role: str | None = None) -> list[str]:
    """Names of the settings of a section, all or of one role (`arch` or `run`)."""
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if role is None or f.metadata.get("role", "run") == role]


def build(cls: type[T], raw: object, where: str, prefix: str = "") -> T:
    """Check `raw` against the dataclass `cls` and build it; raises ConfigError."""
    if not isinstance(raw, dict):
        raise _wrong_type(f"{where}: {prefix.rstrip('.') or 'file'}", "an object", raw)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in raw.items():
        if key not in fields:
            raise unknown_key(key, where, list(fields), prefix)
        f = fields[key]
        values[key] = typed(value, f.type, f"{where}: {prefix}{key}", dict(f.metadata))
    return cls(**values)


def typed(value: Any, kind: Any, path: str, limits: dict[str, Any]) -> Any:
    """Check a JSON value against a type and its limits and return it; raises ConfigError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kind = next(a for a in args if a is not type(None))
        return typed(value, kind, path, limits)
    if dataclasses.is_dataclass(kind):
        where, _, key = path.rpartition(": ")  # a file's name may hold a colon, a key path does not
        return build(typing.cast(type, kind), value, where, key + ".")
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong_type(path, "a list", value)
        return tuple(typed(v, args[0], f"{path}[{i}]", {}) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(path, "an object of strings", value)
        return {k: typed(v, args[1], f"{path}[{shown(k)}]", {}) for k, v in value.items()}
    return _in_range(_scalar(value, kind, path), path, limits)


def _scalar(value: Any, kind: type, path: str) -> Any:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ConfigError(f"{path}: expected a number", f"found {shown(value)}")
        if not math.isfinite(value):
            raise ConfigError(f"{path}: expected a finite number", f"found {value}")
        return value  # 1 stays 1: MyPT tells a share of steps from a count by the JSON type
    if kind is int and number and isinstance(value, int):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise ConfigError(f"{path}: expected text", f"found {shown(value)}")
        return value
    raise _wrong_type(path, names[kind], value)


def _in_range(value: Any, path: str, limits: dict[str, Any]) -> Any:
    choices = limits.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{path}: {not_among(value, choices)}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and any(
        limits.get(key) is not None and not holds(value, limits[key]) for key, _, holds in _RULES
    ):
        cure = f"use {allowed(limits)}"
        raise ConfigError(f"{path} is out of range", f"found {shown(value)}", cure)
    return value


_RULES = (
    ("lo", ">=", operator.ge),
    ("above", ">", operator.gt),
    ("hi", "<=", operator.le),
    ("below", "<", operator.lt),
)


def allowed(limits: Any) -> str:
    """Describe a range in words: '>= 1 and <= 1024'."""
    rules = [(sign, limits[k]) for k, sign, _ in _RULES if limits.get(k) is not None]
    return " and ".join(f"{sign} {_number(n)}" for sign, n in rules)


def _number(n: float) -> str:
    if not isinstance(n, int):
        return f"{n:g}"
    is_power = n >= 1 << 20 and n & (n - 1) == 0
    return f"2^{n.bit_length() - 1}" if is_power else str(n)


def not_among(value: str, choices: tuple[str, ...]) -> str:
    """Say that `value` is none of the choices, and which one it is close to."""
    near = difflib.get_close_matches(value.lower()[:60], choices, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"expected one of {', '.join(choices)}; found {shown(value)}{hint}"


def shown(value: object) -> str:
    """Show a value of a file in a message: one short line whatever it holds."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    short.maxlevel = 2
    return "null" if value is None else short.repr(value)


def unknown_key(key: str, where: str, known: list[str], prefix: str = "") -> ConfigError:
    """The error of a key that is none of the known ones; it names the nearest."""
    near = difflib.get_close_matches(key.lower().replace("-", "_")[:60], known, 1)
    if near:
        cure = f"the nearest valid key is '{prefix}{near[0]}'"
    elif len(known) <= 12:
        cure = f"valid keys: {', '.join(sorted(known))}"
    else:
        cure = "`mypt-fast train --help` lists the settings, by the same names"
    return ConfigError(f"{where}: unknown key {shown(prefix + key)}", cure=cure)


def _wrong_type(path: str, wanted: str, found: object) -> ConfigError:
    return ConfigError(f"{path}: expected {wanted}", f"found {shown(found)}")
