"""A training step on a GPU: what the host waits for, what a graph holds, which kernel attends."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast import presets
from mypt_fast.cli import main
from mypt_fast.model import GPT
from mypt_fast.training import attention_choice as choice
from mypt_fast.training.trainer import Trainer
from tests.training.conftest import SMALL, write_dataset

PRESETS = pytest.mark.parametrize("preset", ["base/750M_unified_v1", "150M_1024"])
OPERATORS = {
    "flash": "aten::_scaled_dot_product_flash_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
}


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that `tolist` reads, the one way past the debug mode `error`."""
    tolist, found = Tensor.tolist, []

    def allowed(t: Tensor) -> object:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        found.append(tuple(t.shape))
        try:
            return tolist(t)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(Tensor, "tolist", allowed)
    return found


@pytest.mark.parametrize("state", ["exact", "exact16", "fast"])
def test_a_step_waits_for_its_device_once(state, reads, way, tmp_path, monkeypatch) -> None:
    if state != "exact" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    monkeypatch.chdir(tmp_path)
    data, step, found = write_dataset(tmp_path / "data"), Trainer._train_step, []

    def watched(self: Trainer) -> bool:
        if not self.step:  # kernels are compiled, memory and the optimizer's state are made
            return step(self)
        reads.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found.append(list(reads))

    monkeypatch.setattr(Trainer, "_train_step", watched)
    flags = ["--use_amp", "--state", state, "--n_embd", "64", "--max_iters", "4"]
    base = ["train", "--model_name", "a", "--device", "cuda", "--compile", "off"]
    assert main([*base, *SMALL, *flags, "--dataset_dir", str(data)]) == 0
    assert found == [[(2,)]] * 3  # loss and gradient norm, together


def block_of(preset: str) -> GPT:
    """One block of a shipped preset's kind, heads of 80."""
    cfg = dataclasses.replace(
        presets.load(preset).model, n_layer=1, n_embd=160, n_head=2, block_size=64,
        vocab_size=500, dropout=0.0,
    )  # fmt: skip
    return GPT(cfg, seed=0).to("cuda").train()


@PRESETS
def test_a_captured_step_computes_with_new_tokens(preset, way) -> None:
    """Forward and backward of the model in one CUDA graph."""
    model = block_of(preset)
    static, fresh = torch.randint(500, (2, 2, 4, 64), device=way.device)

    def gradients(batch: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model.summed_loss(*batch)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch's notes on graphs ask: warm up aside
        for _ in range(3):
            gradients(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(static)
    static.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    found = [t.clone() for t in found]
    for a, b in zip(found, gradients(fresh), strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.125])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_a_kernel_is_found_without_a_word(size, dropout, dtype, way, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = choice.Shape(torch.device("cuda", 0), dtype, 2, 4, 256, size, dropout)
    name = choice.fastest(shape)
    assert name in choice.FUSED
    assert choice.fastest(shape) == name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_kernel_that_is_chosen_runs(compiled, way) -> None:
    """The same function under one choice after the other: caches on disk are told apart."""
    shape = choice.Shape(torch.device("cuda", 0), torch.float16, 2, 2, 128, 64, 0.0)
    names = [name for name in choice.FUSED if choice.fault(name, shape) is None]
    assert names
    x = torch.randn(2, 2, 128, 64, device="cuda", dtype=torch.float16, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    for name in names:
        torch.compiler.reset()
        work: Callable[[Tensor], Tensor] = torch.compile(attend) if compiled else attend
        with choice.first(name), torch.profiler.profile() as seen:
            work(x).sum().backward()
        ran = {event.key for event in seen.key_averages()}
        assert {other for other, op in OPERATORS.items() if op in ran} == {name}
