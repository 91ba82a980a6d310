"""F9: hostile tensor files execute nothing, crash nothing and take no memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mypt_fast.checkpoint import tensors


class Mine(torch.Tensor):
    """A subclass, which torch.save names by its module."""


def test_hostile_files_are_refused_and_run_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "hostile.py")]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    print(report)
    assert report["cases"] >= 100
    assert report["wrong"] == {}
    assert report["left"] == ["m"]  # nothing that was to be executed left its mark
    assert report["grown_kib"] << 10 <= 2 * report["largest"]  # twice the largest file


def test_what_torch_writes_is_what_is_read(tmp_path: Path) -> None:
    """Every dtype, shared and strided storage, nesting: equal to torch's own reader."""
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "state_dict": torch.nn.Linear(3, 2).state_dict(),
        "dtypes": {
            str(t): torch.ones(3, dtype=t) for t in tensors.DTYPE_OF.values()
        },
        "shared": [base, base.t(), base[1:3, ::2], base[:, 5]],
        "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [None, True, False, 1, -1, 300, 70000, 1 << 40, -(1 << 80), 0.5, "é", (), (1,),
                  (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {1: "a"}, []],
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pt")
    got = tensors.load(tmp_path / "x.pt")
    want = torch.load(tmp_path / "x.pt", weights_only=True)
    assert got["plain"] == want["plain"] == content["plain"]
    assert list(got) == list(want)
    assert tensors.tensor_entries(got) == tensors.tensor_entries(want)
    for a, b in zip(got["shared"], want["shared"], strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    got["shared"][0][0, 0] = 99.0
    assert got["shared"][1][0, 0] == 99.0
    assert type(got["state_dict"]).__name__ == "OrderedDict"


def test_a_tensor_of_a_class_of_its_own_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": Mine([1.0])}}, tmp_path / "x.pt")
    with pytest.raises(tensors.IntegrityError, match="_rebuild_from_type_v2"):
        tensors.load(tmp_path / "x.pt")
