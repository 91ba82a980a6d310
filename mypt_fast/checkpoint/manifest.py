"""What a bundle directory says about itself, read without torch: JSON members, manifest, hashes.

`inspect` answers from here in a blink; `bundle` adds the tensors.
"""

import difflib
from pathlib import Path
from typing import Any

from mypt_fast.errors import CheckpointError, IntegrityError
from mypt_fast.presets import read_json
from mypt_fast.publish import clean_stale

MANIFEST_SCHEMA = 1
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
                "convert it to the bundle format first",
            )  # fmt: skip
    folders = root.iterdir() if root.is_dir() else ()
    runs = sorted(p.name for p in folders if not p.name.startswith(".") and exists(p))
    near = difflib.get_close_matches(name, runs, 1)
    known = f"runs here: {', '.join(runs[:8])}" if runs else "train a model first"
    raise CheckpointError(
        f"no model '{name}'", f"nothing in {root / name}",
        f"the nearest run is '{near[0]}'" if near else known,
    )  # fmt: skip


def read_info(path: Path) -> dict[str, Any]:
    """Read the small JSON members only, by name without extension; missing ones are left out."""
    names = [n for n in (*JSON_FILES, "manifest.json") if (path / n).is_file()]
    return {name[:-5]: read_member(path / name) for name in names}


def read_member(path: Path) -> dict[str, Any]:
    """Read one JSON member; raises CheckpointError if it is not an object."""
    content = read_json(path, "bundle member", MAX_MEMBER_BYTES)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object", f"found {type(content).__name__}")
    return content


def listed_files(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's entries by file name.

    Raises:
        CheckpointError: if the manifest is of another schema.
    """
    files = manifest.get("files")
    if manifest.get("schema") != MANIFEST_SCHEMA or not isinstance(files, dict):
        raise CheckpointError(
            f"{path / 'manifest.json'}: unknown schema", f"found {manifest.get('schema')!r}",
            f"this version reads schema {MANIFEST_SCHEMA}; update mypt_fast",
        )  # fmt: skip
    return files


def verified(
    path: Path, manifest: dict[str, Any] | None, optimizer: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Check hashes; returns the manifest, or None when another program rewrote the bundle."""
    if manifest is None:
        return None, [f"{path.name}: no manifest.json, so its files cannot be verified"]
    files = listed_files(path, manifest)
    wanted = {n: e for n, e in files.items() if n != "optimizer.pt" or optimizer}
    changed = [name for name, entry in wanted.items() if not matches(path / name, entry)]
    tensors = [n for n in changed if n in TENSOR_FILES]
    if "model.pt" in tensors and "training_state.json" in changed:
        text = "rewritten by another program since we saved it; loading it without our manifest"
        return None, [f"{path.name}: {text}"]
    if tensors:
        raise IntegrityError(
            f"{path / tensors[0]} is not the file that was saved",
            "its hash differs from manifest.json",
            f"restore it from a backup, or resume from {path.name}_gold if that exists",
        )  # fmt: skip
    edited = "was edited since it was saved; using the edit"
    return manifest, [f"{path.name}: {n} {edited}" for n in changed]


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
