"""Dataclass fields as flags: the flag's name is the JSON key is the field.

Flags default to SUPPRESS, so a flag that was typed differs from one that was not.
"""

import argparse
import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any

from mypt_fast.schema import allowed, not_among, shown

TRUE, FALSE = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")


class Switch(argparse.Action):
    """`--x`, `--x true|false` and `--no_x` for one boolean."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        names = [*option_strings, *("--no_" + s[2:] for s in option_strings)]
        kwargs.setdefault("metavar", "BOOL")
        super().__init__(names, dest, nargs="?", **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the boolean; an unknown word is a usage error."""
        word = "true" if values is None else str(values).lower()
        if word not in TRUE + FALSE:
            parser.error(f"{option_string}: expected true or false; found {shown(values)}")
        negated = (option_string or "").startswith("--no_")
        setattr(namespace, self.dest, (word in TRUE) is not negated)


def add_section(
    parser: argparse.ArgumentParser, cls: Any, title: str, *, role: str | None = None
) -> None:
    """Add one flag per field of the dataclass `cls` (of one role only, if given)."""
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(cls):
        meta = f.metadata
        if not meta.get("flag", True) or (role and meta.get("role") != role):
            continue
        add_field(group, f)


def add_field(group: Any, f: Any) -> None:
    """Add the flag of one field."""
    meta, kind = f.metadata, _plain_type(f.type)
    limits = allowed(meta) if not meta.get("choices") else ""
    default = "" if f.default is None else f" (default: {f.default})"
    text = (meta["help"] + (f" [{limits}]" if limits else "") + default).replace("%", "%%")
    options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": f.name}
    if kind is bool:
        group.add_argument(f"--{f.name}", action=Switch, **options)
        return
    if choices := meta.get("choices"):
        options |= {"type": _one_of(choices), "metavar": "{" + ",".join(choices) + "}"}
    else:
        parse = _number if f.name == "warmup_iters" else {int: _whole, float: _real}.get(kind, kind)
        options |= {"type": parse, "metavar": _letter(kind)}
    group.add_argument(f"--{f.name}", **options)


def given(args: argparse.Namespace, cls: Any) -> dict[str, Any]:
    """Return the fields of `cls` that were typed on the command line."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in vars(args).items() if k in names}


def _plain_type(annotation: Any) -> Any:
    args = [a for a in typing.get_args(annotation) if a is not type(None)]
    return args[0] if args else annotation


def _letter(kind: type) -> str:
    return {int: "N", float: "X", str: "NAME"}.get(kind, "VALUE")


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(not_among(text, choices))
        return text

    return parse


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as e:
        text = f"expected a whole number; found {shown(text)}"
        raise argparse.ArgumentTypeError(text) from e


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"expected a number; found {shown(text)}") from e


def _number(text: str) -> int | float:
    # 0.05 is a share of max_iters, 500 a count of steps: keep the difference MyPT reads from it
    return _whole(text) if text.strip("+-").isdigit() else _real(text)
