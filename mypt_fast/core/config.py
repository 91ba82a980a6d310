"""GPTConfig as MyPT's scripts know it: a dataclass of 26 fields over the engine's ModelConfig."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mypt_fast import console
from mypt_fast.config import ModelConfig
from mypt_fast.schema import field_names, shown

C = TypeVar("C", bound="GPTConfig")
_NAMES = tuple(field_names(ModelConfig))
MYPT_FIELDS = _NAMES[: _NAMES.index("epoch_drop_last") + 1]
OUR_FIELDS = _NAMES[len(MYPT_FIELDS) :]  # what only old weights need: not among MyPT's fields
STRICT_COMPAT = "MYPT_STRICT_COMPAT"
_SHOWN = (
    "batch_size", "block_size", "vocab_size", "n_embd", "n_head", "n_layer", "dropout", "bias",
    "device", "use_loss_mask", "tie_weights", "save_dtype", "batch_sampling_mode",
)  # fmt: skip


def strict_compat() -> bool:
    """Whether to do as MyPT does where that is a defect a script may count on."""
    return os.environ.get(STRICT_COMPAT, "") not in ("", "0")


@dataclass(init=False)
class GPTConfig(ModelConfig):
    """The fields of config.json (MyPT specification 1.2), by position or by name.

    Values are taken as they come: MyPT validates none of them here.

    Raises:
        TypeError: for an unknown name, as any dataclass does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(MYPT_FIELDS):
            raise TypeError(f"GPTConfig takes at most {len(MYPT_FIELDS)} values; found {len(args)}")
        given = dict(zip(MYPT_FIELDS, args, strict=False))
        for name, value in kwargs.items():
            if name not in _NAMES:
                raise TypeError(f"GPTConfig() got an unexpected keyword argument {shown(name)}")
            if name in given:
                raise TypeError(f"GPTConfig() got multiple values for argument {shown(name)}")
            given[name] = value
        for name in MYPT_FIELDS:
            setattr(self, name, given.get(name, getattr(ModelConfig, name)))
        for name in OUR_FIELDS:
            if given.get(name, getattr(ModelConfig, name)) != getattr(ModelConfig, name):
                setattr(self, name, given[name])
        if self.device is None:
            self.device = default_device()

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Build from a dict; keys that are no fields are dropped."""
        return cls(**{k: v for k, v in values.items() if k in _NAMES})

    def to_dict(self) -> dict[str, Any]:
        """Return MyPT's fields in its order; behind them ours, only where one is set."""
        shown_too = [name for name in OUR_FIELDS if name in self.__dict__]
        values = {name: getattr(self, name) for name in (*MYPT_FIELDS, *shown_too)}
        if self.device is not None:  # scripts also set a torch.device, which is no JSON
            values["device"] = str(self.device)
        return values

    @classmethod
    def load_json(cls: type[C], path: str | os.PathLike[str]) -> C:
        """Build from a JSON file; keys that are no fields are dropped."""
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the fields as JSON; the folder is made where it is missing."""
        parent = os.path.dirname(path)
        if parent or strict_compat():  # MyPT asks the system to make '', which it cannot
            os.makedirs(parent, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=2), "utf-8")
        console.say(f"Saved config to {path}")

    def __str__(self) -> str:
        return ", ".join(f"{name}:{getattr(self, name)}" for name in _SHOWN)


for _name in OUR_FIELDS:  # dataclasses.fields() and asdict() give what MyPT's GPTConfig(**d) takes
    del GPTConfig.__dataclass_fields__[_name]
GPTConfig.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # not *args, **kwargs
    [inspect.Parameter(
        field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default,
        annotation=field.type,
    ) for field in fields(GPTConfig)]
)  # fmt: skip


def default_device() -> str:
    """The GPU where torch can use one, else the CPU; asked when a config is made."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
