"""Shared by the data tests: shards that hold 0, 1, 2, ..., and the native module or a reason."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mypt_fast.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def native():
    """The extension; its absence fails unless MYPT_NO_NATIVE=1 says that it is meant."""
    if os.environ.get("MYPT_NO_NATIVE") == "1":
        pytest.skip("MYPT_NO_NATIVE=1: tested without the extension")
    try:
        from mypt_fast import _native
    except ImportError as error:
        pytest.fail(
            f"build it with `python setup.py build_ext --inplace`, or set MYPT_NO_NATIVE=1: {error}"
        )
    return _native


@pytest.fixture(params=["numpy", "native"])
def backend(request):
    if request.param == "native":
        request.getfixturevalue("native")
    return request.param


def _write_dataset(folder, sizes, width=4, split="train", **metadata):
    """Write shards of consecutive integers (modulo the width) and return the dataset directory."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    begin = 0
    for index, size in enumerate(sizes):
        tokens = np.arange(begin, begin + size).astype(f"<u{width}")
        tokens.tofile(folder / split / f"shard_{index:05d}.bin")
        begin += size
    metadata = {"dtype": f"uint{8 * width}", **metadata}
    (folder / "dataset_metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="session")
def write_dataset():
    return _write_dataset


@pytest.fixture
def dataset(tmp_path):
    """A function that writes a dataset under tmp_path."""

    def write(sizes, **kwargs):
        return _write_dataset(tmp_path, sizes, **kwargs)

    return write


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty small documents with line ends, spaces and Unicode that cleaning would change."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(60):
        text = f"Document {n}\r\n\r\n  It's  MIXED   case, café 漢😀\t{'x' * n}\n\n"
        (folder / f"{n:02d}.txt").write_bytes(text.encode())
    return folder
