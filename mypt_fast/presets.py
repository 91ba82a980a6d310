"""Find and read preset files: the user's own path first, then the shipped `configs/`."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mypt_fast.config import ModelConfig, TrainConfig, split_flat
from mypt_fast.errors import ConfigError
from mypt_fast.schema import shown

MAX_JSON_BYTES = 1 << 20  # a config is a page; anything larger is the wrong file


@dataclass(frozen=True)
class Preset:
    """One preset file, checked."""

    path: Path
    name: str
    description: str
    model: ModelConfig
    train: TrainConfig
    given: frozenset[str]  # keys present in the file, by field name


def shipped_dir() -> Path:
    """Return the folder of the shipped presets: in the wheel, else beside the package."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped() -> list[Path]:
    """List the shipped preset files, sorted by name, base presets last."""
    root = shipped_dir()
    return sorted(root.glob("*.json")) + sorted((root / "base").glob("*.json"))


def read_json(path: Path, kind: str = "config", max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a small JSON file.

    Raises:
        ConfigError: if it is missing, unreadable, over `max_bytes`, not UTF-8, not JSON, or names
            a key twice.
    """

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique: dict[str, Any] = {}
        for key, value in pairs:
            if key in unique:
                text = f"{path}: key {shown(key)} is given twice"
                raise ConfigError(text, cure="keep one of them")
            unique[key] = value
        return unique

    try:
        with open(path, "rb") as f:
            data = f.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ConfigError(f"{path}: a {kind} is at most {max_bytes >> 20} MiB", "it is larger")
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=no_twins)
    except OSError as e:
        raise ConfigError(f"cannot read {kind} {path}", e.strerror or str(e)) from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text", f"byte {e.start}") from e
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}: not valid JSON", f"line {e.lineno}: {e.msg}") from e
    except ValueError as e:  # CPython refuses to read an integer of thousands of digits
        raise ConfigError(f"{path}: not valid JSON", "a number with thousands of digits") from e
    except RecursionError as e:
        raise ConfigError(f"{path}: nested too deeply", cure="presets are flat objects") from e


def find(name: str) -> Path:
    """Resolve what the user typed: a path, or the name of a shipped preset.

    `configs/500M_1024.json`, `500M_1024.json` and `500M_1024` all find the shipped file when
    there is no such file in the working directory.
    """
    path, root = Path(name), shipped_dir()
    try:
        if path.exists() and not path.is_dir():  # a pipe is fine: --config <(jq ...)
            return path
    except OSError as e:
        raise ConfigError(f"cannot read config {shown(name)}", e.strerror or str(e)) from e
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    if not path.is_absolute() and parts and ".." not in parts:
        last = parts[-1].removesuffix(".json") + ".json"  # 1.3B_1024 has a "suffix" of its own
        candidate = root.joinpath(*parts[:-1], last)
        if candidate.is_file():
            return candidate
    known = {p.stem: p.relative_to(root).as_posix().removesuffix(".json") for p in shipped()}
    stem = path.name.removesuffix(".json")
    near = [s for s in known if stem and s.lower().startswith(stem.lower())]
    near = near or difflib.get_close_matches(stem, known, 1)
    cure = f"the nearest preset is '{known[near[0]]}'" if near else "`mypt-fast configs` lists them"
    found = "it is a folder" if path.is_dir() else "no such file, and no preset of that name"
    raise ConfigError(f"no config file {shown(name)}", found, cure)


def load(name: str | Path) -> Preset:
    """Read and check a preset; raises ConfigError with one line that names the key."""
    path = find(str(name))
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected one JSON object", f"found {shown(raw)}")
    model, train, display = split_flat(raw, str(path))
    given = frozenset("save_interval" if k == "save_every" else k for k in raw)
    title = display.get("name") or path.stem
    return Preset(path, title, display.get("description", ""), model, train, given)
