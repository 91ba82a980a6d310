"""F2: what may be on a disk after a power cut during saves is one of the two states, always.

The requests of two saves are recorded and played on a model of a disk. After a cut, a file that
was not fsynced is empty, zeros, half or whole; each directory has its names of some moment since
its last fsync, and every directory of another moment. Images are drawn at random and read as usual.
"""

import copy
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from content import N_FAULTS, save, seen

from mypt_fast import publish
from mypt_fast.publish import clean_stale


@dataclass
class Directory:
    """Names by moment: `past[i]` holds them after the i-th change; `safe` is what is durable."""

    past: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    safe: int = 0

    def change(self, **changes: Any) -> None:
        names = {**self.past[-1], **changes}
        self.past.append({k: v for k, v in names.items() if v is not None})


@dataclass
class File:
    """What is in a file once it is complete, and whether it was fsynced."""

    data: bytes
    is_safe: bool = False


class Disk:
    """The model; `root` is the directory that holds the run."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Directory()
        for folder in root.iterdir():
            names = {p.name: File(p.read_bytes(), True) for p in folder.iterdir()}
            self.top.change(**{folder.name: Directory([names])})
        self.top.safe = len(self.top.past) - 1

    def at(self, path: str) -> Directory:
        return self.top if Path(path) == self.root else self.top.past[-1][Path(path).name]

    def play(self, event: tuple[Any, ...]) -> None:
        kind, *where = event
        top = self.top
        if kind == "mkdir":
            top.change(**{Path(where[0]).name: Directory()})
        elif kind in ("file", "link"):  # link: the same inode, durable as it is
            path, data = where
            self.at(str(Path(path).parent)).change(**{Path(path).name: data})
        elif kind == "fsync":
            self.at(str(Path(where[0]).parent)).past[-1][Path(where[0]).name].is_safe = True
        elif kind == "fsync directory":
            self.at(where[0]).safe = len(self.at(where[0]).past) - 1
        elif kind == "exchange":
            a, b = (Path(w).name for w in where)
            top.change(**{a: top.past[-1][b], b: top.past[-1][a]})
        elif kind == "rename":
            a, b = (Path(w).name for w in where)
            top.change(**{b: top.past[-1][a], a: None})
        elif kind == "rmtree":
            gone = top.past[-1].get(Path(where[0]).name)
            for name in list(gone.past[-1]) if gone else ():
                gone.change(**{name: None})
            if gone:
                top.change(**{Path(where[0]).name: None})

    def draw(self, rng: random.Random, target: Path) -> None:
        """Write one image of what may be left of this moment."""
        target.mkdir()
        for name, folder in self._names(self.top, rng).items():
            (target / name).mkdir()
            for inner, file in self._names(folder, rng).items():
                lost = rng.choice([b"", bytes(len(file.data)), file.data[: len(file.data) // 2]])
                whole = file.is_safe or rng.random() < 0.3
                (target / name / inner).write_bytes(file.data if whole else lost)

    @staticmethod
    def _names(folder: Directory, rng: random.Random) -> dict[str, Any]:
        last = len(folder.past) - 1
        return folder.past[rng.choice([folder.safe, last, rng.randint(folder.safe, last)])]


def record(monkeypatch: pytest.MonkeyPatch, events: list[tuple[Any, ...]]) -> None:
    """Write down what saves ask of the file system from here on, in order."""

    def wrap(module: Any, name: str, describe: Any) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = describe(*args) if name in ("fsync", "rmtree") else None
            result = original(*args, **kwargs)
            found = before if before is not None else describe(*args)
            if result is not False:  # an exchange that this system does not know
                events.extend(found)
            return result

        monkeypatch.setattr(module, name, call)

    def synced(handle: int) -> list[tuple[Any, ...]]:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isdir(path):
            return [("fsync directory", path)]
        return [("file", path, File(Path(path).read_bytes())), ("fsync", path)]

    wrap(os, "mkdir", lambda path, *_: [("mkdir", str(path))])
    wrap(os, "fsync", synced)
    wrap(os, "rename", lambda a, b: [("rename", str(a), str(b))])
    wrap(os, "link", lambda a, b: [("link", str(b), File(Path(b).read_bytes(), True))])
    wrap(shutil, "rmtree", lambda path, **_: [("rmtree", str(path))] * os.path.isdir(path))
    wrap(publish, "_exchange", lambda a, b: [("exchange", str(a), str(b))])


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_every_image_after_a_power_cut_holds_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    run = tmp_path / "disk" / "run"
    run.parent.mkdir()
    for step in (1, 2):
        save(run, step)
    (run / "notes.txt").write_bytes(b"mine")
    start, events, moments = Disk(run.parent), [], []
    with monkeypatch.context() as patched:
        record(patched, events)
        for step in (3, 4):
            begin = len(events)
            save(run, step)
            moments += [step] * (len(events) - begin)
    assert len(events) > 40
    rng, found = random.Random(5), Counter()
    disk, played = start, events
    for i in range(N_FAULTS // 2):
        cut = i % (len(events) + 1)
        if cut:
            disk.play(played[cut - 1])
        else:
            disk, played = copy.deepcopy(start), copy.deepcopy(events)
        image = tmp_path / "image"
        disk.draw(rng, image)
        clean_stale(image / "run")
        under_way = moments[cut - 1] if cut else 3
        step = seen(image / "run")
        assert step in (under_way - 1, under_way), (cut, events[cut - 1], step)
        assert (image / "run" / "notes.txt").read_bytes() == b"mine"
        found["the new state" if step == under_way else "the old state"] += 1
        shutil.rmtree(image)
    print(f"{N_FAULTS // 2} images of {len(events) + 1} moments: {dict(found)}")
    assert len(found) == 2
