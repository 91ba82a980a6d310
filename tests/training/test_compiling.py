"""Which runs are compiled, and that a resumed one keeps to it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mypt_fast.attention import KVCache, Segments
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.kernels import _operator
from mypt_fast.model import GPT
from mypt_fast.training import compiling, plan

# torch's own, which it hides, but not where warnings are errors: a block's input is no leaf
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def run(monkeypatch):
    """A function that makes what `choose` looks at of a run; 1,000 steps of two seconds."""
    monkeypatch.setattr(plan, "estimated_tokens_per_s", lambda run: 512.0)
    monkeypatch.setattr(compiling, "_lacking", lambda device: None)
    monkeypatch.setattr(compiling, "GAIN", 0.5)
    monkeypatch.setattr(compiling, "COMPILE_S", 50.0)
    # half of the FLOPs are the head's
    monkeypatch.setattr(compiling, "flops_per_token", lambda cfg: 12.0 * 64 * 256)

    def made(saved=None, typed=(), device=CPU, mlp="swiglu", dropout=0.0, phases=(), **train):
        return SimpleNamespace(
            choice=None, device=device, precision=SimpleNamespace(dtype=torch.float32),
            phases=[SimpleNamespace(train=data) for data in phases],
            settings=SimpleNamespace(
                train=TrainConfig(**train), typed=set(typed), global_batch=8,
                saved_state={"plan": saved} if saved else {},
                model=SimpleNamespace(
                    block_size=128, n_embd=64, vocab_size=256, mlp_type=mlp, dropout=dropout
                ),
            ),
        )  # fmt: skip

    return made


def test_a_cpu_compiles_where_the_steps_left_pay_it_back_twice(run) -> None:
    # half a second is saved a step: 100 steps pay back 50 s
    assert compiling.choose(run(max_iters=199), 0).words == "eager"
    found = compiling.choose(run(max_iters=1200), 1000)
    assert found == compiling.Choice(True, "compiled: pays back after 100 of 200 steps")
    assert not compiling.choose(run(max_iters=1200), 1001).compiled


@pytest.mark.parametrize("no_gain", [{"mlp": "gelu"}, {"dropout": 0.1}, {"phases": ["documents"]}])
def test_a_cpu_never_compiles_what_gained_nothing(run, no_gain) -> None:
    assert compiling.choose(run(max_iters=10**6, **no_gain), 0).words == "eager"
    assert compiling.choose(run(max_iters=9, compile="on", **no_gain), 0).words == "compiled"


def test_the_choice_is_made_once(run, monkeypatch) -> None:
    it = run(max_iters=1000)
    first = compiling.choose(it, 0)
    monkeypatch.setattr(compiling, "GAIN", 0.0)
    assert compiling.choose(it, 0) is first


@pytest.mark.parametrize(("saved", "compiled"), [
    ({"compiled": False, "device": "cpu"}, False),
    ({"compiled": True, "device": "cpu"}, True),
    ({"micro_batch_size": 4}, False),  # of an older version, whose runs were eager on a CPU
    ({"compiled": "yes"}, False),
    ({"compiled": False, "device": "cuda"}, True),  # decided anew
    (["no plan"], True),
])  # fmt: skip
def test_a_resumed_run_keeps_its_choice(run, saved, compiled) -> None:
    assert compiling.choose(run(saved, max_iters=10**6), 0).compiled is compiled


def test_a_resumed_run_decides_anew_where_compile_is_given(run) -> None:
    saved = {"compiled": False, "device": "cpu"}
    assert compiling.choose(run(saved, typed=["compile"], max_iters=10**6), 0).compiled
    assert not compiling.choose(run({"compiled": True}, max_iters=9, compile="off"), 0).compiled


@pytest.mark.parametrize("saved", [None, {"compiled": True}])
def test_a_cpu_without_a_compiler_runs_eager_and_says_why(run, monkeypatch, saved) -> None:
    monkeypatch.setattr(compiling, "_lacking", lambda device: "a C++ compiler (g++)")
    found = compiling.choose(run(saved, max_iters=10**6), 0)
    assert found == compiling.Choice(False, "eager: a C++ compiler (g++) is missing")


def test_python_headers_are_looked_for(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", "sh")  # something that is there
    for name in ("CPATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_operator.sysconfig, "get_path", lambda *names: str(tmp_path))
    with pytest.raises(ConfigError, match="--compile on needs Python's C header"):
        compiling.settled(TrainConfig(compile="on"), CPU)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", f"/none:{tmp_path / 'own'}")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/Python.h").touch()
    assert compiling.settled(TrainConfig(compile="on"), CPU)


@pytest.mark.parametrize(("compile", "found"), [("auto", True), ("on", True), ("off", False)])
def test_a_gpu_compiles_unless_told_not_to(monkeypatch, compile, found) -> None:
    monkeypatch.setattr(compiling, "missing_for_triton", lambda: None)
    assert compiling.settled(TrainConfig(compile=compile), GPU) is found


def test_a_gpu_without_a_c_compiler(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "missing_for_triton", lambda: "a C compiler (gcc or clang)")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)  # cc is not enough
    run = SimpleNamespace(choice=None, device=GPU, settings=SimpleNamespace(train=TrainConfig()))
    found = compiling.choose(run, 0)
    assert found == compiling.Choice(False, "eager: a C compiler (gcc or clang) is missing")
    assert compiling.settled(TrainConfig(), GPU) is False
    with pytest.raises(ConfigError, match="needs a C compiler"):
        compiling.settled(TrainConfig(compile="on"), GPU)


def test_the_choice_is_saved_with_the_run(train, monkeypatch) -> None:
    def saved() -> dict:
        return json.loads(Path("checkpoints/a/training_state.json").read_text())["plan"]

    assert train("a") == 0
    assert (saved()["compiled"], saved()["device"]) == (False, "cpu")


# the blocks, compiled


def model(**options) -> GPT:
    cfg = ModelConfig(
        n_layer=5, n_head=2, n_embd=16, block_size=8, vocab_size=32, dropout=0.0, **options
    )
    return GPT(cfg, 0).train()


def graphs(gpt: GPT, monkeypatch) -> CompileCounterWithBackend:
    """Compile its blocks; the counter says into how many graphs."""
    torch._dynamo.reset()
    counter, plain = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: plain(f, backend=counter))
    gpt.compile_blocks()
    return counter


def losses(gpt: GPT, rows: int, **inputs) -> float:
    idx = torch.arange(rows * 8).view(rows, 8) % 32
    loss = gpt(idx, idx, **inputs)
    if torch.is_grad_enabled():
        loss.backward()
    return loss.item()


@pytest.mark.parametrize(("options", "training"), [
    ({}, 2), ({"pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm"}, 2),
    ({"use_checkpoint": True}, 1),
], ids=["gpt2", "llama", "checkpoint"])  # fmt: skip
def test_all_layers_share_two_graphs(options, training, monkeypatch) -> None:
    """The first block's, which no branch joins, and all others'; run again, they are alike."""
    plain, gpt = model(**options), model(**options)
    counter = graphs(gpt, monkeypatch)
    assert losses(gpt, 4) == pytest.approx(losses(plain, 4), rel=1e-6)
    for p, q in zip(gpt.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == training
    losses(gpt, 4)
    assert counter.frame_count == training
    gpt.eval()
    with torch.no_grad():
        losses(gpt, 6)
        losses(gpt, 3)
    # rows of any number from the second number on, which for blocks that run again is the third
    assert counter.frame_count == (4 if training == 2 else 5)


@pytest.mark.filterwarnings("error:.*recompile_limit")
def test_frozen_layers_and_odd_batches_stay_within_the_limit(monkeypatch) -> None:
    gpt = model()
    counter = graphs(gpt, monkeypatch)
    gpt.blocks[:2].requires_grad_(False)
    for rows in (4, 3, 2, 1):
        losses(gpt, rows)
        gpt.eval()
        with torch.no_grad():
            losses(gpt, rows)
        gpt.train()
    before = counter.frame_count
    assert before > 8  # torch's own limit, after which it goes on eager
    losses(gpt, 4)
    assert counter.frame_count == before


def test_documents_are_attended_to_alike(monkeypatch) -> None:
    plain, gpt = model(), model()
    graphs(gpt, monkeypatch)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8])
    for lengths in (ids, ids.flip(0)):
        inputs = {"documents": Segments.from_ids(lengths)}
        assert losses(gpt, 2, **inputs) == pytest.approx(losses(plain, 2, **inputs), rel=1e-6)


def test_cached_tokens_are_not_compiled(monkeypatch) -> None:
    gpt = model().eval()
    counter = graphs(gpt, monkeypatch)
    with torch.no_grad():
        cache = KVCache(gpt.config, 1, gpt.lm_head.weight)
        for token in range(4):
            gpt(torch.tensor([[token]]), cache=cache)
    assert (counter.frame_count, cache.length) == (0, 4)
