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
    for path in (ROOT / "bench/results").glob("*/*.json"):
        text = (ROOT / "docs/performance.md").read_text("utf-8")
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
        "| tiny, fp32, 16 sequences | transformers with Liger, compiled | none: transformers is "
        "not installed |  |  |  |  |",
    ]


def test_bars_on_a_gpu_are_not_measured_until_a_result_is_there(report, tmp_path) -> None:
    put(tmp_path, "cpu", "step", step_rows())
    folder = tmp_path / "bench/results"
    text = report.page(report.load(folder))
    assert text.count("not yet measured |") == len(report.GPU_BARS) >= 14
    put(tmp_path, "nvidia-h200", "step", step_rows(), gpu={"name": "NVIDIA H200"}, cap_gib=16.0)
    text = report.page(report.load(folder))
    assert "2020-02-03, NVIDIA H200, torch 9.9.9, cap of 16 GiB." in text
    assert "| 2x MyPT-style | see step on nvidia-h200 |" in text
    assert 0 < text.count("not yet measured |") < len(report.GPU_BARS)
    assert text.index("## CPU") < text.index("## nvidia-h200")


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
