"""Older states of a run, kept as hidden directories beside it, and the way back to them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mypt_fast.checkpoint.manifest import OWNED, EditError, content_hash, read_info, verified
from mypt_fast.errors import ConfigError, IntegrityError, MyptError
from mypt_fast.publish import staged


def snapshots(path: Path) -> list[Path]:
    """The older states of the run at `path`, newest first: `.<name>.step-<number>`."""
    real = Path(os.path.realpath(path))
    head = f".{real.name}.step-"
    if not real.parent.is_dir():
        return []
    found = [p for p in real.parent.iterdir() if p.name.startswith(head) and p.is_dir()]
    return sorted((p for p in found if p.name[len(head) :].isdigit()), key=_step, reverse=True)


def _step(snapshot: Path) -> int:
    return int(snapshot.name.rpartition("-")[2])


def parent_of(path: Path) -> dict[str, object] | None:
    """What the next save follows: step and manifest hash of the bundle at `path`, if it has one."""
    try:
        manifest = read_info(path).get("manifest")
    except MyptError:
        return None  # damaged: whoever reads it next says so
    if manifest is None:
        return None
    return {"step": manifest.get("step"), "manifest": content_hash(manifest)}


def retirement(path: Path, keep: int, step: int) -> Callable[[Path], None]:
    """Return what is done with the directory that the save of `step` replaced.

    It becomes the newest snapshot and older ones over `keep` are removed: never before the new
    bundle was read back, which the save has done by then. A second save of one step replaces.
    """
    real = Path(os.path.realpath(path))

    def retire(old: Path) -> None:
        parent = parent_of(old)
        number = parent and parent["step"]
        if keep and type(number) is int and 0 <= number != step:
            place = real.with_name(f".{real.name}.step-{number:09d}")
            shutil.rmtree(place, ignore_errors=True)
            os.rename(old, place)
        prune(path, keep)

    return retire


def prune(path: Path, keep: int) -> None:
    """Remove all snapshots but the newest `keep`."""
    for extra in snapshots(path)[keep:]:
        shutil.rmtree(extra, ignore_errors=True)


def check(path: Path) -> None:
    """Compare every byte of a bundle with its manifest.

    Raises:
        IntegrityError: naming the file that is not what was saved.
    """
    listed = read_info(path)
    if "config" not in listed or not (path / "model.pt").is_file():
        absent = "model.pt" if "config" in listed else "config.json"
        raise IntegrityError(f"{path / absent} is missing", "without it there is no checkpoint")
    verified(path, listed)


def settle(path: Path) -> list[str]:
    """Put the newest good snapshot in the place of a damaged bundle; returns what to say.

    Called by the one program that writes `path`, before anything is read from it. The damaged
    directory is kept as `.<name>.damaged`; files that are not ours stay where they are.

    Raises:
        IntegrityError: if the bundle is damaged and no snapshot is good.
    """
    if not (path / "manifest.json").is_file():
        older = [] if path.exists() else snapshots(path)
        text = (
            f"{path} is gone and its snapshot {{}} is left; the first save of a new run removes it"
        )
        return [text.format(older[0])] if older else []
    try:
        check(path)
    except EditError:
        raise
    except ConfigError:
        return []  # an edit that is no setting: the settings' own check says it better
    except IntegrityError as damage:
        for snapshot in snapshots(path):
            try:
                check(snapshot)
            except MyptError:
                continue
            kept = _put_back(snapshot, path)
            found = "; ".join(part for part in (damage.what, damage.found) if part)
            return [f"{found}; went back to step {_step(snapshot)}; what is damaged is in {kept}"]
        raise
    return []


def _put_back(snapshot: Path, path: Path) -> Path:
    real = Path(os.path.realpath(path))
    kept = real.with_name(f".{real.name}.damaged")

    def keep(old: Path) -> None:
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(old, kept)

    with staged(real, OWNED, retire=keep) as aside:
        for name in sorted(OWNED):
            if (snapshot / name).is_file():
                try:
                    os.link(snapshot / name, aside / name)
                except OSError:  # a file system without hard links
                    shutil.copy2(snapshot / name, aside / name)
    return path.with_name(kept.name)
