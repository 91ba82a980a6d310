"""Which plan is chosen, and why."""

import dataclasses
import itertools

import pytest

from mypt_fast import accounting, presets
from mypt_fast.config import TrainConfig
from mypt_fast.planner import cards, ceiling, options, search, speed, table
from mypt_fast.planner.operators import Setup
from mypt_fast.recompute import POLICIES

ALL = options.Options()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def device(gib=16, gpu="RTX 5060 Ti"):
    card = cards.find(gpu)
    return search.device_for(search.nominal(card, int(gib * table.GIB)), None, card)


def plans(name, sequences, gib=16, build=table.LEAN):
    return search.search(presets.load(name).model, sequences, device(gib), ALL, build)


def test_tokens_per_step_never_change():
    for plan in plans("base/750M_unified_v1", 96):
        assert plan.setup.sequences == 96
        assert 96 % plan.setup.rows == 0
        assert plan.setup.rows <= plan.setup.cfg.batch_size


def every_plan(cfg, sequences, where):
    """The best rate and the least memory of every layout and policy, of all there are."""
    rates: dict[tuple[str, str], float] = {}
    needs: dict[tuple[str, str], int] = {}
    for layout, policy, chunk, rows in itertools.product(
        ALL.layouts, ALL.policies, ALL.chunks, search.micro_batches(cfg, sequences)
    ):
        setup = Setup(
            cfg, rows, sequences, policy=table.POLICIES[policy], layout=table.LAYOUTS[layout],
            chunk=chunk,
        )  # fmt: skip
        plan, key = search.evaluate(setup, where), (layout, policy)
        needs[key] = min(needs.get(key, plan.peak.total), plan.peak.total)
        if plan.fits:
            rates[key] = max(rates.get(key, 0.0), plan.tokens_per_s)
    return rates, needs


# A batch in one forward needs no sum of gradients, and may fit where its parts do not: 11.9 GiB for
# the largest, 12 for the flagship. The others: many micro-batches, and none that is whole.
@pytest.mark.parametrize(
    ("name", "sequences", "gib"),
    [
        ("500M_1024", 8, 16), ("500M_1024", 8, 12), ("1.3B_1024", 8, 11.9), ("1.3B_1024", 8, 24),
        ("base/750M_unified_v1", 96, 16), ("150M_1024", 24, 2.5), ("150M_1024", 24, 4),
        ("tiny", 64, 0.3), ("1.3B_1024_llama", 8, 11),
    ],
)  # fmt: skip
def test_the_search_finds_what_trying_everything_finds(name, sequences, gib):
    where, cfg = device(gib), presets.load(name).model
    found = search.search(cfg, sequences, where, ALL)
    rates, needs = every_plan(cfg, sequences, where)
    mine = {(p.setup.layout.name, p.setup.policy.name): p.tokens_per_s for p in found if p.fits}
    assert mine == rates
    too_large = {
        (p.setup.layout.name, p.setup.policy.name): p.peak.total for p in found if not p.fits
    }
    assert too_large == {key: need for key, need in needs.items() if key not in rates}


@pytest.mark.parametrize("path", presets.shipped(), ids=lambda path: path.stem)
def test_whatever_fits_in_some_way_is_planned(path):
    preset = presets.load(path)
    sequences = preset.model.batch_size * preset.train.grad_accum_steps
    whole = search.search(preset.model, sequences, device(1024), ALL)
    leanest = min(plan.peak.total for plan in whole)
    for factor in (0.9, 1.0, 1.03, 1.2):
        where = device(max(0.3, factor * leanest / table.GIB))
        rates, _ = every_plan(preset.model, sequences, where)
        best = search.search(preset.model, sequences, where, ALL)[0]
        assert best.fits == bool(rates)
        if rates:
            exact = {key: rate for key, rate in rates.items() if table.LAYOUTS[key[0]].exact}
            assert best.tokens_per_s == max((exact or rates).values())


def test_exact_plans_come_first_and_then_the_faster():
    found = [p for p in plans("500M_1024", 8) if p.fits]
    exact = [p for p in found if p.exact]
    assert found[: len(exact)] == exact
    for group in (exact, found[len(exact) :]):
        rates = [round(p.tokens_per_s, 9) for p in group]
        assert rates == sorted(rates, reverse=True)


def test_bytes_are_spent_before_flops():
    """On 16 GB the reference shapes keep their matmuls: norms are made again, or nothing."""
    for name, sequences in (("500M_1024", 8), ("base/750M_unified_v1", 96)):
        best = plans(name, sequences)[0]
        assert best.exact
        assert best.setup.policy.name in ("none", "norms")
    # and with room for everything nothing is made again
    assert plans("500M_1024", 8, gib=48)[0].setup.policy.name == "none"


def test_a_smaller_chunk_is_taken_only_where_it_buys_something():
    for plan in plans("base/750M_unified_v1", 96):
        if plan.fits and plan.setup.chunk is not None:
            larger = dataclasses.replace(plan.setup, chunk=None)
            assert not search.evaluate(larger, device()).fits


def test_the_1300m_preset_fits_16_gb_in_the_fast_layout_alone():
    found = plans("1.3B_1024", 8, build=table.TODAY)
    assert found[0].fits
    assert {p.setup.layout.name for p in found if p.fits} == {"fast"}


def test_the_smallest_change_that_fits_is_the_smallest():
    cfg = presets.load("1.3B_1024").model
    arguments = (8, device(), options.Options(("exact",), ("block",)))
    change = search.smaller_model(cfg, *arguments)
    layers = int(change.split()[1])
    assert change == f"n_layer {layers} instead of {cfg.n_layer} would fit"
    for changed, fits in ((layers, True), (layers + 1, False)):
        model = dataclasses.replace(cfg, n_layer=changed)
        assert search.search(model, *arguments)[0].fits is fits


def test_what_can_be_planned_is_what_the_trainer_takes():
    settings = {f.name: f.metadata.get("choices") for f in dataclasses.fields(TrainConfig)}
    assert set(settings["state"]) == {"auto", *ALL.layouts}
    assert set(settings["recompute"]) == {"auto", *ALL.policies}
    assert tuple(ALL.policies) == POLICIES


def test_a_micro_batch_that_is_given_is_kept():
    cfg = presets.load("500M_1024").model
    found = search.search(cfg, 8, device(), options.Options(rows=3))
    assert {plan.setup.rows for plan in found} == {3}


@pytest.mark.parametrize(
    ("name", "policy", "share"),
    # a block again is a third of its forward and backward; GELU's first matmul a sixth of its MLP
    [
        ("500M_1024", "mlp", 0.10),
        ("base/750M_unified_v1", "mlp", 0.14),
        ("500M_1024", "block", 0.3),
    ],
)  # fmt: skip
def test_what_a_policy_computes_again(name, policy, share):
    cfg = presets.load(name).model
    assert speed.recomputed_share(cfg, table.POLICIES[policy]) == pytest.approx(share, abs=0.02)
    assert speed.recomputed_share(cfg, table.POLICIES["none"]) == 0


def test_speed_follows_the_ceiling_the_rows_and_the_optimizer():
    cfg = presets.load("500M_1024").model
    setup = Setup(cfg, 8, 8)
    rate = speed.tokens_per_s(setup, 47.0, 0.8)
    flops = accounting.flops_per_token(cfg)
    assert rate == pytest.approx(47e12 * 0.8 * 0.99 / flops, rel=1e-3)
    assert speed.tokens_per_s(setup, 94.0, 0.8) == pytest.approx(2 * rate)
    assert speed.tokens_per_s(dataclasses.replace(setup, rows=1), 47.0, 0.8) < 0.9 * rate
    # 28 bytes a parameter of fp32 AdamW, the blocks' casts, and four chunks that each move dW, at
    # 403 GB/s
    with_traffic = speed.tokens_per_s(setup, 47.0, 0.8, 403.2)
    n = accounting.count_parameters(cfg)
    moved = 28 * 602_277_504 + 6 * (n.attention + n.mlp) + 4 * 8 * 50304 * 1280
    seconds = 8192 / with_traffic - 8192 / rate
    assert seconds == pytest.approx(moved / 403.2e9, rel=1e-6)
    # micro-steps add up gradients, and cast again; what is bf16 already is not cast
    halves = dataclasses.replace(setup, rows=4)
    assert speed.traffic(halves) - speed.traffic(setup) == pytest.approx(
        2 * 12 * n.total + 6 * (n.attention + n.mlp)
    )
    split = dataclasses.replace(setup, layout=table.LAYOUTS["exact16"])
    assert speed.traffic(setup) - speed.traffic(split) == 6 * (n.attention + n.mlp)
    shares = [speed.saturation(rows) for rows in range(1, 20_000, 7)]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_memory_for_programs_is_less_than_the_card_has():
    assert device(16).memory == int(15.75 * table.GIB)
    assert search.nominal(cards.find("T4"), None) == int(14.74 * table.GIB)
    assert search.nominal(None, 8 * table.GIB) == int(7.875 * table.GIB)


def test_a_ceiling_of_ones_own_counts_for_its_dtype_alone():
    card = cards.find("RTX 5060 Ti")
    ceiling.keep(card.name, {"tflops": {"bf16": 49.0}, "gb_per_s": 400.0})
    own = search.device_for(16 << 30, None, card, [card.name])
    assert (own.tflops, own.gb_per_s, own.measured) == (49.0, 400.0, True)
    fp32 = dataclasses.replace(own, dtype="fp32")
    assert (fp32.tflops, fp32.measured) == (15.9, False)
    ceiling.keep("Tesla V100-SXM2-16GB", {"tflops": {"fp16": 95.0}})
    v100 = cards.find("Tesla V100-SXM2-16GB")
    assert search.device_for(1, None, v100, ["Tesla V100-SXM2-16GB", "V100"]).tflops == 95
    unmeasured = search.device_for(1, None, card)
    assert (unmeasured.tflops, unmeasured.measured) == (46.1, False)
    assert unmeasured.gb_per_s == pytest.approx(0.9 * 448)
