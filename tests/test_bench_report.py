"""docs/performance.md and the README's tables are what the committed results say."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FACTS = {"date": "2020-02-03", "cpu": "Abacus 9", "cores": 2, "threads": 2, "torch": "9.9.9"}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("report")


def put(root, device, suite, rows, **header):
    """A result, made by hand."""
    path = root / "bench" / "results" / device / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**FACTS, **header, "rows": rows}))


def step_rows():
    common = {"preset": "tiny", "dtype": "fp32", "sequences": 16}
    return [
        {
            **common, "variant": "plain", "tokens_per_s": 2000.4, "mfu": 0.31, "samples": [1.0],
            "loss": 5.4321, "steps": 10, "peak_resident_bytes": 3 << 30,
        },
        {
            **common, "variant": "auto", "tokens_per_s": 2100.0, "mfu": 0.33, "samples": [1.0],
            "loss": 5.4, "steps": 10, "peak_resident_bytes": 1 << 30,
            "times": {"plain": {"median": 1.0512, "min": 0.98, "max": 1.2, "rounds": 7}},
        },
        {**common, "variant": "hf", "absent": "transformers is not installed"},
    ]  # fmt: skip


def test_the_committed_page_and_readme_are_what_the_results_give(report) -> None:
    for path, text in report.contents().items():
        assert path.read_text("utf-8") == text, f"{path.name}: run `make bench-report`"


def test_every_committed_result_has_its_table(report) -> None:
    """But for files without rows: what gpu_suite.py tells of itself and of the tests it ran."""
    text = (ROOT / "docs/performance.md").read_text("utf-8")
    found = [
        p for p in (ROOT / "bench/results").glob("*/*.json") if "rows" in json.loads(p.read_text())
    ]
    assert len(found) > 9
    for path in found:
        assert f"bench/results/{path.parent.name}/{path.name})" in text


def test_every_table_of_numbers_in_the_readme_is_generated() -> None:
    """Within "What is measured" no table stands outside the generator's marks."""
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.partition("## What is measured")[2].partition("\n## ")[0]
    outside = re.sub(r"<!-- bench:\w+ -->\n.*?<!-- end -->", "", section, flags=re.DOTALL)
    assert section.count("<!-- bench:") >= 3
    assert not [line for line in outside.splitlines() if line.startswith("|")]


def test_steps_of_processes_in_turn(report, tmp_path) -> None:
    put(tmp_path, "cpu", "step", step_rows())
    text = report.page(report.load(tmp_path / "bench/results"))
    assert "2020-02-03, 2 cores of Abacus 9, torch 9.9.9." in text
    lines = [line for line in text.splitlines() if line.startswith("| tiny, fp32, 16")]
    assert lines == [
        "| tiny, fp32, 16 sequences | nanoGPT-style, compiled | 2,000 | 31% | 3.00 GiB | 5.4321 "
        "after 10 steps |  |",
        "| tiny, fp32, 16 sequences | ours, compiled | 2,100 | 33% | 1.00 GiB | 5.4000 after 10 "
        "steps | 1.05x nanoGPT-style, compiled (0.98 to 1.20) |",
        "| tiny, fp32, 16 sequences | transformers, compiled | none: transformers is "
        "not installed |  |  |  |  |",
    ]


def test_liger_is_named_only_where_it_ran(report, tmp_path) -> None:
    plain, ours, _ = step_rows()
    ran = {**plain, "variant": "hf", "liger": "0.8.1"}
    ours = {**ours, "times": {"hf": {"median": 1.5, "of": "medians"}}}
    put(tmp_path, "cpu", "step", [ran, ours])
    put(tmp_path, "nvidia-h200", "step", [{**ran, "liger": None}, ours])
    with_liger, _, without = report.page(report.load(tmp_path / "bench/results")).partition("h200")
    assert "| transformers with Liger 0.8.1, compiled | 2,000 |" in with_liger
    assert "| 1.50x transformers with Liger 0.8.1, compiled (of medians) |" in with_liger
    assert "| transformers, compiled | 2,000 |" in without
    assert "Liger" not in without.partition("## Bars")[0]


GPU = {"machine": {"gpu": {"name": "NVIDIA H200"}}, "cap_gib": 16.0}


def states_of_bars(report, tmp_path, suite, rows, **header):
    """The bars' states with one result on a GPU, by bar."""
    put(tmp_path, "nvidia-h200", suite, rows, **{**GPU, **header})
    lines = report.missing(report.load(tmp_path / "bench/results"))
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {bar: state for bar, state in cells[2:] if state != "not yet measured"}


def gpu_row(preset, variant, sequences, **more):
    state = "fast" if "fast" in variant else "exact16"
    return {
        "preset": preset, "dtype": "bf16", "variant": variant, "sequences": sequences, "mfu": 0.5,
        "state": state, "tokens_per_s": 1000.0, "micro_batch": sequences, "samples": [1.0],
        "peak_allocated_bytes": 12 << 30, "predicted_bytes": 12 << 30, **more,
    }  # fmt: skip


def test_bars_on_a_gpu_are_not_measured_until_a_row_answers_them(report, tmp_path) -> None:
    """Not by a file without rows, by rows without the number, nor by those of another model."""
    put(tmp_path, "cpu", "step", step_rows())
    text = report.page(report.load(tmp_path / "bench/results"))
    assert text.count("not yet measured |") == len(report.GPU_BARS) >= 14
    for suite in {bar.suite for bar in report.GPU_BARS}:
        assert states_of_bars(report, tmp_path, suite, []) == {}
    failed = [
        {k: v for k, v in gpu_row("500M_1024", "auto", 8, failed="why").items() if k in keys}
        for keys in (("preset", "dtype", "variant", "sequences", "failed"),)
    ]
    assert states_of_bars(report, tmp_path, "step", [*failed, *step_rows()]) == {}
    text = report.page(report.load(tmp_path / "bench/results"))
    assert "2020-02-03, NVIDIA H200, torch 9.9.9, cap of 16 GiB." in text
    assert text.index("## CPU") < text.index("## nvidia-h200")


def test_each_bar_wants_its_own_rows(report, tmp_path) -> None:
    big, mb = "base/750M_unified_v1", {"micro_batch": 3}
    ended = {"steps": 203, "loss": 1.0}

    def found(*rows, **header):
        states = states_of_bars(report, tmp_path, "step", rows, **header)
        return {bar.partition(":")[0].partition(",")[0]: state for bar, state in states.items()}

    small = gpu_row("500M_1024", "auto/norms", 8, tokens_per_s=150_000.0)
    states = found(small)
    assert set(states) == {"500M_1024", "planner's peak within 3 % of the measured one"}
    assert states["500M_1024"] == "12.00 GiB (`auto/norms`): step on nvidia-h200"
    assert "500M_1024" not in found({**small, **mb})  # in micro-batches
    assert "500M_1024" not in found({**small, "state": "fast"})
    exact, fast = (gpu_row(big, f"auto/norms+{s}", 96, **mb) for s in ("exact16", "fast"))
    assert "750M" not in found(exact, small)
    assert found(exact, fast)["750M"].count("12.00 GiB") == 2
    assert found(exact, small)["H200"].startswith("500M_1024 150,000 tokens/s, base/750M")
    elsewhere = {"machine": {"gpu": {"name": "NVIDIA RTX"}}}
    assert "H200" not in found(exact, small, **elsewhere)
    name = "both trained for 200 steps under a cap of 16 GB"
    assert name not in found(*({**r, **ended} for r in (small, exact)))
    assert name not in found(*({**r, **ended, "steps": 103} for r in (small, exact, fast)))
    assert name not in found(*({**r, **ended} for r in (small, exact, fast)), cap_gib=24.0)
    assert "203 steps of 500M_1024" in found(*({**r, **ended} for r in (small, exact, fast)))[name]
    off = {**small, "peak_allocated_bytes": int(12.36 * 2**30)}
    told = found(off, exact)["planner's peak within 3 % of the measured one"]
    assert told.startswith("+0.0% to +3.0% of 2 predictions")
    ratios = {"times": {"plain": {"median": 1.2}, "mypt-eager": {"median": 2.5}}}
    assert found({**small, **ratios})["2x MyPT-style"].startswith("500M_1024 2.50x")
    assert "2x MyPT-style" not in found({**fast, **ratios})
    huge = "the 1.3B preset trains in 16 GB in the fast tier"
    assert huge in found(gpu_row("1.3B_1024", "auto/norms+fast", 8))
    assert huge not in found(gpu_row("1.3B_1024", "auto/norms", 8))


def test_bars_of_operators_starts_and_equal_batches(report, tmp_path) -> None:
    big = "base/750M_unified_v1"
    row = {
        "op": "linear_cross_entropy", "shape": big, "dtype": "bfloat16", "mode": "both",
        "tokens": 12_288, "provider": "ours", "median_ms": 9.0, "p20_ms": 8.0, "p80_ms": 10.0,
        "count": 1, "peak_extra_bytes": 1_200_000_000, "gradient_bytes": 1_000_000_000,
        "of_matmul": 0.8,
    }  # fmt: skip
    (told,) = states_of_bars(report, tmp_path, "kernels", [row]).values()
    assert told == "0.20 GB beyond gradients, 1.25x its bare matmuls: kernels on nvidia-h200"
    assert states_of_bars(report, tmp_path, "kernels", [{**row, "provider": "liger"}]) == {}
    wide = {**row, "shape": "BT8192 H4096 V128256"}
    (told,) = states_of_bars(report, tmp_path, "kernels", [wide]).values()
    assert told == "9 ms: kernels on nvidia-h200"
    norm = {**row, "op": "rms_norm", "mode": "backward", "of_copy": 0.81}
    adds = [{**norm, "op": "add_rms_norm", "mode": m} for m in ("forward", "backward")]
    assert states_of_bars(report, tmp_path, "kernels", [norm, adds[0]]) == {}
    (told,) = states_of_bars(report, tmp_path, "kernels", [norm, *adds]).values()
    assert told.startswith("`rms_norm` backward 81%, `add_rms_norm` forward 81%")
    put(tmp_path, "nvidia-h200", "kernels", [])
    begun = {"preset": big, "dtype": "bf16", "variant": "auto", "samples": [1.0]}
    begun |= {k: [4.0, 5.0] for k in ("cold_s", "cold_cpu_s", "warm_s", "warm_cpu_s")}
    (told,) = states_of_bars(report, tmp_path, "start", [begun]).values()
    assert told == f"{big} 5.0 s, 5.0 s warm: start on nvidia-h200"
    put(tmp_path, "nvidia-h200", "start", [])
    both = [
        {
            "variant": v, "micro_batch": 8, "tokens_per_step": 8192, "median_s": s,
            "tokens_per_s": 8192 / s, "samples": [s],
        }
        for v, s in (("plain", 1.05), ("auto", 1.0))
    ]  # fmt: skip
    (told,) = states_of_bars(report, tmp_path, "steps", both, preset=big).values()
    assert told == "`auto` 1.050x: steps on nvidia-h200"
    assert states_of_bars(report, tmp_path, "steps", both, preset="tiny") == {}
    both[1]["micro_batch"] = 4
    assert states_of_bars(report, tmp_path, "steps", both, preset=big) == {}


def test_what_the_gpu_suite_writes_is_shown(report, tmp_path) -> None:
    """Its short steps with their ratio; what has no rows is left out."""
    folder = tmp_path / "bench/results/nvidia-h200"
    rows = [
        {
            "variant": v, "micro_batch": 8, "tokens_per_step": 8192, "median_s": s, "samples": [s],
            "tokens_per_s": 8192 / s, "peak_allocated_bytes": 3 << 29, "predicted_bytes": 3 << 29,
        }
        for v, s in (("auto/plan", 0.5), ("plain@8", 0.75))
    ]  # fmt: skip
    put(tmp_path, "nvidia-h200", "steps", [*rows, {"variant": "auto", "failed": "a|b"}], **GPU)
    for name in ("parity", "suite"):
        (folder / f"{name}.json").write_text(json.dumps({"machine": FACTS, "passed": 3}))
    results = report.load(tmp_path / "bench/results")
    assert list(results["nvidia-h200"]) == ["steps"]
    text = report.page(results)
    assert (
        "| auto/plan | 16,384 | 8 | 500 (500 to 500) | 1.50 GiB, +0.0% on the prediction |" in text
    )
    assert text.count("| 1.50x (of medians) |") == 1
    assert "| nanoGPT-style, compiled, in micro-batches of 8 | 10,923 | 8 |" in text
    assert "| ours, compiled | none: a\\|b |" in text


def test_states_by_layout_and_seed(report, tmp_path) -> None:
    """Losses, steps, codes and saves, a table each."""
    rows = [
        {"variant": v, "seed": s, "steps": 9, "val_loss": s + add}
        for v, add in (("exact", 0.0), ("fast", 0.5)) for s in (1, 2)
    ]  # fmt: skip
    rows += [
        {
            "step": "fast", "parameters": 2_000_000, "weight_bytes": 8_000_000,
            "gradient_bytes": 4_000_000, "moment_bytes": 4_060_000, "first_s": 0.25,
            "seconds": [0.003, 0.004, 0.005],
        },
        {
            "round_trip": "ours", "first": 0.01, "second": 0.02, "update": 0.03,
            "update_largest": [2.0, 3.0], "first_zeroed": 5e-6, "second_zeroed": 0.0,
            "first_changed_again": [0.5, 0.007], "second_changed_again": [0.0, 0.0],
        },
        {
            "persistence": "fast", "file_bytes": 3_000_000, "weights_only": "read",
            "weights_only_elsewhere": "refused: why", "our_reader": "read",
            "resumes_bit_for_bit": True,
        },
    ]  # fmt: skip
    put(tmp_path, "cpu", "states", rows)
    text = report.page(report.load(tmp_path / "bench/results"))
    assert "| held-out loss after 9 steps | seed 1 | seed 2 | mean |" in text
    assert "| fast | 1.5000 | 2.5000 | 2.0000 |" in text
    assert "time of `fast` / time of this (20th to 80th percentile) |" in text
    step = "| fast | 2.0 M | 4.00 (3.40 to 4.60) |  | 0.250 | 4.00 | 2.00 | 2.03 | 8.03 |"
    assert step in text
    assert "| error of the next update | 3.00 % |" in text
    assert "| largest update, in learning rates | 3.00, in exact 2.00 |" in text
    assert "in a million | 5.00 |" in text
    assert "second trip changes | 50% by up to 0.7 % |" in text
    assert "| second moments that it changes | none |" in text
    assert "| fast | 3.0 MB | read | refused | read | yes |" in text


def test_a_suite_nobody_knows_is_shown_and_cannot_break_the_table(report, tmp_path) -> None:
    rows = [{"what": "a|b\nc", "rate": 12345.6, "seconds": [1, 2], "none": None}]
    put(tmp_path, "cpu", "novel", rows)
    text = report.page(report.load(tmp_path / "bench/results"))
    assert "### `novel`" in text
    assert "| what | rate | none |\n| --- | --- | --- |\n| a\\|b c | 12,346 |  |" in text


def test_check_tells_a_stale_page_and_writing_mends_it(
    report, tmp_path, monkeypatch, capsys
) -> None:
    put(tmp_path, "cpu", "step", step_rows())
    (tmp_path / "docs").mkdir()
    told = tmp_path / "README.md"
    told.write_text("before\n<!-- bench:step -->\nold | numbers\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "contents", lambda root, made=report.contents: made(tmp_path))
    assert report.main(["--check"]) == 1
    assert "not current: performance.md, README.md" in capsys.readouterr().out
    assert "old | numbers" in told.read_text()
    assert (report.main([]), report.main(["--check"])) == (0, 0)
    text = told.read_text()
    assert text.startswith("before\n<!-- bench:step -->\n| our compiled step | tokens/s |")
    assert "| `tiny`, fp32, 16 sequences | 2,100 | 1.05x |  |\n<!-- end -->\nafter\n" in text
    told.write_text(text.replace("1.05x", "1.50x"))
    assert report.main(["--check"]) == 1


def test_a_mark_without_a_result_is_an_error(report) -> None:
    with pytest.raises(ValueError, match="no committed result for the mark bench:step"):
        report.readme("<!-- bench:step -->\n<!-- end -->", {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (999.4, "999"),
        (12.34, "12.3"),
        (0.01234, "0.0123"),
        (5, "5.00"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(report, value, text) -> None:
    assert report.number(value) == text
