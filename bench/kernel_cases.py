"""What bench_kernels.py times: operators, shapes, and who computes them.

Every provider of a case gets the same tensors, the same upstream gradients and is asked for the
same gradients. Peers are used where they are installed; one that is not is named in the results
with the reason, never replaced by a guess.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peers import Function, Peers, liger_head_arguments, liger_swiglu
from torch import Tensor

from mypt_fast import kernels, presets
from mypt_fast.accounting import swiglu_hidden

EPS = 1e-6
LIGER_BUDGETS = (8, 16)  # of its fused head: multiples of its default memory for logits
NATIVE_CHUNKS = (128, 256, 512, 1024)


@dataclass(frozen=True)
class Shape:
    """T tokens in sequences of `sequence`, width d, feed-forward width f, vocabulary V."""

    name: str
    tokens: int
    width: int
    hidden: int
    vocab: int
    heads: int
    sequence: int


def preset_shape(name: str) -> Shape:
    """The shape a preset trains at: its batch, its block size, its widths."""
    cfg = presets.load(name).model
    tokens, hidden = cfg.batch_size * cfg.block_size, swiglu_hidden(cfg.n_embd)
    return Shape(name, tokens, cfg.n_embd, hidden, cfg.vocab_size, cfg.n_head, cfg.block_size)


FLAGSHIP = "base/750M_unified_v1"
PRESETS = (FLAGSHIP, "500M_1024", "150M_1024", "tiny")
BIG_HEAD = Shape("BT8192 H4096 V128256", 8192, 4096, 0, 128_256, 0, 0)
CPU_HEAD = Shape("N1024 D512 V50304", 1024, 512, 0, 50_304, 0, 0)


@dataclass
class Case:
    """One operator at one shape.

    `writes_over` names providers that write into their inputs: those are restored, untimed,
    before each of their samples. `grad_into` names those that add the gradient of an input, given
    by its number, to a buffer instead of returning it. `bytes_moved` counts what any implementation
    must read and write once; `flops` the matmuls of forward and backward without recomputation.
    """

    op: str
    shape: Shape
    dtype: torch.dtype
    inputs: list[Tensor]
    upstream: list[Tensor]
    providers: dict[str, Function]
    bytes_moved: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    writes_over: frozenset[str] = frozenset()
    grad_into: dict[str, tuple[int, Tensor]] = field(default_factory=dict)


def draw(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for every run of the same shape."""
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def compiled(function: Function) -> Function:
    """torch.compile of one function, at one shape."""
    return torch.compile(function, dynamic=False)


def _norm_providers(
    op: str, ours: Function, eager: Function, impl: str, peers: Peers
) -> tuple[dict[str, Function], frozenset[str]]:
    found: dict[str, Function] = {
        "ours": functools.partial(ours, impl=impl),
        "eager": eager,
        "compile": compiled(eager),
    }
    liger = {
        "rms_norm": ("rms_norm", "LigerRMSNormFunction", (EPS, 0.0, "llama", False)),
        "add_rms_norm": (
            "fused_add_rms_norm", "LigerFusedAddRMSNormFunction", (EPS, 0.0, "llama", False),
        ),
        "layer_norm": ("layer_norm", "LigerLayerNormFunction", (EPS,)),
    }[op]  # fmt: skip
    function = peers.get("liger", f"liger_kernel.ops.{liger[0]}", liger[1])
    if function is not None:
        found["liger"] = lambda *t, f=function, c=liger[2]: f.apply(*t, *c)
    if op == "layer_norm":
        return found, frozenset()
    rmsnorm = peers.get("quack", "quack", "rmsnorm")
    if rmsnorm is not None and op == "rms_norm":
        found["quack"] = lambda x, w: rmsnorm(x, w, eps=EPS)
    elif rmsnorm is not None:
        found["quack"] = lambda x, r, w: rmsnorm(x, w, residual=r, eps=EPS, prenorm=True)
    return found, frozenset({"liger"})


def norm_case(op: str, shape: Shape, dtype: torch.dtype, device: str, peers: Peers) -> Case:
    """RMSNorm, LayerNorm, or the add with RMSNorm, over (T, d)."""
    T, d = shape.tokens, shape.width
    x, r = draw(device, dtype, T, d), draw(device, dtype, T, d, seed=1)
    w = 1 + 0.1 * draw(device, dtype, d)

    def add_eager(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = r + x
        return F.rms_norm(h, (d,), w, EPS), h

    inputs, eager = {
        "rms_norm": ([x, w], lambda x, w: F.rms_norm(x, (d,), w, EPS)),
        "layer_norm": (
            [x, w, 0.1 * draw(device, dtype, d, seed=2)],
            lambda x, w, b: F.layer_norm(x, (d,), w, b, EPS),
        ),
        "add_rms_norm": ([x, r, w], add_eager),
    }[op]
    function = functools.partial(getattr(kernels, op), eps=EPS)
    providers, over = _norm_providers(op, function, eager, ours_impl(device), peers)
    tensors = 4 if op == "add_rms_norm" else 2
    size = T * d * dtype.itemsize
    return Case(
        op, shape, dtype, inputs,
        [draw(device, dtype, T, d, seed=s) for s in (3, 4)[: 2 if op == "add_rms_norm" else 1]],
        providers,
        {"forward": tensors * size, "backward": (4 if op == "add_rms_norm" else 3) * size},
        notes={"liger": "in_place=False: the upstream gradient is used again"},
        writes_over=over,
    )  # fmt: skip


def eager_swiglu(gate_up: Tensor) -> Tensor:
    """What a model without kernels writes."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_case(shape: Shape, dtype: torch.dtype, device: str, peers: Peers) -> Case:
    """silu(gate) * up of a packed (T, 2f)."""
    T, f = shape.tokens, shape.hidden
    providers: dict[str, Function] = {
        "ours": functools.partial(kernels.swiglu, impl=ours_impl(device)),
        "eager": eager_swiglu,
        "compile": compiled(eager_swiglu),
    }
    liger = liger_swiglu(peers)
    if liger is not None:
        providers["liger"] = liger
    size = T * f * dtype.itemsize
    return Case(
        "swiglu", shape, dtype, [draw(device, dtype, T, 2 * f)], [draw(device, dtype, T, f)],
        providers, {"forward": 3 * size, "backward": 5 * size}, writes_over=frozenset({"liger"}),
    )  # fmt: skip


def mlp_case(shape: Shape, dtype: torch.dtype, device: str, peers: Peers) -> Case:
    """The SwiGLU feed-forward over a packed weight, per save mode."""
    T, d, f = shape.tokens, shape.width, shape.hidden

    def around(activation: Function) -> Function:
        return lambda x, w_in, w_out: F.linear(activation(F.linear(x, w_in)), w_out)

    providers: dict[str, Function] = {
        f"ours {save}": functools.partial(kernels.swiglu_mlp, save=save, impl=ours_impl(device))
        for save in ("all", "gate_up", "input")
    }
    providers |= {"eager": around(eager_swiglu), "compile": compiled(around(eager_swiglu))}
    liger = liger_swiglu(peers)
    if liger is not None:
        providers["liger"] = around(liger)
    gemms = 6 * T * d * f
    return Case(
        "swiglu_mlp", shape, dtype,
        [
            draw(device, dtype, T, d),
            draw(device, dtype, 2 * f, d) * d**-0.5,
            draw(device, dtype, d, f) * f**-0.5,
        ],
        [draw(device, dtype, T, d, seed=1)], providers,
        flops={"forward": gemms, "backward": 2 * gemms, "both": 3 * gemms},
        notes={"ours input": "7 GEMMs run; the rate counts the 6 that are needed"},
        writes_over=frozenset({"liger"}),
    )  # fmt: skip


def rope_case(shape: Shape, dtype: torch.dtype, device: str, peers: Peers) -> Case:
    """Split a packed qkv projection and rotate q and k."""
    H, T = shape.heads, shape.sequence
    B, D = shape.tokens // T, shape.width // H
    cos, sin = kernels.rope_tables(T, D, 1e4, 1.0, device)

    def split(qkv: Tensor) -> list[Tensor]:
        return [t.view(B, T, H, D).transpose(1, 2) for t in qkv.split(H * D, 2)]

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def eager(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = split(qkv)
        return turn(q), turn(k), v

    providers: dict[str, Function] = {
        "ours": lambda qkv: kernels.rope_qkv(qkv, cos, sin, H, impl=ours_impl(device)),
        "eager": eager,
        "compile": compiled(eager),
    }
    function = peers.get("liger", "liger_kernel.ops.rope", "LigerRopeFunction")
    if function is not None:
        wide = [torch.cat((t, t), -1).unsqueeze(0) for t in (cos, sin)]

        def liger(qkv: Tensor) -> tuple[Tensor, ...]:
            q, k, v = split(qkv)
            return *function.apply(q, k, *wide), v

        providers["liger"] = liger
    size = shape.tokens * H * D * dtype.itemsize
    upstream = [draw(device, dtype, B, T, H, D, seed=s).transpose(1, 2) for s in (1, 2, 3)]
    return Case(
        "rope_qkv", shape, dtype, [draw(device, dtype, B, T, 3 * H * D)], upstream, providers,
        {"forward": 4 * size, "backward": 6 * size}, writes_over=frozenset({"liger"}),
        notes={"liger": "q and k are parts of qkv: autograd joins their gradients with that of v"},
    )  # fmt: skip


def targets_for(shape: Shape, device: str) -> Tensor:
    """Random targets, none ignored."""
    generator = torch.Generator(device).manual_seed(5)
    return torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)


def cross_entropy_case(shape: Shape, dtype: torch.dtype, device: str, peers: Peers) -> Case:
    """The mean loss of logits that exist."""
    T, V = shape.tokens, shape.vocab
    targets = targets_for(shape, device)

    def eager(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)

    providers: dict[str, Function] = {
        "ours": lambda z: kernels.cross_entropy(z, targets, impl=ours_impl(device)),
        "eager": eager,
        "compile": compiled(eager),
    }
    liger = peers.get("liger", "liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction")
    if liger is not None:
        options = (None, -100, 0.0, 0.0, "mean", None, False)
        providers["liger"] = lambda z: liger.apply(z, targets, *options)[0]
    quack = peers.get("quack", "quack", "cross_entropy")
    if quack is not None:
        providers["quack"] = lambda z: quack(z, targets, reduction="mean")
    size = T * V * dtype.itemsize
    return Case(
        "cross_entropy", shape, dtype, [draw(device, dtype, T, V)],
        [torch.ones((), device=device)], providers,
        {"forward": size, "backward": 2 * size, "both": 3 * size},
        notes={
            "eager": "logits in fp32, as autocast computes the loss",
            "liger": "makes the gradient in its forward, over the logits",
        },
        writes_over=frozenset({"liger"}),
    )  # fmt: skip


def head_case(shape: Shape, dtype: torch.dtype, device: str, peers: Peers) -> Case:
    """Linear cross-entropy: the mean loss of x W^T, gradients of x and W."""
    T, d, V = shape.tokens, shape.width, shape.vocab
    targets = targets_for(shape, device)
    gemm = 2 * T * d * V
    case = Case(
        "linear_cross_entropy", shape, dtype,
        [draw(device, dtype, T, d), (draw(device, dtype, V, d, seed=1) * d**-0.5)],
        [torch.ones((), device=device)], {},
        flops={"both": 3 * gemm},
        notes={
            "ours": "dW is summed in fp32, then rounded to the dtype of W: the peers' terms",
            "eager": "logits in fp32, as autocast computes the loss",
            "liger": "dW is summed in the dtype of W",
        },
    )  # fmt: skip

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w).float(), targets)

    def ours(x: Tensor, w: Tensor, **options: Any) -> Tensor:
        return kernels.linear_cross_entropy(x, w, None, targets, **options)

    case.providers = {
        "ours": functools.partial(ours, impl=ours_impl(device)),
        "eager": eager,
        "compile": compiled(eager),
    }
    if device == "cpu":
        case.providers["ours inductor"] = functools.partial(ours, impl="inductor")
        case.notes["ours inductor"] = "the step on a chunk of logits compiled"
    else:
        buffer = torch.zeros(V, d, device=device)
        case.providers["ours into grad"] = functools.partial(ours, impl="triton", grad_into=buffer)
        case.grad_into["ours into grad"] = (1, buffer)
        case.notes["ours into grad"] = "dW added in fp32 to a buffer that is there already"
    _add_native(case, targets, peers)
    _add_head_peers(case, targets, peers)
    return case


def _add_native(case: Case, targets: Tensor, peers: Peers) -> None:
    """PyTorch's own chunked head (2.13): as it comes, and at each fixed number of rows."""
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        peers.absent["native"] = f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
        return

    def native(x: Tensor, w: Tensor, chosen: Any) -> Tensor:
        return function(x, w, targets, options=chosen)

    case.providers["native"] = functools.partial(native, chosen=options())
    for rows in NATIVE_CHUNKS if case.inputs[0].device.type == "cpu" else (2048,):
        chosen = options(batch_chunk_size=min(rows, case.shape.tokens), chunking_method=None)
        case.providers[f"native {rows} rows"] = functools.partial(native, chosen=chosen)


def _add_head_peers(case: Case, targets: Tensor, peers: Peers) -> None:
    module = "liger_kernel.ops.fused_linear_cross_entropy"
    liger = peers.get("liger", module, "LigerFusedLinearCrossEntropyFunction")
    if liger is not None:
        case.providers["liger"] = lambda x, w: liger.apply(x, w, targets)[0]
        for budget in LIGER_BUDGETS:
            tuned = liger_head_arguments(liger, budget)
            if tuned is None:
                peers.absent["liger tuned"] = "this version takes no chunk_mem_const"
                break
            case.providers[f"liger C={budget}"] = lambda x, w, t=tuned: liger.apply(
                x, w, targets, *t
            )[0]
    quack = peers.get("quack", "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    if quack is not None:
        case.providers["quack"] = lambda x, w: quack(x, w, targets)


def ours_impl(device: str) -> str:
    """What stands in the column "ours"."""
    return "triton" if device == "cuda" else "auto"


BUILDERS: dict[str, Callable[..., Case]] = {
    "linear_cross_entropy": head_case,
    "cross_entropy": cross_entropy_case,
    "rms_norm": functools.partial(norm_case, "rms_norm"),
    "add_rms_norm": functools.partial(norm_case, "add_rms_norm"),
    "layer_norm": functools.partial(norm_case, "layer_norm"),
    "swiglu": swiglu_case,
    "swiglu_mlp": mlp_case,
    "rope_qkv": rope_case,
}


def plan(device: str) -> list[tuple[str, Shape]]:
    """What is timed, most telling first: a deadline cuts the tail."""
    if device == "cpu":
        return [("linear_cross_entropy", CPU_HEAD)]
    shapes = [preset_shape(name) for name in PRESETS]
    cases = [(op, shapes[0]) for op in BUILDERS]
    cases.insert(1, ("linear_cross_entropy", BIG_HEAD))
    return cases + [(op, shape) for shape in shapes[1:] for op in BUILDERS]
