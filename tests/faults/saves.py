"""A process under the shim: saves a bundle in forked children that die or fail, and looks after.

Run as `python saves.py FOLDER [[MODE, ERRNO], ...] [EXCHANGE, ...]`; prints one JSON object.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

from content import save, seen

from mypt_fast.checkpoint import snapshots
from mypt_fast.errors import CheckpointError
from mypt_fast.publish import clean_stale

SHIM = ctypes.CDLL(None)
BEFORE, HALF, AFTER, FAIL, FAIL_ON = 1, 2, 3, 4, 5


def in_child(path: Path, n: int, mode: int, error: int) -> tuple[str, int]:
    """Save step 3 in a fork whose n-th request dies or fails; returns how it ended and K."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        said = "saved"
        try:
            SHIM.shim_arm(n, mode, error)
            save(path, 3)
        except CheckpointError as e:
            said = f"refused: {e.found}"
        except BaseException as e:
            said = f"raised {type(e).__name__}: {e}"
        count = SHIM.shim_count()
        SHIM.shim_disarm()
        os.write(write, json.dumps([said, count]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said, count = json.loads(text) if text else (f"died {code}", 0)
    return said, count


def prepared(folder: Path) -> Path:
    path = folder / "run"
    if path.parent.exists():
        shutil.rmtree(path.parent)
    path.parent.mkdir(parents=True)
    for step in (1, 2):
        save(path, step)
    (path / "notes.txt").write_text("mine")
    return path


def case(folder: Path, template: Path, n: int, mode: int, error: int) -> str:
    """One death or failure; returns what the reader found, and raises on any mixture."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    path = folder / "run"
    said, _ = in_child(path, n, mode, error)
    if mode in (BEFORE, HALF, AFTER):
        assert said == "died 9", said
    else:
        assert said == "saved" or said.startswith("refused"), said
    clean_stale(path)  # what every program of ours does that finds no directory there
    step = seen(path)
    assert step in (2, 3), step
    if mode in (FAIL, FAIL_ON):
        assert step == (3 if said == "saved" else 2) or step == 3, (said, step)
    older = snapshots.snapshots(path)
    good = [p for p in older if _is_good(p)]
    assert (path / "notes.txt").read_text() == "mine"
    save(path, 4)  # the next save works and cleans up
    assert seen(path) == 4
    left = {p.name for p in folder.iterdir()}
    assert left == {"run", f".run.step-{step:09d}"}, left
    return f"{'new' if step == 3 else 'old'}, {said.split(':')[0]}, {len(good)} good"


def _is_good(path: Path) -> bool:
    try:
        snapshots.check(path)
    except Exception:
        return False
    return True


def main() -> None:
    folder, modes = Path(sys.argv[1]), json.loads(sys.argv[2])
    template, work = folder / "template", folder / "work"
    results: dict[str, dict[str, int]] = {}
    for exchange in json.loads(sys.argv[3]):
        if not exchange:
            from mypt_fast import publish

            publish._exchange = lambda a, b: False
        prepared(template)
        shutil.copytree(template, work)
        said, total = in_child(work / "run", 0, 0, 0)
        assert said == "saved", said
        for mode, error in modes:
            found = results.setdefault(f"mode {mode} error {error} exchange {exchange}", {})
            for n in range(1, total + 1):
                what = case(work, template, n, mode, error)
                found[what] = found.get(what, 0) + 1
        shutil.rmtree(work)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
