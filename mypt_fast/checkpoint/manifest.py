"""What a bundle directory says about itself, read without torch: JSON members, manifest, hashes.

`inspect` answers from here in a blink; `bundle` adds the tensors.
"""

import difflib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mypt_fast.config import ARCHITECTURE_KEYS, ModelConfig
from mypt_fast.errors import CheckpointError, ConfigError, IntegrityError
from mypt_fast.presets import read_json
from mypt_fast.publish import clean_stale
from mypt_fast.schema import build, field_names, shown

MANIFEST_SCHEMA = 2
SEAL = "sealed"  # the manifest's hash of itself
MAX_MEMBER_BYTES = 64 << 20  # a trained BPE's merges take a few MiB
TENSOR_FILES = ("model.pt", "optimizer.pt")
JSON_FILES = ("config.json", "tokenizer.json", "training_state.json", "gold_selection_state.json")
OWNED = frozenset((*TENSOR_FILES, *JSON_FILES, "original_config.json", "manifest.json"))
LEGACY_FILES = ("latest.pt", "final.pt")


def exists(path: Path) -> bool:
    """Whether `path` holds a bundle: config.json and model.pt."""
    if not path.exists() and path.parent.is_dir():
        clean_stale(path)  # a save may have died between two renames
    return (path / "config.json").is_file() and (path / "model.pt").is_file()


def locate(name: str, root: Path = Path("checkpoints")) -> Path:
    """Resolve what the user typed: the name of a run under `root`, or a path to a bundle.

    Raises:
        CheckpointError: if neither is there, with the nearest run's name.
    """
    for path in (root / name, Path(name)):
        if name and exists(path):
            return path
    for path in (root / name, Path(name)):
        old = [f for f in LEGACY_FILES if name and (path / f).is_file()]
        if old:
            raise CheckpointError(
                f"{path} holds no bundle", f"found {old[0]}, a single-file checkpoint",
                f"`mypt-fast convert --model_name {name}` makes one of it",
            )  # fmt: skip
    folders = root.iterdir() if root.is_dir() else ()
    runs = sorted(p.name for p in folders if not p.name.startswith(".") and exists(p))
    near = difflib.get_close_matches(name, runs, 1)
    known = f"runs here: {', '.join(runs[:8])}" if runs else "train a model first"
    raise CheckpointError(
        f"no model '{name}'", f"nothing in {root / name}",
        f"the nearest run is '{near[0]}'" if near else known,
    )  # fmt: skip


class EditError(IntegrityError):
    """An edit by hand that cannot be followed. Nothing is damaged: no snapshot replaces it."""


def read_info(path: Path) -> dict[str, Any]:
    """Read the small JSON members only, by name without extension; missing ones are left out.

    Raises:
        IntegrityError: for a member that is no JSON object any more, in a bundle with a manifest.
        ConfigError, CheckpointError: for one that never may have been, and for other causes.
    """
    names = [n for n in (*JSON_FILES, "manifest.json") if (path / n).is_file()]
    info = {}
    for name in names:
        try:
            info[name[:-5]] = read_member(path / name)
        except (ConfigError, CheckpointError) as e:
            if "manifest.json" in names:
                raise IntegrityError(str(e), cure=_cure(path)) from e
            raise
    return info


def read_member(path: Path) -> dict[str, Any]:
    """Read one JSON member; raises CheckpointError if it is not an object."""
    content = read_json(path, "bundle member", MAX_MEMBER_BYTES)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object", f"found {type(content).__name__}")
    return content


def content_hash(content: Any) -> str:
    """Hash what a JSON member says, however it is laid out."""
    import xxhash

    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128(text.encode("utf-8", "surrogatepass")).hexdigest()


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest with the hash of itself, so that its own damage is found too."""
    return {**manifest, SEAL: content_hash(manifest)}


def listed_files(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's entries by file name.

    Raises:
        IntegrityError: if the manifest is of another schema, or not as it was written.
    """
    files, where = manifest.get("files"), path / "manifest.json"
    drop = "delete it to load the bundle unverified"
    if manifest.get("schema") != MANIFEST_SCHEMA:
        raise IntegrityError(
            f"{where}: unknown schema", f"found {shown(manifest.get('schema'))}",
            f"this version reads schema {MANIFEST_SCHEMA}; update mypt_fast, or {drop}",
        )  # fmt: skip
    rest = {k: v for k, v in manifest.items() if k != SEAL}
    if manifest.get(SEAL) != content_hash(rest) or not isinstance(files, dict):
        raise IntegrityError(f"{where} is damaged", "it is not what was written", drop)
    return files


@dataclass
class Checked:
    """What verification found: whether our manifest holds, and what to say."""

    manifest: dict[str, Any] | None
    notices: list[str] = field(default_factory=list)


def verified(path: Path, info: dict[str, Any], optimizer: bool = True) -> Checked:
    """Compare every file with the manifest before it is used.

    Args:
        path: the bundle.
        info: its JSON members (`read_info`). A missing training_state.json is put in from the
            manifest's copy.
        optimizer: whether optimizer.pt will be used.

    Raises:
        EditError: if an edit changed what weights and data position depend on.
        IntegrityError: if a file is not what was saved.
    """
    manifest = info.get("manifest")
    if manifest is None:
        return Checked(None, [f"{path.name}: no manifest.json, so its files cannot be verified"])
    files = listed_files(path, manifest)
    wanted = {n: e for n, e in files.items() if n != "optimizer.pt" or optimizer}
    changed = [name for name, entry in wanted.items() if not matches(path / name, entry)]
    if _is_rewritten(path, changed):
        text = "rewritten by another program since we saved it; loading it without our manifest"
        return Checked(None, [f"{path.name}: {text}"])
    notices = []
    for name in changed:
        if not (path / name).is_file():
            notices.append(_missing(path, name, manifest, info))
        elif name in TENSOR_FILES or name not in OWNED:
            raise _damaged(path, name)
        elif name[:-5] not in info or content_hash(info[name[:-5]]) != manifest["contents"].get(
            name
        ):
            said = _edited(path, name, manifest, info.get(name[:-5]))
            notices.append(
                f"{path.name}: {name} was edited since it was saved{said}; using the edit"
            )
    return Checked(manifest, notices)


def _cure(path: Path) -> str:
    return f"restore it from a backup, or resume from {path.name}_gold if that exists"


def _damaged(path: Path, name: str) -> IntegrityError:
    found = "its hash differs from manifest.json"
    cure = _cure(path)
    if name in TENSOR_FILES:
        cure += "; if you changed it on purpose, delete manifest.json"
    return IntegrityError(f"{path / name} is not the file that was saved", found, cure)


def _missing(path: Path, name: str, manifest: dict[str, Any], info: dict[str, Any]) -> str:
    if name == "optimizer.pt":
        return f"{path.name}: optimizer.pt is not there any more"
    if name == "training_state.json":
        info["training_state"] = dict(manifest["members"][name])
        return f"{path.name}: training_state.json is not there any more; using the manifest's copy"
    if name in ("gold_selection_state.json", "original_config.json"):
        return f"{path.name}: {name} is not there any more; nothing depends on it"
    raise IntegrityError(f"{path / name} is missing", "manifest.json lists it", _cure(path))


def _edited(path: Path, name: str, manifest: dict[str, Any], now: Any) -> str:
    """Say which run fields an edit changed; raises EditError where it changed others."""
    if name in ("gold_selection_state.json", "original_config.json"):
        return ""
    before = manifest["members"].get(name)
    if before is None or now is None:
        raise EditError(
            f"{path / name} was changed since it was saved",
            "the weights were trained with it as it was",
            "undo the edit, or delete manifest.json to load the bundle unverified",
        )
    keys = [
        k for k in {**before, **now} if before.get(k) != now.get(k) or (k in before) != (k in now)
    ]
    fixed = ARCHITECTURE_KEYS if name == "config.json" else _fixed_state(before)
    for key in (k for k in keys if k in fixed):
        raise EditError(
            f"{path / name}: {key} cannot be edited",
            f"it was {shown(before.get(key))} when the weights were saved, and is "
            f"{shown(now.get(key))}",
            "undo the edit, or delete manifest.json to load the bundle unverified",
        )
    if name == "config.json":
        known = {k: v for k, v in now.items() if k in set(field_names(ModelConfig))}
        build(ModelConfig, known, str(path / name)).check(str(path / name))
    was = ", ".join(
        f"{shown(k)[1:-1]} {shown(before.get(k))} -> {shown(now.get(k))}" for k in keys[:3]
    )
    return f" ({was}{', ...' if len(keys) > 3 else ''})"


def _fixed_state(before: dict[str, Any]) -> set[str]:
    """Keys of training_state.json that say what the weights are, not how to go on."""
    return {*before, "step"} - {"training_config"}


def _is_rewritten(path: Path, changed: list[str]) -> bool:
    """Whether another program saved here: several members newer than ours, each of them whole."""
    here = [path / name for name in changed if (path / name).is_file()]
    if "model.pt" not in changed or len(here) < 2:
        return False
    ours = (path / "manifest.json").stat().st_mtime_ns
    if any(p.stat().st_mtime_ns <= ours for p in here):
        return False
    return all(is_whole_archive(p) for p in here if p.name in TENSOR_FILES)


def is_whole_archive(path: Path) -> bool:
    """Whether every record of a tensor file has the CRC-32 that its archive gives it."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
            return stored and archive.testzip() is None
    except Exception:  # junk surfaces as any of a dozen types
        return False


def matches(path: Path, entry: Any) -> bool:
    """Whether a file has the size and hash of its manifest entry."""
    import xxhash

    if not same_size(path, entry):
        return False
    digest = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while block := f.read(8 << 20):
            digest.update(block)
    return digest.hexdigest() == entry.get("xxh3_128")


def same_size(path: Path, entry: Any) -> bool:
    """Whether a file is there with the size of its manifest entry: the check that costs nothing."""
    return path.is_file() and isinstance(entry, dict) and path.stat().st_size == entry.get("bytes")
