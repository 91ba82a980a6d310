"""Megabytes of text a second from files to shards, against a plain loop around tiktoken.

    pytest bench/bench_prepare.py --benchmark-only     about a minute
    python bench/bench_prepare.py                      also writes bench/results/cpu/prepare.json

The text is this Python's own standard library with its tests and installed packages' sources, each
file once, in the page cache. Both sides read the files and write tokens to a file. `MB per CPU
second` divides by the CPU time of the whole process, so it is the speed of one core however many
are at work; `MB/s` is by the clock.
"""

import sys
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from record import machine, run_suite, save

from mypt_fast.data.encoding import cores
from mypt_fast.data.fast_gpt2 import PACKAGE
from mypt_fast.data.prepare import PrepareOptions, prepare
from mypt_fast.gpt2_files import gpt2_encoding

BASELINE = "plain tiktoken loop"
MOST_BYTES = 60_000_000
ROUNDS = 3
# How many times the baseline's MB per CPU second; only gigatoken is held to it.
BAR = 3.0

_speeds: dict[str, float] = {}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A directory of text files, and its size: what the standard library has that is UTF-8."""
    folder = tmp_path_factory.mktemp("texts")
    seen, total = set(), 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        data = path.read_bytes()
        if not data or b"\0" in data or data in seen or total + len(data) > MOST_BYTES:
            continue
        try:
            data.decode()
        except UnicodeDecodeError:
            continue
        seen.add(data)
        total += len(data)
        (folder / f"{len(seen):05d}.txt").write_bytes(data)
    return folder, total


def plain_loop(folder, out):
    """What people write: encode a document, append the end token, write the array."""
    encoding = gpt2_encoding()
    with (out / "train.bin").open("wb") as file:
        for path in sorted(folder.iterdir()):
            ids = encoding.encode_ordinary(path.read_text("utf-8"))
            ids.append(encoding.eot_token)
            np.array(ids, dtype=np.uint16).tofile(file)


def ours(encoder, workers):
    def run(folder, out):
        inputs = (str(folder),)
        prepare(PrepareOptions(out / "data", inputs, encoder=encoder, workers=workers))

    return run


WAYS = {
    BASELINE: plain_loop,
    "mypt-fast, tiktoken, 1 worker": ours("tiktoken", 1),
    f"mypt-fast, tiktoken, {cores()} workers": ours("tiktoken", cores()),
    "mypt-fast, gigatoken, 1 worker": ours("gigatoken", 1),
    f"mypt-fast, gigatoken, {cores()} workers": ours("gigatoken", cores()),
}


@pytest.mark.parametrize("way", WAYS)
def test_prepare(benchmark, texts, tmp_path, way):
    if PACKAGE in way and find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed: pip install 'mypt_fast[prep]'")
    folder, size = texts
    cpu = []

    def fresh():
        out = Path(tempfile.mkdtemp(dir=tmp_path))
        return (folder, out), {}

    def run(folder, out):
        before = time.process_time()
        WAYS[way](folder, out)
        cpu.append(time.process_time() - before)

    benchmark.group = f"{size / 1e6:.0f} MB"
    benchmark.pedantic(run, setup=fresh, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    del cpu[0]  # the warm-up
    report(benchmark, size, way, cpu)


def report(benchmark, size, way, cpu):
    """Note the speeds, and the ratio to the loop that ran before in the same process."""
    info = benchmark.extra_info
    speed = _speeds[way] = size / 1e6 / float(np.median(cpu))
    info["way"], info["megabytes"] = way, round(size / 1e6, 1)
    info["cpu_seconds"] = [float(f"{s:.4g}") for s in cpu]
    info["MB per CPU second"] = round(speed, 1)
    info["MB/s"] = round(size / 1e6 / benchmark.stats.stats.median, 1)
    if way != BASELINE and BASELINE in _speeds:
        ratio = info[f"times {BASELINE}"] = round(speed / _speeds[BASELINE], 2)
        if PACKAGE in way:
            assert ratio >= BAR, f"{ratio} times the {BASELINE}, where the bar is {BAR}"


def main():
    """Run the suite in its own process and keep every sample."""
    rows = [
        {**row["extra_info"], "seconds": [float(f"{s:.4g}") for s in row["stats"]["data"]]}
        for row in run_suite(__file__)
    ]
    save("prepare", machine(), rows)
    for row in rows:
        sys.stdout.write(
            f"{row['way']:34} {row['MB/s']:7.1f} MB/s {row['MB per CPU second']:7.1f} MB per CPU "
            f"second {row.get(f'times {BASELINE}', 1):6.2f} x\n"
        )


if __name__ == "__main__":
    main()
