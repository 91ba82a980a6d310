"""AdamW over split weights and 8-bit moments: exact where it says so, and codes that stay."""

import struct

import pytest
import torch

from mypt_fast.kernels.adamw import Slot, adamw_step
from mypt_fast.kernels.reference import adamw as reference

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def bits_of(t):
    return t.contiguous().view(torch.int32)


def from_bits(*values):
    return torch.tensor([struct.unpack("<f", struct.pack("<I", v))[0] for v in values])


# zero, denormals, ties to even and to odd, the carry into the exponent, the ends of the range
EDGES = [
    0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x00800000,
    0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x3FFF8000, 0x3FFFFFFF,
    0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000,
]  # fmt: skip
ADVERSARIAL = from_bits(*EDGES, *(e | 0x80000000 for e in EDGES))


def test_every_master_comes_back_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator)
    every_low_half = torch.arange(1 << 16) + 0x3F800000
    masters = torch.cat((some, every_low_half)).to(torch.int32).view(torch.float32)
    masters = torch.cat((masters[~masters.isnan()], ADVERSARIAL))
    weight, rest = reference.split(masters)
    assert torch.equal(bits_of(reference.merge(weight, rest)), bits_of(masters))
    # the nearest bf16, torch's own but for ties, which go away from zero
    own = masters.bfloat16().view(torch.int16)
    differ = own != weight.view(torch.int16)
    assert set((bits_of(masters)[differ] & 0xFFFF).tolist()) == {0x8000}
    assert (weight[differ].float().abs() > masters[differ].bfloat16().float().abs()).all()


def test_a_nan_stays_a_nan():
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000]).to(torch.int32)
    weight, rest = reference.split(nans.view(torch.float32))
    assert weight.isnan().all()
    assert reference.merge(weight, rest).isnan().all()


@pytest.mark.parametrize("lr", [3e-3, 1e30])
def test_split_weights_take_1000_steps_like_fp32_weights(lr):
    """Equal gradients, equal masters and moments: bit for bit, against torch's own AdamW."""
    generator = torch.Generator().manual_seed(1)
    shape = (37, 41)  # no multiple of a vector register
    start = torch.randn(shape, generator=generator)
    start.view(-1)[: len(ADVERSARIAL)] = ADVERSARIAL
    settings = {**SETTINGS, "lr": lr}
    exact = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([exact], fused=True, **settings)
    weight, rest = reference.split(start)
    m, v, count = torch.zeros(shape), torch.zeros(shape), torch.zeros(())
    edges = ADVERSARIAL[ADVERSARIAL.isfinite()]
    for n in range(1000):
        g = torch.randn(shape, generator=generator) * 10.0 ** (n % 9 - 6)
        if n % 3 == 0:
            g.view(-1)[20 : 20 + len(edges)] = edges * (1 if n % 2 else -1e-19)
        exact.grad = g
        optimizer.step()
        slot = Slot(weight, g, m, v, count, rest)
        adamw_step([slot], impl="reference", **settings)
        if n % 50 == 49:
            ours, theirs = reference.merge(weight, rest), exact.detach()
            number = ~theirs.isnan()
            assert torch.equal(ours.isnan(), ~number)
            assert torch.equal(bits_of(ours)[number], bits_of(theirs)[number])
    state = optimizer.state[exact]
    for ours, theirs in ((m, state["exp_avg"]), (v, state["exp_avg_sq"]), (count, state["step"])):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    if lr < 1:  # the weights really moved, and not to one place
        moved = (reference.merge(weight, rest) - start).view(-1)[100:]
        assert moved.abs().min() > 0
        assert moved.unique().numel() > 1000


@pytest.mark.parametrize("scale", [1e-30, 3e-25, 1e-12, 0.7, 1.0, 3.3e20, 3e38])
def test_codes_that_are_read_and_written_again_are_the_same(scale):
    """Every code under many scales: what a checkpoint holds in fp32 brings back the bits."""
    generator = torch.Generator().manual_seed(2)
    factors = 1 + torch.rand(400, generator=generator)
    scales = (factors * scale).clamp(max=3.4e38).to(torch.float32)
    first = torch.arange(-127, 129).clamp(max=127).to(torch.int8).repeat(400)
    second = torch.arange(256).to(torch.uint8).repeat(400)
    for codes, decode, encode in (
        (first, reference.decode_first, reference.encode_first),
        (second, reference.decode_second, reference.encode_second),
    ):
        again, of_again = encode(decode(codes, scales))
        assert torch.equal(again, codes)
        assert torch.equal(bits_of(of_again), bits_of(scales))


def test_codes_are_near_what_they_stand_for():
    generator = torch.Generator().manual_seed(3)
    m = torch.randn(5, 333, generator=generator)
    v = m.square() * torch.rand(5, 333, generator=generator)
    first = reference.decode_first(*reference.encode_first(m))
    second = reference.decode_second(*reference.encode_second(v))
    largest = m.abs().max()
    assert ((first - m).abs() <= 0.01 * (m.abs() * largest).sqrt() + 2e-5 * largest).all()
    near = v > 1e-3 * v.max()
    assert ((second - v).abs()[near] <= 0.06 * v[near]).all()
    assert (second[v > 0] > 0).all()  # a zero there would make an update without bound


def test_odd_blocks_and_blocks_of_nothing():
    for n in (1, 255, 256, 257, 1000):
        x = torch.zeros(n)
        assert torch.equal(reference.decode_first(*reference.encode_first(x)), x)
        x[-1] = -2.0
        codes, scales = reference.encode_first(x)
        assert scales.shape == (-(-n // 256),)
        assert torch.equal(reference.decode_first(codes, scales), x)


def coded(start, dtype, device="cpu"):
    """A slot of the layout `fast` at a first step."""
    weight, rest = reference.split(start)
    zeros = torch.zeros_like(start)
    m, m_scales = reference.encode_first(zeros)
    v, v_scales = reference.encode_second(zeros)
    tensors = [weight, zeros.to(dtype), m, v, torch.zeros(()), rest, m_scales, v_scales]
    w, g, m, v, n, rest, a, b = (t.to(device) for t in tensors)
    return Slot(w, g, m, v, n, rest, (a, b))


KINDS = [(True, "fp32", False), (True, "bf16", True), (False, "bf16", True),
         (False, "fp32", False), (False, "fp32", True)]  # fmt: skip


def of_kind(shape, split, gradient, is_coded, generator, device):
    """A slot in the middle of a training, and its fp32 gradients to come."""
    start = torch.randn(shape, generator=generator)
    m = 0.1 * torch.randn(shape, generator=generator)
    v = 0.01 * torch.rand(shape, generator=generator)
    v.view(-1)[:5], m.view(-1)[:5] = 0.0, 0.0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[gradient]
    weight, rest = reference.split(start) if split else (start, None)
    scales = None
    if is_coded:
        (m, of_m), (v, of_v) = reference.encode_first(m), reference.encode_second(v)
        scales = (of_m.to(device), of_v.to(device))
    rest = None if rest is None else rest.to(device)
    empty = torch.zeros(shape, dtype=dtype)
    tensors = (t.to(device) for t in (weight, empty, m, v, torch.tensor(7.0)))
    return Slot(*tensors, rest, scales)


def seen(slot):
    """fp32 weight and moments of a slot."""
    w = slot.weight if slot.remainder is None else reference.merge(slot.weight, slot.remainder)
    if slot.scales is None:
        return w, slot.first, slot.second
    a, b = slot.scales
    return w, reference.decode_first(slot.first, a), reference.decode_second(slot.second, b)


def copied(slot):
    tensors = (slot.weight, slot.gradient, slot.first, slot.second, slot.count)
    rest = None if slot.remainder is None else slot.remainder.clone()
    scales = None if slot.scales is None else tuple(s.clone() for s in slot.scales)
    return Slot(*(t.clone() for t in tensors), rest, scales)


@pytest.mark.parametrize("clipped", [False, True])
def test_one_launch_over_many_tensors_is_the_reference(way, clipped):
    """Every kind and odd size at once; codes may differ where fp32 rounds another way."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(1,), (255,), (257,), (33, 65), (3, 1024), (0, 4)]
    slots = [of_kind(s, *k, generator, way.device) for k in KINDS for s in shapes]
    for slot in slots:
        slot.gradient.copy_(0.1 * torch.randn(slot.gradient.shape, generator=generator))
    wanted = [copied(s) for s in slots]
    scale = torch.tensor(0.37, device=way.device) if clipped else None
    adamw_step(slots, impl=way.impl, scale=scale, **SETTINGS)
    adamw_step(wanted, impl="reference", scale=scale, **SETTINGS)
    for ours, theirs in zip(slots, wanted, strict=True):
        assert float(ours.count) == float(theirs.count) == 8
        coarse = {"rtol": 0.2, "atol": 1e-3} if ours.scales else {"rtol": 1e-5, "atol": 1e-8}
        (w, m, v), (w2, m2, v2) = seen(ours), seen(theirs)
        torch.testing.assert_close(w, w2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(m, m2, **coarse)
        torch.testing.assert_close(v, v2, **coarse)
        if ours.scales:  # a code is off by one at most, and hardly ever
            off = (ours.first.int() - theirs.first.int()).abs()
            off2 = (ours.second.int() - theirs.second.int()).abs()
            for o in (off, off2):
                assert o.numel() == 0 or int(o.max()) <= 1
                assert int(o.sum()) <= max(1, o.numel() // 500)


def test_split_and_whole_weights_move_alike_in_one_implementation(way):
    """The layout exact16 against fp32 weights of the same kernel: bit for bit."""
    start = torch.randn(1111, generator=torch.Generator().manual_seed(5))
    edges = ADVERSARIAL[ADVERSARIAL.isfinite()]
    start[: len(edges)] = edges
    weight, rest = (t.to(way.device) for t in reference.split(start))
    new = lambda: torch.zeros(1111, device=way.device)  # noqa: E731
    slots = [
        Slot(weight, new(), new(), new(), torch.zeros((), device=way.device), rest),
        Slot(start.clone().to(way.device), new(), new(), new(), torch.zeros((), device=way.device)),
    ]
    generator = torch.Generator().manual_seed(6)
    for n in range(20):
        g = torch.randn(1111, generator=generator) * 10.0 ** (n % 5 - 3)
        for slot in slots:
            slot.gradient.copy_(g)
        adamw_step(slots, impl=way.impl, **SETTINGS)
    ours, theirs = seen(slots[0]), seen(slots[1])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits_of(a), bits_of(b))
    assert not torch.equal(theirs[0].cpu()[100:], start[100:])


def test_the_factor_of_clipping_is_applied_in_the_step():
    start, g = torch.randn(300), torch.randn(300)
    one, two = coded(start, torch.float32), coded(start, torch.float32)
    one.gradient.copy_(g * torch.tensor(0.3))
    two.gradient.copy_(g)
    adamw_step([one], impl="reference", **SETTINGS)
    adamw_step([two], impl="reference", scale=torch.tensor(0.3), **SETTINGS)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.remainder, two.remainder)
    assert torch.equal(one.first, two.first)
    assert one.first.any()
    assert torch.equal(two.gradient, g)


def test_bad_input():
    good = {"weight": torch.zeros(4), "gradient": torch.zeros(4), "first": torch.zeros(4),
            "second": torch.zeros(4), "count": torch.zeros(())}  # fmt: skip
    for name, value, text in (
        ("weight", torch.zeros(4, dtype=torch.bfloat16), "expected weight of torch.float32"),
        ("first", torch.zeros(4, dtype=torch.int8), "expected first of torch.float32"),
        ("gradient", torch.zeros(4, dtype=torch.int64), "expected gradient of fp16"),
        ("remainder", torch.zeros(4, dtype=torch.int16), "expected weight of torch.bfloat16"),
    ):
        with pytest.raises(TypeError, match=text):
            adamw_step([Slot(**{**good, name: value})], **SETTINGS)
    with pytest.raises(ValueError, match=r"expected second contiguous, of shape \(4,\)"):
        adamw_step([Slot(**{**good, "second": torch.zeros(5)})], **SETTINGS)
    slot = coded(torch.zeros(300), torch.float32)
    short = Slot(*(getattr(slot, n) for n in ("weight", "gradient", "first", "second", "count")),
                 slot.remainder, (torch.zeros(1), torch.zeros(2)))  # fmt: skip
    with pytest.raises(ValueError, match=r"expected 2 scales each; found \[1, 2\]"):
        adamw_step([short], **SETTINGS)
    with pytest.raises(ValueError, match="impl must be one of"):
        adamw_step([slot], impl="quick", **SETTINGS)
