"""The layouts exact, exact16 and fast: one run each, any resume, and a no-op that is one."""

import copy
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import events
from test_guard import poison
from test_resume import assert_same_run, interrupt_at

from mypt_fast import accounting
from mypt_fast.checkpoint import bundle
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.data.loader import TokenLoader
from mypt_fast.kernels.reference import adamw as bits
from mypt_fast.model import GPT
from mypt_fast.training import device as devices
from mypt_fast.training.optim import clip, freeze, make_optimizer
from mypt_fast.training.split_adamw import SplitAdamW

LAYOUTS = ("exact", "exact16", "fast")
SPLIT = LAYOUTS[1:]
EXACT = LAYOUTS[:2]  # one arithmetic
CFG = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 16, "vocab_size": 67, "dropout": 0.0}


@pytest.fixture
def mixed(monkeypatch):
    """bf16 on every CPU, so that `exact` computes as the others do."""
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: True)


def made(state: str, **changes) -> tuple[GPT, torch.optim.Optimizer]:
    model = GPT(ModelConfig(**{**CFG, **changes}), seed=3).train()
    return model, make_optimizer(model, TrainConfig(state=state, learning_rate=1e-2))


def accumulate(model: GPT, seed: int, micro_batches: int = 2) -> float:
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(micro_batches):
        tokens = torch.randint(67, (4, 17), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.summed_loss(tokens[:, :-1], tokens[:, 1:]) / 128
        loss.backward()
        total += loss.item()
    return total


def bit_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        *(t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    )


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that is kept, as it is kept."""
    found = {n: p.detach() for n, p in model.named_parameters()}
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        found |= {f"{i}.{k}": v for k, v in optimizer.state.get(p, {}).items()}
        if isinstance(optimizer, SplitAdamW) and p in optimizer.remainders:
            found[f"{i}.remainder"] = optimizer.remainders[p]
    return {name: t.clone() for name, t in found.items()}


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name, t in one.items():
        assert bit_equal(t, two[name]), name


@pytest.mark.parametrize("mlp_type", ["gelu", "swiglu"])
@pytest.mark.parametrize("tied", [False, True])
def test_exact16_moves_bit_for_bit_as_exact_on_equal_gradients(mlp_type, tied):
    """Weights, moments, norms: groups, decay, clipping and accumulation included."""
    pairs = [made(s, mlp_type=mlp_type, tie_weights=tied, pos_encoding="rope") for s in EXACT]
    (exact, one), (split, two) = pairs
    for n in range(12):
        accumulate(split, n)
        for p, q in zip(exact.parameters(), split.parameters(), strict=True):
            p.grad = q.grad.clone()
        norms = [float(clip(o, m, 0.5)) for m, o in pairs]
        assert norms[0] == norms[1] > 0.5
        for _, o in pairs:
            o.step()
            o.zero_grad()
    assert split.blocks[0].sa.qkv.weight.dtype is torch.bfloat16
    masters = split.state_dict()
    for name, weight in exact.state_dict().items():
        assert bit_equal(weight, masters[name]), name
    a, b = one.state_dict()["state"], two.state_dict()["state"]
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].keys() == b[i].keys()
        assert all(bit_equal(v, b[i][k]) for k, v in a[i].items())


@pytest.mark.parametrize("mlp_type", ["gelu", "swiglu"])
@pytest.mark.parametrize("tied", [False, True])
def test_exact16_computes_what_autocast_does(mlp_type, tied):
    """Loss and fp32 sums of gradients are those of fp32 weights, but for rounding ties."""
    changes = {"mlp_type": mlp_type, "tie_weights": tied}
    exact, _ = made("exact", **changes)
    with torch.no_grad():
        for p in exact.parameters():
            raw = p.view(torch.int32)
            raw += (raw & 0xFFFF) == 0x8000
    split, _ = made("exact16", **changes)
    split.load_state_dict(exact.state_dict())
    assert accumulate(exact, 0, 3) == accumulate(split, 0, 3)
    for (name, p), q in zip(exact.named_parameters(), split.parameters(), strict=True):
        assert bit_equal(p.grad, q.grad), name
    low = q_grad(split).bfloat16().float()
    assert not torch.equal(low, q_grad(split))  # more than a bf16 sum holds


def q_grad(model: GPT) -> torch.Tensor:
    return model.blocks[0].sa.qkv.weight.grad


@pytest.mark.parametrize("state", SPLIT)
def test_dtypes_are_those_of_the_layout(state):
    model, optimizer = made(state)
    accumulate(model, 0)
    clip(optimizer, model, 1.0)
    dtypes = {n: (p.dtype, p.grad.dtype) for n, p in model.named_parameters()}
    low = torch.bfloat16 if state == "fast" else torch.float32
    assert dtypes["blocks.0.sa.qkv.weight"] == (torch.bfloat16, low)
    assert dtypes["token_embedding_table.weight"] == (torch.float32, low)
    assert dtypes["ln_f.weight"] == dtypes["lm_head.bias"] == (torch.float32, torch.float32)
    optimizer.step()
    kept = {d.dtype for d in optimizer.state[model.blocks[0].sa.qkv.weight].values()}
    coded = {torch.int8, torch.uint8, torch.float32}
    assert kept == (coded if state == "fast" else {torch.float32})


@pytest.mark.parametrize(("one", "two"), list(product(LAYOUTS, repeat=2)))
def test_any_layout_loads_any_other(one, two):
    """Weights come over bit for bit, moments too, but for the rounding to 8 bits."""
    model, optimizer = made(one)
    for n in range(3):
        accumulate(model, n)
        clip(optimizer, model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # torch's own AdamW keeps what it loads
    weights, state = model.state_dict(), copy.deepcopy(optimizer.state_dict())
    assert {w.dtype for w in weights.values()} == {torch.float32}
    other, of_other = made(two)
    other.load_state_dict(weights)
    of_other.load_state_dict(state)
    for name, weight in other.state_dict().items():
        assert bit_equal(weight, weights[name]), name
    again = of_other.state_dict()
    assert again["param_groups"] == state["param_groups"]
    for i, moments in state["state"].items():
        for key, value in moments.items():
            if two != "fast" or one == "fast" or key == "step" or value.numel() < 4096:
                assert bit_equal(value, again["state"][i][key]), (i, key)
    if one == two:
        assert_same(everything(model, optimizer), everything(other, of_other))
        results = []
        for m, o in ((model, optimizer), (other, of_other)):
            accumulate(m, 9)
            clip(o, m, 1.0)
            o.step()
            results.append(everything(m, o))
        assert_same(*results)


@pytest.mark.parametrize("state", SPLIT)
def test_what_does_not_fit_changes_nothing(state):
    model, optimizer = made(state)
    accumulate(model, 0)
    optimizer.step()
    before = everything(model, optimizer)
    wider, of_wider = made("exact", n_embd=96)
    accumulate(wider, 0)
    of_wider.step()
    with pytest.raises(RuntimeError, match="size mismatch for blocks"):
        model.load_state_dict({**model.state_dict(), "blocks.0.sa.qkv.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="moments of"):
        optimizer.load_state_dict(of_wider.state_dict())
    with pytest.raises(ValueError, match="groups are of other sizes"):
        optimizer.load_state_dict(made("exact", n_layer=1)[1].state_dict())
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("state", SPLIT)
def test_frozen_parameters_stay(state):
    model = GPT(ModelConfig(**CFG), seed=3).train()
    cfg = TrainConfig(state=state, freeze_layers=1, freeze_embeddings=True)
    freeze(model, cfg)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    optimizer = make_optimizer(model, cfg)
    for n in range(2):
        accumulate(model, n)
        clip(optimizer, model, 1.0)
        optimizer.step()
    moved = {n for n, w in model.state_dict().items() if not bit_equal(w, before[n])}
    assert moved
    assert not any(n.startswith(("blocks.0.", "token_emb", "position_emb")) for n in moved)


@pytest.mark.slow
@pytest.mark.parametrize("state", SPLIT)
def test_a_compiled_model_has_the_same_gradients(state):
    torch._dynamo.reset()
    pairs = [made(state) for _ in range(2)]
    pairs[1][0].hidden = torch.compile(pairs[1][0].hidden, backend="aot_eager")
    losses = [accumulate(m, 0) for m, _ in pairs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for a, b in zip(pairs[0][0].parameters(), pairs[1][0].parameters(), strict=True):
        assert a.grad.dtype is b.grad.dtype
        torch.testing.assert_close(a.grad, b.grad, rtol=0.05, atol=2e-4)


# whole runs


def flags(state: str, *more: str) -> list[str]:
    return ["--state", state, "--use_amp", "--n_embd", "64", *more]


@pytest.mark.parametrize("state", SPLIT)
def test_an_interrupted_run_goes_on_bit_for_bit(train, mixed, monkeypatch, capsys, state):
    assert train("whole", *flags(state)) == 0
    assert f"state {state}" in capsys.readouterr().out
    saved = bundle.read(Path("checkpoints/whole"))
    assert saved.training_state["plan"]["state"] == state
    assert {w.dtype for w in saved.state_dict.values()} == {torch.float32}
    interrupt_at(monkeypatch, 4 * 7 + 2, TokenLoader, "next")
    assert train("cut", *flags(state)) == 130
    assert train("cut", resume=True) == 0  # the layout is the saved run's
    assert_same_run("whole", "cut")


@pytest.mark.parametrize("state", SPLIT)
def test_another_layout_goes_on_with_one_notice(train, mixed, capsys, state):
    assert train("run", *flags("exact", "--max_iters", "5")) == 0
    before = bundle.read(Path("checkpoints/run"))
    shutil.copytree("checkpoints/run", "checkpoints/back")
    capsys.readouterr()
    assert train("run", "--state", state, "--max_iters", "7", resume=True) == 0
    shown = "".join(capsys.readouterr())
    assert shown.count(f"state layout changes from exact to {state}") == 1
    assert train("run", "--max_iters", "9", resume=True) == 0
    assert "state layout changes" not in "".join(capsys.readouterr())
    after = bundle.read(Path("checkpoints/run"))
    assert after.training_state["plan"]["state"] == state
    name = "blocks.0.sa.qkv.weight"
    assert not bit_equal(before.state_dict[name], after.state_dict[name])


@pytest.mark.parametrize("state", SPLIT)
def test_a_step_that_is_not_finite_leaves_no_trace(train, mixed, monkeypatch, state):
    kept = []
    original = torch.optim.Optimizer.zero_grad
    with monkeypatch.context() as patched:
        poison(patched, set(range(24, 32)), "loss", math.nan)  # the samples of step 3

        def looked(self, set_to_none=True):
            original(self, set_to_none)
            moments = [t for s in self.state.values() for t in s.values()]
            weights = [p.detach() for g in self.param_groups for p in g["params"]]
            kept.append([t.clone() for t in (*moments, *weights, *self.remainders.values())])

        patched.setattr(torch.optim.Optimizer, "zero_grad", looked)
        assert train("nan", *flags(state, "--max_iters", "5")) == 0
    assert [e["event"] for e in events("nan")].count("skipped_step") == 1
    assert all(bit_equal(a, b) for a, b in zip(kept[2], kept[3], strict=True))
    assert not all(bit_equal(a, b) for a, b in zip(kept[3], kept[4], strict=True))


@pytest.mark.parametrize("state", SPLIT)
def test_saves_of_any_kind_hold_the_masters(train, mixed, state):
    """Beside the training, in 16 bits with the exact ones behind, and as the final copy."""
    assert train("a", *flags(state, "--async_save", "on", "--save_dtype", "bf16")) == 0
    assert train("b", *flags(state, "--async_save", "off")) == 0
    one, two = (bundle.read(Path("checkpoints") / n) for n in "ab")
    for key, weight in one.state_dict.items():
        assert bit_equal(weight, two.state_dict[key]), key
    rest = [bits.split(w)[1] for k, w in one.state_dict.items() if k.endswith("qkv.weight")]
    assert any(r.any() for r in rest)  # more than bf16 holds


def test_mixed_precision_off_is_refused_and_fp16_stays_exact(train, capsys):
    assert train("none", "--state", "exact16") == 2
    shown = capsys.readouterr().err
    assert "--state exact16 computes with bf16 weights" in shown
    assert len(shown.strip().splitlines()) == 1
    half = devices.Precision(torch.float16, True, "cuda")
    assert devices.for_state("fast", half, True)[:2] == ("exact", half)


def test_samples_are_written_from_bf16_weights(train, mixed):
    Path("prompts.json").write_text('{"prompts": {"one": "abc"}}')
    more = ("--eval_prompts_file", "prompts.json", "--eval_max_new_tokens", "4")
    assert train("run", *flags("exact16", *more)) == 0
    assert all(e["gen"]["one"] for e in events("run", "eval"))


LLAMA = {"mlp_type": "swiglu", "norm_type": "rmsnorm", "pos_encoding": "rope"}


@pytest.mark.parametrize("state", LAYOUTS)
@pytest.mark.parametrize("changes", [{}, {**LLAMA, "tie_weights": True}], ids=["gpt", "llama"])
def test_the_bytes_counted_are_those_that_are_there(state, changes):
    model, optimizer = made(state, n_embd=256, vocab_size=512, **changes)
    accumulate(model, 0)
    optimizer.step()
    rest = getattr(optimizer, "remainders", {}).values()
    kept = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    counted = accounting.state_bytes(model.config, state)
    assert size([*model.parameters(), *rest]) == counted.weights
    assert size(p.grad for p in model.parameters()) == counted.gradients
    assert size(kept) == counted.moments
