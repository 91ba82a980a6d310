"""`mypt-fast tune` without a GPU: what it says, and the table it makes ahead of time."""

import json
import os

import pytest

from mypt_fast.cli import main
from mypt_fast.cli.cmd_tune import shipped_shapes
from mypt_fast.kernels.jit import launch


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Tables go here, and none of the user's is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launch.forget()
    yield
    launch.forget()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_without_a_gpu_it_says_what_is_possible(no_gpu, capsys, tmp_path):
    assert main(["tune"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no GPU was found; --arch sm_90 compiles ahead of time for that architecture" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--arch", "sm_70"], "--arch: expected one of sm_75, sm_80, sm_86, sm_89, sm_90, sm_100"),
        (["--arch", "sm_80", "90"], "found '90'"),
        (["--arch"], "--arch: expected at least one argument"),
        (["--config", "tinny"], "the nearest preset is 'tiny'"),
        (["--archs", "sm_80"], "did you mean --arch?"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(argv, said, capsys):
    assert main(["tune", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


def test_the_shapes_of_the_presets_are_those_of_their_models():
    shapes = shipped_shapes()
    assert len({tuple(shape.values()) for shape in shapes}) == len(shapes)
    assert {
        "n_embd": 1280, "hidden": 3456, "n_head": 20, "head_size": 64, "vocab_size": 50304,
        "rms_norm": True, "layer_norm": False, "rope": True, "everything": True,
    } in shapes  # fmt: skip


def rows_of(path, arch):
    return launch.read_table(path)["configs"][arch]


@pytest.mark.parametrize("there", ["nothing", "a measured row"])
def test_a_table_that_is_there_keeps_what_was_measured(there, tmp_path):
    tuning = pytest.importorskip("mypt_fast.kernels.jit.tuning", reason="it needs Triton")
    path = tmp_path / "deep" / "table.json"
    new = [launch.Config("gelu_forward", 16, columns, 4, 4, 2, 0, "aot") for columns in (512, 1024)]
    if there == "nothing":
        tuning.update(path, {80: new, 90: new})
        assert rows_of(path, 80) == (new[1],)  # equal buckets are one
        assert rows_of(path, 90) == rows_of(path, 80)
        assert path.read_text("utf-8").count("gelu_forward") == 1  # and equal architectures, too
    else:
        measured = launch.Config("gelu_forward", 16, 768, 1, 8, 2, 0, "measured")
        tuning.update(path, {80: [measured]})
        tuning.update(path, {80: new})
        assert rows_of(path, 80) == (measured, new[1])
        faster = launch.Config("gelu_forward", 16, 768, 2, 8, 2, 0, "measured")
        tuning.update(path, {80: [faster]})
        assert rows_of(path, 80) == (faster, new[1])
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="it compiles; nothing is interpreted"
)
def test_tuning_ahead_of_time_writes_a_table_that_launches_a_small_model(tmp_path, capsys):
    pytest.importorskip("triton", reason="it compiles with Triton")
    command = ["tune", "--arch", "sm_80", "--config", "tiny_char", "--out", "table.json"]
    assert main([*command, "--json"]) == 0
    out, _ = capsys.readouterr()
    told = json.loads(out)
    assert told["file"] == "table.json"
    rows = rows_of(tmp_path / "table.json", 80)
    assert {row.source for row in rows} == {"aot"}
    assert {(row.kernel, row.bits) for row in rows} == {
        (kernel, bits)
        for bits in (16, 32)
        for kernel in (
            "norm_forward", "norm_backward", "swiglu_forward", "swiglu_backward", "gelu_forward",
            "gelu_backward", "rope_forward", "rope_backward", "cross_entropy",
        )
    }  # fmt: skip
    assert len(told["rows"]) >= len(rows)
    assert not (tmp_path / "cache").exists()
