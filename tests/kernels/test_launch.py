"""The launch table: what ships, what a user measured, and the rules that pick a row."""

import json
from pathlib import Path

import pytest
import torch

from mypt_fast import presets
from mypt_fast.errors import ConfigError
from mypt_fast.kernels.jit import launch
from tests.kernels.conftest import INTERPRETED

WIDEST = {"cross_entropy": 1 << 20}
KERNELS = (
    "norm_forward", "norm_backward", "swiglu_forward", "swiglu_backward", "gelu_forward",
    "gelu_backward", "rope_forward", "rope_backward", "cross_entropy",
)  # fmt: skip
WIDTHS = sorted({presets.load(path).model.n_embd for path in presets.shipped()})
ROW = {
    "kernel": "norm_forward", "bits": 16, "columns": 4096, "rows": 2, "warps": 8, "stages": 1,
    "programs": 0, "source": "measured",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder without the user's tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch.forget()
    yield tmp_path
    launch.forget()


def table(path: Path, rows, arch: str = "sm_80", **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"configs": {arch: {"rows": rows}}, **more}))
    return path


@pytest.mark.parametrize("arch", launch.ARCHS)
@pytest.mark.parametrize("dtype", launch.BITS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_row_for_every_width(kernel, dtype, arch) -> None:
    assert WIDTHS
    for columns in (1, 64, 80, *WIDTHS, 8192, 32768, WIDEST.get(kernel, 1)):
        row = launch.config(kernel, columns, dtype, arch)
        assert (row.kernel, row.bits) == (kernel, launch.BITS[dtype])
        assert row.columns >= columns
        assert (row.programs > 0) == (kernel in ("norm_backward", "rope_backward"))


@pytest.mark.parametrize(
    ("arch", "used"),
    [(87, 86), (121, 120), (103, 100), (88, 86), (70, 75), (75, 75), (200, 120)],
)
def test_an_unknown_architecture_takes_the_nearest_older_one(arch, used) -> None:
    assert launch.nearest(arch) == used
    assert launch.config("norm_forward", 768, torch.float16, arch) == launch.config(
        "norm_forward", 768, torch.float16, used
    )


def test_the_smallest_bucket_that_fits_is_taken(cache) -> None:
    rows = [{**ROW, "columns": c, "rows": r} for c, r in ((4096, 1), (512, 4), (1024, 2))]
    table(launch.user_table(80), rows)
    found = [launch.config("norm_forward", c, torch.float16, 80).rows for c in (1, 512, 513, 1025)]
    assert found == [4, 4, 2, 1]


def test_a_row_that_is_too_wide_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="norm_forward: expected at most 32768 columns; found 327"):
        launch.config("norm_forward", 32769, torch.float16, 80)


def test_what_the_user_measured_comes_first_and_only_there(cache) -> None:
    assert launch.user_table(80) == cache / "mypt_fast" / "launch-sm_80.json"
    shipped = launch.config("norm_forward", 1280, torch.float16, 86)
    table(launch.user_table(80), [ROW])
    launch.forget()
    assert launch.config("norm_forward", 1280, torch.float16, 80) == launch.Config(**ROW)
    # beyond it, in other sizes and on other cards: as shipped
    assert launch.config("norm_forward", 8192, torch.float16, 80).columns >= 8192
    assert launch.config("norm_forward", 1280, torch.float32, 80).bits == 32
    assert launch.config("norm_forward", 1280, torch.float16, 86) == shipped


def test_a_bad_table_of_the_users_is_ignored_with_one_line(cache, capsys) -> None:
    shipped = launch.config("norm_forward", 1280, torch.float16, 80)
    path = table(launch.user_table(80), [{**ROW, "warps": 3}])
    launch.forget()
    for _ in range(2):
        assert launch.config("norm_forward", 1280, torch.float16, 80) == shipped
        assert launch.config("norm_backward", 1280, torch.float16, 80).columns >= 1280
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"warning: launch table {path} is ignored: sm_80, row 0, warps: ")
    assert "expected one of 1, 2, 4, 8, 16, 32; found 3" in said


@pytest.mark.parametrize("home", ["relative", ""])
def test_a_cache_folder_is_absolute_or_below_home(home, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch.user_table(90) == tmp_path / ".cache/mypt_fast/launch-sm_90.json"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "an object of 'beats_compile' and 'configs'"),
        ("{", "the file: expected JSON"),
        ("\xff", "the file: expected JSON"),
        ("[" * 100_000, "the file: expected JSON"),
        ('{"other": 1}', "the file: expected an object of 'beats_compile' and 'configs'"),
        ('{"configs": []}', "configs: expected an object; found []"),
        ('{"configs": {"90": {}}}', "a name like sm_90; found '90'"),
        ('{"configs": {"sm_90": []}}', "sm_90: expected an object"),
        ('{"configs": {"sm_90": {"same_as": "sm_80"}}}', "an architecture above it"),
        ('{"configs": {"sm_90": {"row": []}}}', "an object of 'same_as' and 'rows'"),
        ('{"configs": {"sm_90": {"rows": {}}}}', "rows of sm_90: expected a list"),
        ('{"configs": {"sm_90": {"rows": [1]}}}', "sm_90, row 0: expected an object of kernel,"),
        ('{"beats_compile": {"sm_90": "norm"}}', "beats_compile of sm_90: expected a list"),
        (" " * ((1 << 20) + 1), "at most 1048576 bytes"),
    ],
    ids=range(14),
)
def test_bad_tables_are_refused(text, said, tmp_path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        launch.read_table(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 8}, {"bits": 16.0}, {"columns": 0}, {"columns": (1 << 30) + 1}, {"rows": 3},
        {"rows": True}, {"warps": 64}, {"stages": 0}, {"programs": -1}, {"programs": 1 << 16},
        {"source": "guessed"}, {"source": ["aot"]}, {"kernel": "../x"}, {"kernel": 3},
    ],
    ids=str,
)  # fmt: skip
def test_bad_rows_are_refused_by_name(change, tmp_path) -> None:
    (name,) = change
    path = table(tmp_path / "table.json", [ROW, {**ROW, "columns": 8, **change}])
    with pytest.raises(ConfigError, match=f"^sm_80, row 1, {name}: expected .*; found "):
        launch.read_table(path)
    path = table(tmp_path / "table.json", [ROW, ROW])
    with pytest.raises(ConfigError, match="one row a kernel, bits and columns"):
        launch.read_table(path)


def test_an_architecture_may_share_but_for_the_kernels_it_lists(tmp_path) -> None:
    path = tmp_path / "table.json"
    other = {**ROW, "kernel": "gelu_forward"}
    entries = {
        "sm_80": {"rows": [ROW, {**ROW, "columns": 64}, other]},
        "sm_90": {"same_as": "sm_80", "rows": [{**ROW, "warps": 4}]},
        "sm_100": {"same_as": "sm_90"},
    }
    path.write_text(json.dumps({"configs": entries, "beats_compile": {"sm_90": ["norm"]}}))
    configs = launch.read_table(path)["configs"]
    assert set(configs[90]) == {launch.Config(**r) for r in ({**ROW, "warps": 4}, other)}
    assert configs[100] == configs[90]


def test_an_override_holds_for_its_kernel_and_size_inside_the_block() -> None:
    row = launch.Config(**ROW)
    before = launch.config("norm_forward", 1280, torch.float16, 80)
    with launch.overridden(row):
        assert launch.config("norm_forward", 99, torch.bfloat16, 120) is row
        assert launch.config("norm_forward", 99, torch.float32, 120) is not row
        assert launch.config("norm_backward", 99, torch.float16, 120) is not row
    assert launch.config("norm_forward", 1280, torch.float16, 80) is before


def test_tiles_waste_no_lanes() -> None:
    assert launch.tiles(1280) == (256, 5)
    for columns in range(1, 32769):
        block, count = launch.tiles(columns)
        assert block & (block - 1) == 0
        assert (count - 1) * block < columns <= count * block
        assert count <= 8
        if columns <= 2048 and columns % 256 == 0:
            assert block * count == columns


@pytest.mark.skipif(not INTERPRETED, reason="a launch needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_tuner_launches_what_it_tries(kernel, bits, monkeypatch) -> None:
    from mypt_fast.kernels.jit import timing, tuning

    monkeypatch.setattr(timing, "ELEMENTS", 1 << 12)
    monkeypatch.setattr(tuning, "has_bf16", lambda device: False)
    asked = []
    choose = launch.config
    monkeypatch.setattr(launch, "config", lambda *a: asked.append(choose(*a)) or asked[-1])
    shape = {"n_embd": 192, "hidden": 768, "n_head": 4, "head_size": 48, "vocab_size": 500}
    (slot,) = (s for s in tuning.slots([shape], False) if (s.kernel, s.bits) == (kernel, bits))
    width = shape[tuning.KERNELS[kernel].size]
    launch_once, moved = timing.workload(slot, width, torch.device("cpu"))
    assert moved > width
    for row in tuning.candidates(slot, 80)[:2]:
        with tuning.tried(row):
            launch_once()
        assert asked.pop() == row
