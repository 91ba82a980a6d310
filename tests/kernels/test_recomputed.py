"""A norm with what reads it, as operators that make all but the stream again in the backward."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast import kernels
from mypt_fast.kernels import Join, Norm, linear, norm_mlp, norm_qkv
from mypt_fast.kernels.reference.norm import dropped
from mypt_fast.kernels.reference.rope import rope_qkv
from tests.kernels import oracle

B, T, H, D = 2, 9, 3, 16
C, HIDDEN = H * D, 80
P, SEED = 0.2, 123_456_789_012
TABLES = torch.ones(T, D // 2), torch.zeros(T, D // 2)
CENTERS = pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
JOINS = pytest.mark.parametrize("joins", ["alone", "adds", "drops"])


def draw(*shapes: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        t = torch.randn(*shape, generator=generator)
        t = t * shape[-1] ** -0.5 if len(shape) == 2 else t
        made.append(t.to(device=device, dtype=dtype))
    return made


def seed_of(joins: str, device: str) -> Tensor | None:
    return torch.tensor(SEED, device=device) if joins == "drops" else None


def normed(joins: str, center: bool, x: Tensor, branch: Tensor, w: Tensor, b: Tensor) -> Any:
    """Plain PyTorch: the norm of the joined stream, and the stream."""
    if joins != "alone":
        seed = seed_of(joins, str(x.device))
        x = x + (branch if seed is None else dropped(branch, seed, P).to(branch.dtype))
    if center:
        return F.layer_norm(x, (C,), w, b), x
    return F.rms_norm(x, (C,), w, 1e-6), x


def join_of(joins: str, x: Tensor, branch: Tensor) -> Join:
    p = P if joins == "drops" else 0.0
    return Join(None if joins == "alone" else branch, x, p, seed_of(joins, str(x.device)))


def norm_of(center: bool, w: Tensor, b: Tensor) -> Norm:
    return Norm(w, b if center else None, 1e-5 if center else 1e-6, center)


def used(joins: str, center: bool, inputs: list[Tensor]) -> list[Tensor | None]:
    """Without the tensors that a case has no gradient for: x, branch, norm weight, bias, ..."""
    kept: list[Tensor | None] = list(inputs)
    kept[1] = None if joins == "alone" else kept[1]
    kept[3] = kept[3] if center else None
    return kept


@CENTERS
@JOINS
@pytest.mark.parametrize("rotates", [False, True], ids=["learned", "rope"])
def test_norm_qkv_is_as_exact_as_pytorch(way, dtype, center, joins, rotates):
    rope = kernels.rope_tables(T, D, 1e4, 1.0, way.device)
    inputs = draw(
        (B, T, C), (B, T, C), (C,), (C,), (3 * C, C), (3 * C,), dtype=dtype, device=way.device
    )
    gradients = draw((B, T, 3 * C), (B, T, C), dtype=dtype, device=way.device)

    def ours(x, branch, w, b, weight, bias):
        return norm_qkv(
            join_of(joins, x, branch), norm_of(center, w, b), weight, bias, H,
            rope if rotates else None, impl=way.impl,
        )  # fmt: skip

    def eager(x, branch, w, b, weight, bias):
        y, h = normed(joins, center, x, branch, w, b)
        qkv = F.linear(y, weight, bias)
        if rotates:
            parts = rope_qkv(qkv, *(t.to(qkv.dtype) for t in rope), None, None, None, H, H, 0.0)
            qkv = torch.cat([t.transpose(1, 2).flatten(2) for t in parts], -1)
        return qkv, h

    # two roundings where plain PyTorch, whose rotation is in the narrow dtype too, has three
    oracle.check(ours, eager, used(joins, center, inputs), gradients, factor=2.5)


@CENTERS
@JOINS
@pytest.mark.parametrize("save", ["gate_up", "input"])
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_norm_mlp_is_as_exact_as_pytorch(way, dtype, center, joins, save, gated):
    shapes = [(B, T, C), (B, T, C), (C,), (C,), (HIDDEN, C), (C, HIDDEN)]
    shapes += [(HIDDEN, C)] if gated else [(HIDDEN,), (C,)]
    inputs = draw(*shapes, dtype=dtype, device=way.device)
    gradients = draw((B, T, C), (B, T, C), dtype=dtype, device=way.device)

    def ours(x, branch, w, b, w_in, w_down, *rest):
        pair, biases = ((w_in, rest[0]), (None, None)) if gated else ((w_in, None), rest)
        return norm_mlp(
            join_of(joins, x, branch), norm_of(center, w, b), pair, biases[0], w_down, biases[1],
            save=save, impl=way.impl,
        )  # fmt: skip

    def eager(x, branch, w, b, w_in, w_down, *rest):
        y, h = normed(joins, center, x, branch, w, b)
        if gated:
            return F.linear(F.silu(F.linear(y, w_in)) * F.linear(y, rest[0]), w_down), h
        return F.linear(F.gelu(F.linear(y, w_in, rest[0])), w_down, rest[1]), h

    oracle.check(ours, eager, used(joins, center, inputs), gradients, factor=2.5)


@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_as_exact_as_pytorch(dtype, way, biased):
    x, weight, bias, dy = draw(
        (B, T, C), (HIDDEN, C), (HIDDEN,), (B, T, HIDDEN), dtype=dtype, device=way.device
    )
    oracle.check(linear, F.linear, [x, weight, bias if biased else None], [dy])


def kept_bytes(function) -> int:
    """Bytes that autograd keeps of a call, each storage once."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(sizes.values())


@pytest.mark.parametrize("save", ["gate_up", "input"])
def test_what_is_kept_is_the_stream_the_weights_and_what_was_asked(save):
    inputs = draw(
        (B, T, C), (B, T, C), (C,), (C,), (HIDDEN, C), (HIDDEN, C), (C, HIDDEN),
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    x, branch, w, b, gate, up, down = (t.requires_grad_() for t in inputs)

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            norm_mlp(
                join_of("drops", x, branch), norm_of(True, w, b), (gate, up), None, down, None,
                save=save,
            )  # fmt: skip

    weights = 4 * (3 * HIDDEN * C + 2 * C)
    product = 2 * 2 * HIDDEN * B * T if save == "gate_up" else 0
    seed = 8
    assert kept_bytes(call) == weights + 4 * B * T * C + product + seed


def test_an_operator_is_registered_and_its_fake_is_right():
    rope = kernels.rope_tables(T, D, 1e4, 1.0)
    x, branch, w, weight = draw(
        (B, T, C), (B, T, C), (C,), (3 * C, C), dtype=torch.float32, device="cpu"
    )
    seed = torch.tensor(SEED)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    leaves = [t.requires_grad_() for t in (branch, x, w, weight)]
    torch.library.opcheck(
        torch.ops.mypt_fast.norm_qkv,
        (leaves[0], leaves[1], leaves[2], None, leaves[3], None, *rope, None, seed, H, 1e-6, False,
         P, torch.float32, False),
        test_utils=tests,
    )  # fmt: skip
    gate, up, down, b, bias = draw(
        (HIDDEN, C), (HIDDEN, C), (C, HIDDEN), (C,), (HIDDEN,), dtype=torch.float32, device="cpu"
    )
    for second, b_in in ((up, None), (None, bias)):
        torch.library.opcheck(
            torch.ops.mypt_fast.norm_mlp,
            (leaves[0], leaves[1], leaves[2], b, gate, second, b_in, down, None, seed, 1e-5, True,
             P, "gate_up", torch.float32, False),
            test_utils=tests,
        )  # fmt: skip


def arguments(**changes: Any) -> dict[str, Any]:
    x, branch, w, b, weight = draw(
        (B, T, C), (B, T, C), (C,), (C,), (3 * C, C), dtype=torch.float32, device="cpu"
    )
    made = {"join": Join(branch, x), "norm": Norm(w, b, 1e-5, True), "weight": weight}
    return {**made, "bias": None, "n_head": H, **changes}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a: {"join": Join(a["join"].branch[:1], a["join"].residual)}, ValueError, "branch"),
        (lambda a: {"join": Join(a["join"].branch, a["join"].residual, 0.1)}, ValueError, "seed"),
        (lambda a: {"norm": Norm(a["weight"][0, :3], None, 1e-5, False)}, ValueError, "norm.w"),
        (lambda a: {"weight": a["weight"][:5]}, ValueError, "weight of shape"),
        (lambda a: {"weight": None}, ValueError, r"weight of shape \(K, 48\); found None"),
        (lambda a: {"weight": a["weight"][:, :9]}, ValueError, r"\(K, 48\); found \(144, 9\)"),
        (lambda a: {"join": Join(None, a["join"].residual[0, 0])}, ValueError, r"found \(48,\)"),
        (lambda a: {"join": Join(None, a["join"].residual.sum())}, ValueError, r"found \(\)"),
        (lambda a: {"bias": a["weight"][0]}, ValueError, "bias of shape"),
        (lambda a: {"impl": "inductor"}, ValueError, "makes again"),
        (lambda a: {"rope": kernels.rope_tables(3, D, 1e4, 1.0)}, ValueError, "at most 3"),
        (lambda a: {"rope": kernels.rope_tables(T, 8, 1e4, 1.0)}, ValueError, "cos of shape"),
        (lambda a: {"weight": a["weight"].to(torch.int64)}, TypeError, "int64"),
        (
            lambda a: {"rope": TABLES, "join": Join(None, a["join"].residual[0])}, ValueError,
            r"residual \(B, T, C\) where it rotates; found \(9, 48\)",
        ),
        (
            lambda a: {"rope": TABLES, "n_head": 5}, ValueError,
            "heads of an even width, as rotations need; found width 48 and n_head 5",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, error, words):
    given = arguments()
    with pytest.raises(error, match=f"norm_qkv: .*{words}"):
        norm_qkv(**{**given, **change(given)})


@pytest.mark.parametrize(
    ("gated", "change", "words"),
    [
        (True, {"w_up": (4, C)}, r"w_up of shape \(80, 48\); found \(4, 48\)"),
        (True, {"w_gate": (HIDDEN, 9)}, r"w_gate of shape \(K, 48\); found \(80, 9\)"),
        (True, {"w_gate": (C,)}, r"w_gate of shape \(K, 48\); found \(48,\)"),
        (True, {"w_down": (C, 6)}, r"w_down of shape \(48, 80\); found \(48, 6\)"),
        (True, {"w_down": (5, HIDDEN)}, r"w_down of shape \(48, 80\); found \(5, 80\)"),
        (True, {"b_in": (HIDDEN,)}, r"b_in of shape \(160,\); found \(80,\)"),
        (False, {"w_up": (HIDDEN, 9)}, r"w_up of shape \(K, 48\); found \(80, 9\)"),
        (False, {"b_in": (3,)}, r"b_in of shape \(80,\); found \(3,\)"),
        (False, {"b_down": (1,)}, r"b_down of shape \(48,\); found \(1,\)"),
    ],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_what_does_not_fit_a_feed_forward_is_refused(gated, change, words, grad):
    given = arguments()
    shapes = {"w_up": (HIDDEN, C), "w_down": (C, HIDDEN), **change}
    shapes = {"w_gate": (HIDDEN, C), **shapes} if gated else shapes
    made = {name: torch.zeros(shape) for name, shape in shapes.items()}
    pair = (made["w_gate"], made["w_up"]) if gated else (made["w_up"], None)
    biases = made.get("b_in"), made.get("b_down")
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"^norm_mlp: .*{words}$"):
        norm_mlp(
            given["join"], given["norm"], pair, biases[0], made["w_down"], biases[1],
            save="gate_up",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((C,), (4, C), (3,)), r"bias of shape \(4,\); found \(3,\)"),
        (((2, C), (4, C), (1,)), r"bias of shape \(4,\); found \(1,\)"),
        (((2, C), (4, 9), None), r"weight of shape \(K, 48\); found \(4, 9\)"),
        (((2, C), (C,), None), r"weight of shape \(K, 48\); found \(48,\)"),
        (((2, C), (), None), r"weight of shape \(K, 48\); found \(\)"),
        (((), (4, C), None), r"x \(\.\.\., C\); found \(\)"),
    ],
)
def test_what_does_not_fit_a_matmul_is_refused(shapes, words):
    made = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=f"^linear: .*{words}$"):
        linear(*made)


def test_a_bias_of_a_pair_of_weights_is_packed_as_they_are(way):
    shapes = [(B, T, C), (C,), (HIDDEN, C), (HIDDEN, C), (2 * HIDDEN,), (C, HIDDEN)]
    inputs = draw(*shapes, dtype=torch.float32, device=way.device)
    gradients = draw((B, T, C), dtype=torch.float32, device=way.device)

    def ours(x, w, gate, up, bias, down):
        norm = Norm(w, None, 1e-6, False)
        return norm_mlp(
            Join(None, x), norm, (gate, up), bias, down, None, save="gate_up", impl=way.impl
        )[0]

    def eager(x, w, gate, up, bias, down):
        y, (first, second) = F.rms_norm(x, (C,), w, 1e-6), bias.chunk(2)
        return F.linear(F.silu(F.linear(y, gate, first)) * F.linear(y, up, second), down)

    oracle.check(ours, eager, inputs, gradients, factor=2.5)


def test_another_save_is_refused():
    call = functools.partial(norm_mlp, *(None,) * 6)
    with pytest.raises(ValueError, match="gate_up or input; found 'all'"):
        call(save="all")
