"""A step reads one value from the device: its loss beside its gradient norm, for the log."""

import functools
from collections.abc import Callable

import pytest
import torch
from test_train_documents import indexed  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mypt_fast.kernels import _operator
from mypt_fast.recompute import POLICIES
from mypt_fast.training import device as devices
from mypt_fast.training.trainer import Trainer

# operators whose result, or its shape, the host has to wait for
OPERATORS = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal",
    "_unique2", "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
METHODS = {"tolist", "cpu", "numpy"}  # of a tensor: a copy that leaves no such operator behind
MASKS = (torch.bool, torch.uint8)


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in MASKS for t in args[1]
        )
        if name in OPERATORS or by_mask or (name == "repeat_interleave" and len(args) < 2):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def reads_of(work: Callable[[], object]) -> list[str]:
    """What the host would wait for in `work`, if its tensors were a GPU's."""
    found: list[str] = []
    with _Methods(found), _Operators(found):
        work()
    return found


X = torch.arange(4.0)


@pytest.mark.parametrize(
    ("work", "wanted"),
    [
        (lambda: X.sum().item(), ["_local_scalar_dense"]),
        (lambda: float(X[0]), ["_local_scalar_dense"]),
        (lambda: bool((X > 1).any()), ["_local_scalar_dense"]),
        (lambda: X.tolist(), ["tolist"]),
        (lambda: X.cpu(), ["cpu"]),
        (lambda: X.numpy(), ["numpy"]),
        (lambda: X[X > 1], ["index"]),
        (lambda: X.masked_select(X > 1), ["masked_select"]),
        (lambda: torch.where(X > 1), ["nonzero"]),
        (lambda: torch.equal(X, X), ["equal"]),
        (lambda: X[torch.tensor([1])] + torch.where(X > 1, X, 0.0)[0], []),
    ],
)
def test_the_counter_counts(work, wanted) -> None:
    assert reads_of(work) == wanted


PRECISIONS = {
    "bf16": devices.Precision(torch.bfloat16, False, "cpu"),
    "fp16": devices.Precision(torch.float16, True, "cpu"),  # with a scaler, as an old GPU
}


@pytest.fixture
def found(monkeypatch) -> list[list[str]]:
    """Reads of every step but the first, which makes the optimizer's state."""
    step, each = Trainer._train_step, []

    def counted(self: Trainer) -> bool:
        if not self.step:
            return step(self)
        assert self.run.plan.micro_batch * 4 == self.settings.global_batch
        moved: list[bool] = []
        each.append(reads_of(lambda: moved.append(step(self))))
        return moved[0]

    monkeypatch.setattr(Trainer, "_train_step", functools.wraps(step)(counted))
    monkeypatch.setattr(_operator, "is_on_host", lambda t: False)  # as of a GPU's
    return each


# all that a CPU can run: what waits in host memory needs a GPU
@pytest.mark.parametrize("recompute", [p for p in POLICIES if p != "offload"])
@pytest.mark.parametrize(
    ("state", "precision"),
    [("exact", "bf16"), ("exact16", "bf16"), ("fast", "bf16"), ("exact", "fp16")],
)
def test_a_step_reads_once(train, found, monkeypatch, state, precision, recompute) -> None:
    """Micro-steps, clipping and the optimizer, whatever the backward makes again."""
    monkeypatch.setattr(devices, "precision", lambda *_, **__: (PRECISIONS[precision], None))
    flags = ["--use_amp", "--state", state, "--recompute", recompute, "--n_embd", "64"]
    assert train("a", *flags, "--max_iters", "3") == 0
    assert found == [["tolist"], ["tolist"]]


@pytest.mark.usefixtures("indexed")
@pytest.mark.parametrize("documents", ["mask", "bestfit"])
def test_a_step_over_documents_reads_once(train, found, documents) -> None:
    assert train("a", "--documents", documents, "--max_iters", "3") == 0
    assert found == [["tolist"], ["tolist"]]
