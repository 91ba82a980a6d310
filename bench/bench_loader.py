"""Batches per second of the token loader against plain ways to read the same file.

    pytest bench/bench_loader.py --benchmark-only      about 30 s
    python bench/bench_loader.py                       also writes bench/results/cpu/loader.json

The file is in the page cache, so this is the cost of a batch to the training process, not of a
disk. Every way ends in int64 x and y; the strided one is given the advantage that its x and y are
views of one array, which a model would have to copy.
"""

import json
import statistics
import sys

import numpy as np
import pytest
import torch
from record import machine, run_suite, save

from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus

N_TOKENS = 100_000_000
VOCAB_SIZE = 50_304
SHAPES = [(8, 1024), (12, 1024), (64, 256)]
BASELINE = "get_batch"
# (batch, block) -> how many times faster than get_batch the native loader must be
BARS = {(8, 1024): 30.0, (64, 256): 50.0}
ROUNDS, ITERATIONS = 100, 12  # enough that first touches of pages do not set the median

_medians: dict[tuple, float] = {}


@pytest.fixture(scope="module", params=["uint16", "uint32"])
def dataset(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "train").mkdir()
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, N_TOKENS, dtype=request.param)
    ids.tofile(folder / "train/shard_00000.bin")
    (folder / "dataset_metadata.json").write_text(json.dumps({"dtype": request.param}))
    yield folder, request.param
    (folder / "train/shard_00000.bin").unlink()


def get_batch(folder, dtype, B, T, keep_open=False):
    """Sample as nanoGPT's published training script does: windows at random, row by row."""

    def map_file():
        return np.memmap(folder / "train/shard_00000.bin", dtype=dtype, mode="r")

    kept = map_file() if keep_open else None

    def batch():
        data = map_file() if kept is None else kept
        starts = torch.randint(len(data) - T, (B,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts]
        )
        return x, y

    return batch


def get_batch_open(folder, dtype, B, T):
    return get_batch(folder, dtype, B, T, keep_open=True)


def strided(folder, dtype, B, T):
    """Gather whole windows through a strided view: the best that plain NumPy does."""
    data = np.asarray(np.memmap(folder / "train/shard_00000.bin", dtype=dtype, mode="r"))
    windows = np.lib.stride_tricks.sliding_window_view(data, T + 1)
    rng = np.random.default_rng(0)

    def batch():
        block = torch.from_numpy(windows[rng.integers(len(windows), size=B)].astype(np.int64))
        return block[:, :-1], block[:, 1:]

    return batch


def ours(backend):
    def make(folder, dtype, B, T):
        corpus = TokenCorpus.from_dataset(folder, "train", backend)
        loader = TokenLoader(corpus, T, seed=0, global_batch=B, vocab_size=VOCAB_SIZE)
        x, y = (torch.empty(B, T, dtype=torch.int64) for _ in range(2))
        x_view, y_view = x.numpy(), y.numpy()

        def batch():
            loader.next(B, x_view, y_view)
            return x, y

        return batch

    return make


WAYS = {
    BASELINE: get_batch,
    "get_batch, file kept open": get_batch_open,
    "strided NumPy": strided,
    "mypt_fast numpy": ours("numpy"),
    "mypt_fast native": ours("native"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("B", "T"), SHAPES, ids=[f"B{b}-T{t}" for b, t in SHAPES])
def test_batch(benchmark, dataset, B, T, way):
    folder, dtype = dataset
    benchmark.group = f"{dtype} B{B} T{T}"
    batch = WAYS[way](folder, dtype, B, T)
    x, y = batch()
    assert x.shape == y.shape == (B, T)
    assert torch.equal(x[:, 1:], y[:, :-1])
    benchmark.pedantic(batch, rounds=ROUNDS, iterations=ITERATIONS, warmup_rounds=5)
    report(benchmark, (dtype, B, T), way)


def report(benchmark, case, way):
    """Note the speed, and the ratio to the ways that ran before in the same process."""
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    _medians[(*case, way)] = median
    info = benchmark.extra_info
    info["way"], info["case"] = way, benchmark.group
    info["mtok_per_s"] = round(case[1] * case[2] / median / 1e6, 1)
    for other in (BASELINE, "strided NumPy"):
        if (*case, other) in _medians and other != way:
            info[f"times faster than {other}"] = round(_medians[(*case, other)] / median, 2)
    bar = BARS.get(case[1:])
    ratio = info.get(f"times faster than {BASELINE}")
    if way == "mypt_fast native" and bar and ratio:
        assert ratio >= bar, f"{ratio} times {BASELINE}, where the bar is {bar}"


def main():
    """Run the suite in its own process and keep every sample, without the machine's name."""
    rows = [
        {
            **row["extra_info"],
            "seconds_per_batch": [float(f"{s:.4g}") for s in row["stats"]["data"]],
        }
        for row in run_suite(__file__)
    ]
    for row in rows:
        row["median_us"] = round(statistics.median(row["seconds_per_batch"]) * 1e6, 2)
    facts = {**machine(), "tokens": N_TOKENS, "batches_per_sample": ITERATIONS}
    save("loader", facts, rows)
    for row in rows:
        sys.stdout.write(
            f"{row['case']:18} {row['way']:26} {row['median_us']:9.2f} us "
            f"{row.get(f'times faster than {BASELINE}', 1):8.2f} x\n"
        )


if __name__ == "__main__":
    main()
