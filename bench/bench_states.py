"""State layouts: the loss each comes to, from equal starts on equal data, and what a step costs.

pytest bench/bench_states.py --benchmark-only        the optimizer's step in each layout
python bench/bench_states.py                         the report: a char model trained in every
    layout from several seeds, bytes held, the optimizers' steps in turn, what 8 bits lose, and
    whether a run resumes; saved to bench/results/cpu/states.json

Beside the layouts: `exact` with a bf16 residual stream and, where torchao can be imported, its
8-bit AdamW over fp32 weights and over bf16 weights with stochastic rounding.
"""

import importlib
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from record import machine, save
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mypt_fast import accounting
from mypt_fast.checkpoint import tensors
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.kernels.reference import adamw as bits
from mypt_fast.model import GPT
from mypt_fast.training.optim import clip, make_optimizer, parameter_groups
from mypt_fast.training.schedule import learning_rate
from mypt_fast.training.split_adamw import SMALLEST_CODED

LAYOUTS = ("exact", "exact16", "fast")
STREAM16 = "exact, bf16 stream"
TORCHAO = ("torchao, fp32 weights", "torchao, bf16 weights")
SEEDS = (1, 2, 3)
STEPS, BATCH, WINDOWS = 300, 16, 256
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 256}
WIDE = {**SHAPE, "n_layer": 4, "n_head": 8, "n_embd": 512}  # where arithmetic outweighs calls
BYTES = 3_000_000  # of the corpus; the last tenth is validation
ROUNDS = 15
SAVED_AT = 20  # steps before the save of a resumed run, and after it


def torchao(part: str = "optim") -> Any:
    """A module of torchao; None where it cannot be imported."""
    try:
        return importlib.import_module(f"torchao.{part}")
    except ImportError:
        return None


def corpus() -> Tensor:
    """Python's own sources as bytes, in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(f.read_bytes() for f in files)[:BYTES]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def made(
    variant: str, seed: int, steps: int = STEPS, shape: dict[str, int] | None = None
) -> tuple[GPT, Any, TrainConfig]:
    """A model, its optimizer and settings."""
    model = GPT(ModelConfig(**(shape or SHAPE), dropout=0.0), seed=seed).train()
    cfg = TrainConfig(
        state=variant if variant in LAYOUTS else "exact",
        learning_rate=1e-3, max_iters=steps, warmup_iters=steps // 10, seed=seed,
    )  # fmt: skip
    if variant == STREAM16:
        model.residual = torch.bfloat16
    if variant not in TORCHAO:
        return model, make_optimizer(model, cfg), cfg
    rounded = variant == "torchao, bf16 weights"
    optimizer = torchao().AdamW8bit(
        parameter_groups(model.bfloat16() if rounded else model, cfg.weight_decay),
        lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8, bf16_stochastic_round=rounded,
    )  # fmt: skip
    return model, optimizer, cfg


def windows(data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets at `starts`."""
    at = starts[:, None] + torch.arange(SHAPE["block_size"] + 1)
    tokens = data[at].long()
    return tokens[:, :-1], tokens[:, 1:]


def mean_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Per token, computed in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.summed_loss(x, y) / y.numel()


def advance(
    model: GPT, optimizer: Any, cfg: TrainConfig, first: int, last: int
) -> tuple[list[float], float]:
    """Train from step `first` to before `last`; the losses, and the last gradient norm."""
    data = corpus()
    cut = len(data) * 9 // 10
    generator = torch.Generator().manual_seed(cfg.seed + first)
    torch.manual_seed(cfg.seed + first)  # of stochastic rounding
    losses, norm = [], 0.0
    for step in range(first, last):
        starts = torch.randint(cut - SHAPE["block_size"] - 1, (BATCH,), generator=generator)
        loss = mean_loss(model, *windows(data[:cut], starts))
        loss.backward()
        norm = float(clip(optimizer, model, 1.0))
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's compiled step takes no other number
                group["lr"].fill_(learning_rate(step, cfg))
            else:
                group["lr"] = learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norm


def trained(variant: str, seed: int, steps: int = STEPS) -> tuple[dict[str, Any], GPT, Any]:
    """Train one model; its losses and the gradient norm at the end, it and its optimizer."""
    model, optimizer, cfg = made(variant, seed, steps)
    losses, norm = advance(model, optimizer, cfg, 0, steps)
    data = corpus()
    held_out = data[len(data) * 9 // 10 :]
    starts = torch.linspace(0, len(held_out) - SHAPE["block_size"] - 2, WINDOWS).long()
    with torch.no_grad():
        val = mean_loss(model.eval(), *windows(held_out, starts)).item()
    row = {
        "variant": variant, "seed": seed, "steps": steps, "val_loss": val,
        "train_loss_last_50": sum(losses[-50:]) / len(losses[-50:]), "grad_norm": norm,
        "losses": [round(x, 4) for x in losses[9::10]],
    }  # fmt: skip
    return row, model, optimizer


def nbytes(tensor: Tensor) -> int:
    """Of its storage; of every inner tensor where it is made of some."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def held(model: GPT, optimizer: Any) -> dict[str, int]:
    """Bytes of the tensors that stay for the whole run, with gradients at hand."""
    rest = getattr(optimizer, "remainders", {}).values()
    found = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in found),
        "weight_bytes": sum(nbytes(t) for t in (*found, *rest)),
        "gradient_bytes": sum(nbytes(p.grad) for p in found if p.grad is not None),
        "moment_bytes": sum(
            nbytes(t) for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)
        ),
    }


def steps_in_turn(variants: list[str], shape: dict[str, int]) -> list[dict[str, Any]]:
    """The optimizers alone, a step each in turn, on a CPU; and what each holds.

    The first step, which makes the state and compiles torchao's, is beside the samples.
    """
    rows, steps = [], []
    for variant in variants:
        model, optimizer, _ = made(variant, 1, shape=shape)
        mean_loss(model, *windows(corpus(), torch.arange(BATCH))).backward()
        began = time.perf_counter()
        optimizer.step()
        first = time.perf_counter() - began
        steps.append(optimizer.step)
        row = {"step": variant, **held(model, optimizer), "first_s": first, "seconds": []}
        rows.append(row)
    for _ in range(ROUNDS):
        for row, step in zip(rows, steps, strict=True):
            began = time.perf_counter()
            step()
            row["seconds"].append(time.perf_counter() - began)
    return rows


def codecs() -> dict[str, Callable[[Tensor, bool], Tensor]]:
    """What a moment is after one trip through 8 bits: functions of it and whether it is signed."""

    def ours(x: Tensor, signed: bool) -> Tensor:
        if signed:
            return bits.decode_first(*bits.encode_first(x))
        return bits.decode_second(*bits.encode_second(x))

    def theirs(x: Tensor, signed: bool) -> Tensor:
        state = torchao("optim.subclass_8bit").OptimState8bit.zeros(x.shape, signed, bits.BLOCK)
        return state.copy_(x).dequantize()

    return {"ours": ours, "torchao": theirs} if torchao() else {"ours": ours}


def round_trips(model: GPT, optimizer: Any) -> list[dict[str, Any]]:
    """What 8 bits lose of the moments that a run in `exact` ends with, by whose codes.

    Errors are norms over norms, of all coded matrices together; `zeroed` and `changed_again` are
    shares of elements, the latter of a second trip, beside its largest relative change. `update`
    is of the next step, with a gradient of a batch, in units of the learning rate.
    """
    mean_loss(model, *windows(corpus(), torch.arange(BATCH))).backward()
    found = [p for p in model.parameters() if p.dim() > 1 and p.numel() >= SMALLEST_CODED]
    states = [optimizer.state[p] for p in found]
    pairs = [(s["exp_avg"], s["exp_avg_sq"]) for s in states]
    gradient = flat(p.grad for p in found)

    def update(moments: list[tuple[Tensor, Tensor]]) -> Tensor:
        m = 0.9 * flat(m for m, _ in moments) + 0.1 * gradient
        return m / ((0.95 * flat(v for _, v in moments) + 0.05 * gradient**2).sqrt() + 1e-8)

    rows = []
    for name, trip in codecs().items():
        once = [(trip(m, True), trip(v, False)) for m, v in pairs]
        twice = [(trip(m, True), trip(v, False)) for m, v in once]
        row: dict[str, Any] = {"round_trip": name}
        for at, which in enumerate(("first", "second")):
            x, y, z = (flat(p[at] for p in some) for some in (pairs, once, twice))
            row[which] = error(y, x)
            row[f"{which}_zeroed"] = ((y == 0) & (x != 0)).double().mean().item()
            row[f"{which}_changed_again"] = [
                (z != y).double().mean().item(),
                ((z - y).abs() / y.abs().clamp(min=1e-38)).max().item(),
            ]
        before, after = update(pairs), update(once)
        row["update"] = error(after, before)
        row["update_largest"] = [before.abs().max().item(), after.abs().max().item()]
        rows.append(row)
    return rows


def flat(some: Any) -> Tensor:
    """All elements of some tensors, fp64."""
    return torch.cat([t.reshape(-1).double() for t in some])


def error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


def outcome(work: Callable[[], Any], path: Path) -> str:
    """Return "read", or why `path` was not, in a line without its folder."""
    try:
        work()
    except Exception as e:  # a pickle's refusals have many types
        text = e.stderr if isinstance(e, subprocess.CalledProcessError) else f"{e}"
        lines = [s for s in text.splitlines() if "Error: " in s] or text.splitlines()
        why = lines[0].partition(". ")[0].replace(str(path), path.name)
        return f"refused: {why}"[:150]
    return "read"


def persistence(variant: str, folder: Path) -> dict[str, Any]:
    """Who can read the state of a run, and whether a resumed run is the same bit for bit.

    The readers are torch.load(weights_only=True), here and in a process that has not imported
    torchao, and that of our checkpoints.
    """
    path = folder / "run" / "state.pt"
    path.parent.mkdir()
    model, optimizer, cfg = made(variant, 1, 2 * SAVED_AT)
    advance(model, optimizer, cfg, 0, SAVED_AT)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    advance(model, optimizer, cfg, SAVED_AT, 2 * SAVED_AT)
    again, other, _ = made(variant, 2, 2 * SAVED_AT)
    content = torch.load(path, weights_only=True)
    again.load_state_dict(content["model"])
    other.load_state_dict(content["optimizer"])
    advance(again, other, cfg, SAVED_AT, 2 * SAVED_AT)
    ended = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    script = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
    alone = [sys.executable, "-c", script, str(path)]
    caught: dict[str, Any] = {"check": True, "capture_output": True, "text": True}
    return {
        "persistence": variant, "file_bytes": path.stat().st_size,
        "weights_only": outcome(lambda: torch.load(path, weights_only=True), path),
        "weights_only_elsewhere": outcome(lambda: subprocess.run(alone, **caught), path),
        "our_reader": outcome(lambda: tensors.load(path), path),
        "resumes_bit_for_bit": all(torch.equal(a, b) for a, b in ended),
    }  # fmt: skip


@pytest.mark.parametrize("state", LAYOUTS)
def test_step(benchmark: Any, state: str) -> None:
    """The optimizer alone, on a CPU, where every layout goes over fp32 forms of its tensors."""
    model, optimizer, _ = made(state, 1)
    mean_loss(model, *windows(corpus(), torch.arange(BATCH))).backward()
    benchmark.extra_info["state_bytes"] = accounting.state_bytes(model.config, state).total
    benchmark(optimizer.step)


def main() -> None:
    """Run, print and save everything."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    theirs = list(TORCHAO) if torchao() else []
    rows: list[dict[str, Any]] = []
    # first, where nothing is compiled yet
    steps = [r for s in (SHAPE, WIDE) for r in steps_in_turn([*LAYOUTS, *theirs], s)]
    for seed in SEEDS:
        for variant in (*LAYOUTS, STREAM16, *theirs):
            row, model, optimizer = trained(variant, seed)
            rows.append(row)
            print({k: v for k, v in row.items() if k != "losses"}, flush=True)
            if (variant, seed) == ("exact", SEEDS[0]):
                lost = round_trips(model, optimizer)
    rows += [*steps, *lost]
    for variant in ("exact", "fast", *theirs):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(persistence(variant, Path(folder)))
    facts = {**machine(), "shape": SHAPE, "batch": BATCH, "seconds": time.perf_counter() - began}
    if theirs:
        facts["torchao"] = importlib.import_module("torchao").__version__
    else:
        facts["absent"] = {"torchao": "cannot be imported"}
    print(save("states", facts, rows))


if __name__ == "__main__":
    main()
