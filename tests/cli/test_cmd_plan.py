"""`mypt-fast plan`: what it prints, how it fails, and that the README shows it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mypt_fast import presets
from mypt_fast.cli import cmd_plan, main
from mypt_fast.planner import ceiling, options, table

ROOT = Path(__file__).parents[2]
PRESET = ["plan", "--config", "500M_1024"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def machine_reads(capsys, *words, code=0):
    assert main(["plan", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def fails(capsys, *words):
    """The one line of an error; nothing else is printed."""
    assert main(["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_preset_on_16_gb(capsys):
    report = machine_reads(capsys, "--config", "500M_1024", "--gpu", "RTX 5060 Ti")
    best = report["plans"][0]
    assert report["fits"] is True
    assert report["tokens_per_step"] == 8192
    assert best["micro_batch_size"] * best["micro_steps"] == 8
    assert best["peak_bytes"] == sum(best["parts_bytes"].values()) <= 15.75 * table.GIB
    # between half and all of what the ceiling allows
    assert 5_000 < best["tokens_per_s"] < 14_000
    seconds = 8192 * report["max_iters"] / best["tokens_per_s"]
    assert report["eta_s"] == pytest.approx(seconds)


def test_people_read_the_plan_its_parts_and_the_others(capsys):
    assert main([*PRESET, "--vram", "16G", "--gpu", "RTX 5060 Ti"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "602.28M parameters",
        "8 sequences = 8,192 tokens a step",
        "weights 2.24",
        "tokens/s",
        "46.1 TFLOP/s measured elsewhere",
        "--micro_batch_size",
    ):
        assert words in out  # fmt: skip


def test_without_a_card_there_is_no_speed(capsys):
    assert machine_reads(capsys, "--config", "tiny", "--vram", "8G")["eta_s"] is None
    assert main(["plan", "--config", "tiny", "--vram", "8G"]) == 0
    assert "unknown; --gpu NAME estimates it" in capsys.readouterr().out


def test_every_shipped_preset_is_ranked(capsys):
    rows = machine_reads(capsys, "--gpu", "RTX 5060 Ti")["presets"]
    assert {row["config"] for row in rows} == {path.stem for path in presets.shipped()}
    assert [row["fits"] for row in rows] == sorted((r["fits"] for r in rows), reverse=True)
    fitting = [row["parameters"] for row in rows if row["fits"]]
    assert fitting == sorted(fitting, reverse=True)
    assert {"500M_1024", "tiny"} <= {row["config"] for row in rows if row["fits"]}
    assert main(["plan", "--vram", "16G"]) == 0
    assert capsys.readouterr().out.count("\n") == len(rows) + 4


def test_the_users_own_ceiling_comes_first(capsys):
    ceiling.keep("NVIDIA GeForce RTX 5060 Ti", {"tflops": {"bf16": 92.0}, "gb_per_s": 400.0})
    report = machine_reads(capsys, "--config", "500M_1024", "--gpu", "RTX 5060 Ti")
    assert report["device"]["ceiling_tflops"] == 92
    assert report["device"]["ceiling_measured_here"] is True
    assert report["device"]["gb_per_s"] == 400


def test_a_model_that_cannot_fit_names_the_smallest_change(capsys):
    line = fails(capsys, "--config", "1.3B_1024", "--vram", "6G")
    assert "does not fit 5.8 GiB" in line
    assert re.search(r"n_layer \d+ instead of 22 would fit|it takes a card of \d+ GB", line)
    report = machine_reads(capsys, "--config", "1.3B_1024", "--vram", "6G", code=2)
    assert report["fits"] is False
    # the card it asks for has the room
    gib = re.search(r"a card of (\d+) GB", line)[1]
    assert main(["plan", "--config", "1.3B_1024", "--vram", f"{gib}G"]) == 0


def test_a_config_that_asks_for_recomputation_gets_it(capsys, tmp_path):
    raw = json.loads(presets.find("500M_1024").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**raw, "use_checkpoint": True}))
    found = machine_reads(capsys, "--config", "mine.json", "--vram", "80G")["plans"]
    assert all(table.POLICIES[plan["recompute"]].blocks for plan in found)


@pytest.mark.parametrize("size", ["lots", "", "-3G", "0", "16T", "1e9", "9999999G", "16G16"])
def test_nonsense_for_a_size_is_one_line(capsys, size):
    line = fails(capsys, "--config", "tiny", f"--vram={size}")
    assert "--vram: expected a size from 0.25G to 4096G" in line


@pytest.mark.parametrize(
    ("text", "gib"), [("16G", 16), ("16GiB", 16), ("16 gb", 16), ("16384M", 16), ("0.5", 0.5)]
)
def test_sizes(text, gib):
    assert cmd_plan.parse_size(text) == gib * table.GIB


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--config", "tiny"], "plan needs a card; neither --gpu nor --vram"),
        (["--gpu", "RTX 5060 Tie"], "the nearest are RTX 5060 Ti"),
        (["--vram", "16G", "--recompute", "blok"], "did you mean 'block'?"),
        (["--vram", "16G", "--state", "fp8"], "--state: expected one of"),
        (["--vram", "16G", "--config", "nothing"], "no config file 'nothing'"),
    ],
)
def test_what_is_not_known_is_one_line(capsys, words, line):
    assert line in fails(capsys, *words)


def preset_of(tmp_path, **fields):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps({"n_embd": 64, "n_head": 4, "batch_size": 8, **fields}))
    return presets.load(str(path))


def choices(tmp_path, typed=None, **fields):
    preset = preset_of(tmp_path, **fields)
    flags = {"state": None, "recompute": None, **(typed or {})}
    return options.options_of(preset.model, cmd_plan.settings_of(preset, flags), "bf16")


def test_a_preset_fixes_what_it_says_and_a_flag_goes_first(tmp_path):
    assert choices(tmp_path) == options.Options()
    fixed = choices(tmp_path, state="exact", recompute="mlp", micro_batch_size=4, chunk_rows=512)
    assert fixed == options.Options(("exact",), ("mlp",), (512,), 4)
    assert choices(tmp_path, use_checkpoint=True).policies == ("block",)
    typed = {"state": "fast", "recompute": "norms"}
    found = choices(tmp_path, typed, state="exact", use_checkpoint=True)
    assert (found.layouts, found.policies) == (("fast",), ("norms",))
    assert choices(tmp_path, kernels="inductor").policies == ("none", "block", "offload")


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({"amp_dtype": "fp16"}, "fp16"), ({"use_amp": False}, "fp32"), ({}, "bf16")],
)
def test_a_preset_says_what_it_computes_in(capsys, tmp_path, fields, dtype):
    preset_of(tmp_path, **fields)
    words = ("--config", str(tmp_path / "preset.json"), "--gpu", "RTX 5060 Ti")
    found = machine_reads(capsys, *words)
    assert found["device"]["dtype"] == dtype
    assert found["device"]["ceiling_tflops"] == {"bf16": 46.1, "fp16": 45.9, "fp32": 15.9}[dtype]
    layouts = {plan["state"] for plan in found["plans"]}
    assert layouts == (set(options.Options().layouts) if dtype == "bf16" else {"exact"})


@pytest.mark.parametrize("card", [["--gpu", "RTX 4060"], ["--vram", "8G"], ["--gpu", "T4"]])
def test_what_does_not_fit_is_one_line_on_every_card(capsys, card):
    assert "1.3B_1024 does not fit" in fails(capsys, "--config", "1.3B_1024", *card)


def test_a_card_without_bf16_has_fp32_weights(capsys):
    found = machine_reads(capsys, "--config", "500M_1024", "--gpu", "T4")
    assert {plan["state"] for plan in found["plans"]} == {"exact"}
    assert "use --state exact" in fails(
        capsys, "--config", "500M_1024", "--gpu", "T4", "--state", "exact16"
    )


@pytest.mark.parametrize("words", [["--config", "500M_1024"], []], ids=["one", "all"])
def test_planning_loads_neither_torch_nor_numpy(words, tmp_path):
    code = (
        "import sys; from mypt_fast.cli import main; "
        f"assert main({['plan', *words, '--vram', '16G', '--json']!r}) == 0; "
        "print([m for m in ('torch', 'numpy', 'triton') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.stderr.strip() == "[]"


def test_the_readme_shows_what_plan_prints(capsys):
    """MYPT_UPDATE_GOLDEN=1 writes it anew."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    shown = re.findall(r"```\n\$ mypt-fast (plan [^\n]*)\n(.*?)```", text, re.S)
    assert len(shown) == 2
    for command, output in shown:
        assert main(shlex.split(command)) == 0
        real = capsys.readouterr().out
        if os.environ.get("MYPT_UPDATE_GOLDEN"):
            text = text.replace(f"{command}\n{output}", f"{command}\n{real}")
            readme.write_text(text, "utf-8")
        else:
            assert output == real


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"micro_batch_size": 50}, "--micro_batch_size 50 is more than a step has"),
        ({"kernels": "inductor", "recompute": "norms"}, "found --kernels inductor"),
        ({"use_amp": False, "residual_dtype": "bf16"}, "found fp32"),
        ({"use_amp": False, "state": "exact16"}, "found fp32"),
        ({"max_iters": 10**400}, "max_iters"),
        ({"micro_batch_size": 10**400}, "micro_batch_size"),
        ({"warmup_iters": 10**400}, "warmup_iters"),
    ],
)
def test_what_train_refuses_is_not_planned(capsys, tmp_path, fields, words):
    shape = {"n_embd": 64, "n_head": 4, "batch_size": 8}
    (tmp_path / "preset.json").write_text(json.dumps({**shape, **fields}))
    err = fails(capsys, "--config", str(tmp_path / "preset.json"), "--vram", "16G")
    assert words in err
    assert len(err) < 300


def test_a_split_that_leaves_a_rest_has_one_forward_more(capsys, tmp_path):
    preset_of(tmp_path, micro_batch_size=5)
    report = machine_reads(capsys, "--config", str(tmp_path / "preset.json"), "--vram", "24G")
    assert {plan["micro_steps"] for plan in report["plans"]} == {2}


def test_plans_that_are_left_out_are_told_apart(capsys):
    assert main(["plan", "--config", "1.3B_1024", "--vram", "16G"]) == 0
    *_, table_end = capsys.readouterr().out.splitlines()
    found = re.fullmatch(
        r"and (?:(\d+) slower that need no less, )?(\d+) more that do not fit; see --json",
        table_end,
    )
    report = machine_reads(capsys, "--config", "1.3B_1024", "--vram", "16G")
    assert int(found[2]) == sum(not plan["fits"] for plan in report["plans"]) - 2


@pytest.mark.parametrize("gb_per_s", [10**400, float("nan"), -20, 1e-300, True, "fast", None])
def test_a_bandwidth_that_cannot_be_is_passed_over(capsys, gb_per_s):
    expected = machine_reads(capsys, *PRESET[1:], "--gpu", "RTX 5060 Ti")
    path = ceiling.ceiling_file()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"5060ti": {"tflops": {"bf16": 46.1}, "gb_per_s": gb_per_s}}))
    found = machine_reads(capsys, *PRESET[1:], "--gpu", "RTX 5060 Ti")
    assert found["device"].pop("ceiling_measured_here")
    assert not expected["device"].pop("ceiling_measured_here")
    assert found["device"].pop("ceiling_source") is None
    assert expected["device"].pop("ceiling_source").endswith("#129 (also #85 #134 #136 #163)")
    assert found == expected


def test_a_card_without_a_ceiling_in_the_dtype_says_so(capsys, tmp_path):
    preset_of(tmp_path, use_amp=False)
    words = ["plan", "--config", str(tmp_path / "preset.json"), "--gpu", "H100 80GB"]
    assert main(words) == 0
    assert "no fp32 ceiling of the H100 80GB is known; `mypt-fast ceiling`" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("words", [
    (), ("--gpu", "RTX 4090"), ("--gpu", "T4"), ("--gpu", "RTX PRO 6000"), ("--vram", "12G"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["500M_1024", "base/750M_unified_v1", "1.3B_1024", "tiny"])
def test_a_plan_fits_a_terminal(capsys, words, name):
    code = main(["plan", "--config", name, *(words or ("--vram", "16G"))])
    out, err = capsys.readouterr()
    assert code == 0 or "does not fit" in err
    assert max(map(len, out.splitlines()), default=0) <= 80


def test_a_refusal_for_machines_has_the_change_and_the_card(capsys):
    words = ["plan", "--config", "1.3B_1024", "--vram", "8G", "--json"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["change"] in err
    assert f"a card of {report['card_gb']} GB" in err
