"""MyPT's checkpoints of 2025: one file with everything, and bundles with a matrix per head.

| function | what it does |
|---|---|
| `find(directory, order)` | the first single file there is, or None |
| `choose(name, order, filename)` | what a command reads: a bundle before any single file |
| `read(path, filename)` | a `Bundle` in today's layout, like `bundle.read` |
| `info(path)` | config, tokenizer and step alone, like `manifest.read_info` |
| `convert(directory, filename)` | write the bundle beside the file, and compare what both compute |

Format: MyPT specification 2.6 and 5.2. A single file holds `model_state_dict`, `config`,
`tokenizer`, `step` and `optimizer_state_dict`. Nothing in it is executed (`tensors.load`).
Importing this module does not import torch.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypt_fast.checkpoint.manifest import LEGACY_FILES, exists, is_whole_archive, locate, read_info
from mypt_fast.errors import CheckpointError, DataError, FormatError, IntegrityError
from mypt_fast.settings import OldRun
from mypt_fast.tokenizer import GPT2_BASE_VOCAB, SPECIAL_STRINGS, SPECIAL_TOKENS
from mypt_fast.tokenizer_state import moved_specials, read_state, state_for

if TYPE_CHECKING:
    from mypt_fast.checkpoint.bundle import Bundle
    from mypt_fast.checkpoint.converting import Converted

LATEST, FINAL = LEGACY_FILES
# Which single files a purpose takes where there is no bundle (MyPT specification 5.2).
RESUME = (LATEST,)
INIT_FROM = (FINAL,)
INFERENCE = (LATEST, FINAL)
INSPECT = (FINAL, LATEST)
CURE = "restore it from a backup, or use another checkpoint of the run"
_PER_HEAD = re.compile(rb"blocks\.\d+\.sa\.heads\.\d+\.")
_MAX_PICKLE_BYTES = 16 << 20


def find(directory: Path, order: tuple[str, ...]) -> Path | None:
    """Return the first of the files in `order` that `directory` has, or None."""
    return next((directory / name for name in order if (directory / name).is_file()), None)


def choose(
    name: str,
    order: tuple[str, ...],
    filename: str | None = None,
    root: Path = Path("checkpoints"),
) -> tuple[Path, list[str]]:
    """Resolve what a command reads: a bundle, else `filename`, else the first of `order`.

    Args:
        name: of a run under `root`, or a path to its directory or to a single file.
        order: single files to look for.
        filename: `--legacy_checkpoint`, in the run's directory or a path of its own.
        root: folder of the runs.

    Returns:
        A bundle's directory or a single file, and lines to say.

    Raises:
        CheckpointError: if there is nothing to read, with what is there instead.
    """
    folders = [path for path in (root / name, Path(name)) if name and path.exists()]
    for path in folders:
        if exists(path):
            hidden = f"{filename} is not read: the bundle in {path} comes before it"
            return path, [hidden] if filename else []
    if filename:
        for path in (*(folder / filename for folder in folders), Path(filename)):
            if path.is_file():
                return path, []
        here = [p.name for folder in folders for p in sorted(folder.glob("*.pt"))]
        raise CheckpointError(
            f"no file {filename} in {root / name}",
            f"found {', '.join(here[:5])}" if here else "found no checkpoint there",
            "check --legacy_checkpoint and --model_name",
        )
    for path in folders:
        if path.is_file():
            return path, []
        if found := find(path, order):
            return found, []
    return locate(name, root), []  # raises, naming what is near


def is_per_head_bundle(directory: Path) -> bool:
    """Whether the bundle's model.pt is of the per-head era. A file that cannot be read is not."""
    try:
        with zipfile.ZipFile(directory / "model.pt") as archive:
            member = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
            if max(member.file_size, member.compress_size) > _MAX_PICKLE_BYTES:
                return False
            return _PER_HEAD.search(archive.read(member)) is not None
    except Exception:  # whoever reads it next says what it is
        return False


def old_run(place: Path, order: tuple[str, ...] = RESUME) -> OldRun | None:
    """What `settings.resolve` needs of an old checkpoint; None where there is none.

    Args:
        place: a run's directory or a single file.
        order: single files to look for where there is no bundle.

    Raises:
        ConfigError, CheckpointError, IntegrityError: if it cannot be read.
    """
    if exists(place):
        if (place / "manifest.json").is_file() or not is_per_head_bundle(place):
            return None
        members = read_info(place)
        config = {**members["config"], "per_head_era": True}
        tokenizer = _meant(members.get("tokenizer"), config.get("vocab_size"))
        return OldRun(config, members.get("training_state") or {}, tokenizer)
    file = place if place.is_file() else find(place, order)
    if file is None:
        return None
    saved = read(file, optimizer=False, values=False)
    return OldRun(saved.config, saved.training_state, saved.tokenizer, file)


def read(
    path: Path, filename: str | None = None, *, optimizer: bool = True, values: bool = True
) -> Bundle:
    """Read a checkpoint of any era into today's layout, every key and shape checked.

    Args:
        path: a single file, or a directory: its bundle, else `filename` or latest.pt or final.pt.
        filename: single file in `path`, read even where there is a bundle.
        optimizer: also take over the optimizer's moments where they fit; where not, a notice.
        values: read the weights' bytes; without, they are on the meta device.

    Returns:
        A Bundle whose `path` is the file; its config has every field, and `per_head_era` where
        the weights need it.

    Raises:
        CheckpointError: if there is no such file.
        IntegrityError, ConfigError: naming the key, what was expected and what was found.
    """
    from mypt_fast.checkpoint import bundle

    if path.is_dir():
        if filename is None and exists(path):
            return bundle.read(path, optimizer=optimizer)
        file = path / filename if filename else find(path, INFERENCE)
        if file is None or not file.is_file():
            raise CheckpointError(
                f"no checkpoint in {path}", f"{filename or ' or '.join(INFERENCE)} is not there"
            )
        path = file
    return modern(path, content(path, values), optimizer)


def info(path: Path) -> dict[str, Any]:
    """Read what a single file says about itself: `config`, `tokenizer`, `training_state`.

    As it is stored; the weights' bytes are not read.

    Raises:
        CheckpointError, IntegrityError: as `read`.
    """
    stored = content(path, values=False)
    found: dict[str, Any] = {"config": dict(stored["config"])}
    if isinstance(stored.get("tokenizer"), dict):
        found["tokenizer"] = stored["tokenizer"]
    return {**found, "training_state": {"step": stored.get("step")}}


def content(path: Path, values: bool) -> dict[str, Any]:
    """Return what a single file holds, weights and config at least; raises FormatError."""
    from mypt_fast.checkpoint.tensors import load

    stored = load(path, values=values)
    cure = "it is no single-file checkpoint of MyPT"
    if not isinstance(stored, dict):
        raise FormatError(f"{path}: expected a dict", f"found a {type(stored).__name__}", cure)
    if values and not is_whole_archive(path):  # its CRC-32 are the only hashes it has
        raise IntegrityError(f"{path} is damaged", "a record differs from its CRC-32", CURE)
    for key in ("model_state_dict", "config"):
        if not isinstance(stored.get(key), dict):
            found = f"found {type(stored[key]).__name__}" if key in stored else "it is missing"
            names = ", ".join(str(k)[:40] for k in list(stored)[:6])
            raise FormatError(f"{path}: {key}: expected a dict", f"{found}; keys: {names}", cure)
    return stored


def modern(path: Path, stored: dict[str, Any], optimizer: bool) -> Bundle:
    """Bring a single file's content into today's layout; `read` says what it raises."""
    from mypt_fast.checkpoint import bundle, eras

    moments = stored.get("optimizer_state_dict") if optimizer else None
    new = eras.modernise(stored["config"], stored["model_state_dict"], moments, str(path))
    notices = new.notices
    if optimizer and moments is None:
        notices.append(f"{path}: no optimizer state; its moments start from zero")
    step = stored.get("step")
    if step is not None and (type(step) is not int or step < 0):
        raise FormatError(f"{path}: step: expected a whole number", f"found {str(step)[:40]}")
    tokenizer = stored.get("tokenizer")
    if tokenizer is None and new.config.vocab_size >= GPT2_BASE_VOCAB:
        tokenizer = {"token_kind": "gpt2"}
        notices.append(f"{path}: no tokenizer in it; its vocabulary has the size of GPT-2's")
    elif tokenizer is None:
        notices.append(f"{path}: no tokenizer in it; text needs the tokenizer.json of its data")
    tokenizer = _meant(tokenizer, new.config.vocab_size)
    if tokenizer is not None:
        notices += _checked_tokenizer(path, tokenizer, new.config.vocab_size)
    state = {} if step is None else {"step": step}
    return bundle.Bundle(
        path, new.config.to_dict(), new.weights, tokenizer, state, new.optimizer, None, notices
    )


def _meant(tokenizer: Any, vocab_size: Any) -> Any:
    if not isinstance(tokenizer, dict) or not isinstance(vocab_size, int):
        return tokenizer
    return state_for(tokenizer, vocab_size, len(SPECIAL_STRINGS))


def _checked_tokenizer(path: Path, state: Any, vocab_size: int) -> list[str]:
    try:
        checked = read_state(state, SPECIAL_STRINGS)
    except DataError as e:
        raise FormatError(f"{path}: {e.what}", e.found) from e
    ids = checked.special_strings.values()
    needed = len(checked.chars or ()) or max([checked.base_vocab_size or 0, *(i + 1 for i in ids)])
    if needed > vocab_size:
        raise FormatError(
            f"{path}: the tokenizer does not fit the model",
            f"expected at most vocab_size {vocab_size} tokens, found {needed}",
        )
    return tokenizer_notices(str(path), state)


def tokenizer_notices(where: str, state: Any) -> list[str]:
    """A line where special tokens keep ids that are not today's."""
    moved = moved_specials(state, SPECIAL_TOKENS)
    if not moved:
        return []
    name, (old, new) = next(iter(moved.items()))
    return [
        f"{where}: {len(moved)} special tokens keep the ids the weights were trained with "
        f"({name} {old}, today {new})"
    ]


def convert(directory: Path, filename: str | None = None, *, write: bool = True) -> Converted:
    """Write the bundle of an old checkpoint; see `converting.convert`."""
    from mypt_fast.checkpoint import converting

    return converting.convert(directory, filename, write=write)
