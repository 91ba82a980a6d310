"""What a training process waits for its batches: a ring filled by a worker, and files from disk.

    pytest bench/bench_prefetch.py --benchmark-only     about 2 minutes
    python bench/bench_prefetch.py                      also writes bench/results/cpu/prefetch.json

"next" is the time of one call between steps of 2 ms of arithmetic. "cold" reads 1 GB that was
dropped from the page cache, which is checked. "floor" is the copy of as many bytes as a batch has,
within the cache.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from bench_loader import get_batch
from record import machine, run_suite, save

from mypt_fast import _native
from mypt_fast.data.format import native
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus

VOCAB_SIZE = 50_304
COLD_TOKENS = 500_000_000  # 1 GB
STEP_SECONDS = 2e-3
B, T = 8, 1024
SLOTS = 32


def write(folder, n_tokens):
    """Shards of random tokens, 2 bytes each."""
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "train/shard_00000.bin").open("wb") as file:
        for begin in range(0, n_tokens, 50_000_000):
            n = min(50_000_000, n_tokens - begin)
            file.write(rng.integers(0, VOCAB_SIZE, n, dtype=np.uint16).data)
        file.flush()
        os.fsync(file.fileno())
    (folder / "dataset_metadata.json").write_text(json.dumps({"dtype": "uint16"}))
    return folder


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    return write(tmp_path_factory.mktemp("warm"), 50_000_000)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("cold"), COLD_TOKENS)
    yield folder
    (folder / "train/shard_00000.bin").unlink()


def drop(folder):
    """Take the dataset out of the page cache; says so if the system did not."""
    path = folder / "train/shard_00000.bin"
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = _native.resident_share(str(path))
    if share > 0.02:
        pytest.skip(f"{share:.0%} of the file stayed in the page cache")


def ours(folder, io="auto", **kwargs):
    corpus = TokenCorpus.from_dataset(folder, "train", "native", io)
    return TokenLoader(corpus, T, seed=0, global_batch=B, vocab_size=VOCAB_SIZE, **kwargs)


def status(name):
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def bytes_read():
    """What this process made the disk read."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise KeyError("read_bytes")


def percentiles(benchmark, way):
    """Note the spread in microseconds; a mean says nothing of a wait."""
    benchmark.extra_info["way"] = way
    if benchmark.stats is None:
        return
    times = np.sort(np.array(benchmark.stats.stats.data)) * 1e6
    for q in (50, 99, 99.9):
        benchmark.extra_info[f"p{q:g}_us"] = round(float(np.percentile(times, q)), 2)


def compute(a, out, seconds=STEP_SECONDS):
    """Use one core for about so long."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        np.matmul(a, a, out=out)


@pytest.fixture(params=["quiet", "oversubscribed"])
def load(request):
    """Nothing else, or two busy processes a core, this one among them."""
    if request.param == "quiet":
        yield request.param
        return
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1) - 1)]
    yield request.param
    for process in busy:
        process.kill()
        process.wait()


def reader(folder, **kwargs):
    loader = ours(folder, **kwargs)
    return lambda: loader.next(B)


WAYS = {
    "get_batch": lambda folder: get_batch(folder, "uint16", B, T),
    "mypt_fast inline": reader,
    "mypt_fast ring": lambda folder: reader(folder, prefetch=SLOTS),
}


@pytest.mark.parametrize("way", WAYS)
def test_next(benchmark, warm, load, way):
    batch = WAYS[way](warm)
    a = np.ones((128, 128), np.float32)
    out = np.empty_like(a)
    for _ in range(20):
        batch()
    benchmark.group = f"next, {load}"
    benchmark.pedantic(batch, setup=lambda: compute(a, out), rounds=1500, iterations=1)
    percentiles(benchmark, way)


def test_worker_share_of_the_floor(benchmark, warm):
    """The worker's own work, without the hand-over, against a copy of the same bytes."""
    loader = ours(warm)
    x, y = np.empty((B, T), np.int64), np.empty((B, T), np.int64)
    source, target = np.ones(2 * B * T, np.int64), np.empty(2 * B * T, np.int64)
    copies = []
    for _ in range(300):
        began = time.perf_counter()
        for _ in range(20):
            np.copyto(target, source)
        copies.append((time.perf_counter() - began) / 20)
    benchmark.group = "worker"
    benchmark.pedantic(lambda: loader.next(B, x, y), rounds=300, iterations=20, warmup_rounds=5)
    percentiles(benchmark, "mypt_fast inline")
    if benchmark.stats is not None:
        floor = statistics.median(copies)
        benchmark.extra_info["floor_us"] = round(floor * 1e6, 2)
        benchmark.extra_info["share_of_floor"] = round(floor / benchmark.stats.stats.median, 3)


@pytest.mark.parametrize("form", ["int64", "narrow"])
def test_cpu_time(benchmark, warm, form):
    """CPU time a token: of the worker, and of the consumer's calls between steps."""
    before = set(os.listdir("/proc/self/task"))
    loader = ours(warm, prefetch=SLOTS)
    take = loader.next if form == "int64" else loader.next_windows
    take(B)
    (worker,) = set(os.listdir("/proc/self/task")) - before
    a = np.ones((128, 128), np.float32)
    out = np.empty_like(a)

    def worker_seconds():
        return int(Path(f"/proc/self/task/{worker}/schedstat").read_text().split()[0]) / 1e9

    began = worker_seconds()
    benchmark.group = "CPU time"
    benchmark.pedantic(
        lambda: take(B), setup=lambda: compute(a, out, 2e-4), rounds=5000, iterations=1
    )
    percentiles(benchmark, f"mypt_fast ring, {form}")
    if benchmark.stats is not None:
        seconds = worker_seconds() - began + sum(benchmark.stats.stats.data)
        benchmark.extra_info["cpu_ns_a_token"] = round(seconds / (5000 * B * T) * 1e9, 3)


@pytest.mark.parametrize("way", ["get_batch", "mypt_fast"])
def test_cold(benchmark, large, way):
    drop(large)
    loader = ours(large, prefetch=SLOTS) if way == "mypt_fast" else None
    batch = (lambda: loader.next(B)) if loader else get_batch(large, "uint16", B, T)
    rounds = 400 if loader else 60
    before = bytes_read()
    benchmark.group = "cold"
    benchmark.pedantic(batch, rounds=rounds, iterations=1)
    read = bytes_read() - before
    percentiles(benchmark, way)
    benchmark.extra_info["read_amplification"] = round(read / (rounds * B * (T + 1) * 2), 2)
    if benchmark.stats is not None:
        mean = benchmark.stats.stats.mean
        benchmark.extra_info["mean_us"] = round(mean * 1e6, 1)
    if loader:
        benchmark.extra_info["io"] = loader.stats()["io"]
        loader.close()


@pytest.mark.parametrize("io", ["pread", "mmap"])
def test_memory(benchmark, large, io):
    """What a process holds after 160,000 random windows."""
    before = status("VmRSS")
    with ours(large, io, prefetch=SLOTS) as loader:
        benchmark.group = "memory"
        benchmark.pedantic(lambda: loader.next(B), rounds=20_000, iterations=1)
        grown = status("VmRSS") - before
    percentiles(benchmark, f"mypt_fast {io}")
    benchmark.extra_info["rss_growth_mb"] = round(grown / 1e6, 1)


def sparse_shards(folder, count, n_tokens):
    """Native shards of zeros that take no room, with every hash they need."""
    (folder / "train").mkdir(parents=True)
    payload = bytes(2 * n_tokens)
    blocks = [
        xxhash.xxh3_64_intdigest(payload[i : i + native.BLOCK_BYTES])
        for i in (0, len(payload) // native.BLOCK_BYTES * native.BLOCK_BYTES)
    ]
    header = native.Header(2, n_tokens, 1, payload_hash=xxhash.xxh3_128_digest(payload))
    where = native.layout(header)
    hashes = [blocks[0]] * (native.n_blocks(header) - 1) + blocks[1:]
    tables = np.array([n_tokens, *hashes], "<u8").tobytes()
    head, tail = native.pack_header(header), tables + native.pack_footer(where.file_size, tables)
    for i in range(count):
        with (folder / f"train/shard_{i:05d}.bin").open("wb") as file:
            file.write(head)
            file.seek(where.documents)
            file.write(tail)
    (folder / "dataset_metadata.json").write_text(json.dumps({"format": "native"}))


def test_resume_at_a_trillion_tokens(benchmark, tmp_path):
    """Open 10,000 shards, check their headers and indexes, go to the middle and read a batch."""
    sparse_shards(tmp_path, 10_000, 100_000_000)
    state = ours(tmp_path).state_dict()
    state["global_sample"] = 500_000_000 // B * B
    grown = []

    def resume():
        before = status("RssAnon")
        loader = ours(tmp_path)
        loader.load_state_dict(state)
        loader.next(B)
        grown.append(status("RssAnon") - before)

    benchmark.group = "resume at 10^12 tokens"
    benchmark.pedantic(resume, rounds=7, iterations=1, warmup_rounds=1)
    percentiles(benchmark, "mypt_fast")
    # what is left of it is the names of 10,000 files; an order would be 7.8 GB
    benchmark.extra_info["rss_growth_mb"] = round(statistics.median(grown) / 1e6, 1)


def main():
    """Run the suite in its own process and keep every sample, without the machine's name."""
    rows = [
        {
            "case": row["group"],
            **row["extra_info"],
            "seconds": [float(f"{s:.3g}") for s in row["stats"]["data"][:1500]],
        }
        for row in run_suite(__file__)
    ]
    save("prefetch", {**machine(), "batch": [B, T], "cold_tokens": COLD_TOKENS}, rows)
    for row in rows:
        facts = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("case", "way", "seconds"))
        sys.stdout.write(f"{row['case']:22} {row['way']:24} {facts}\n")


if __name__ == "__main__":
    main()
