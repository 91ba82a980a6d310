"""`mypt-fast generate`: what goes to stdout, what to stderr, prompts as they were typed."""

import io
import json
import sys

import pytest

from mypt_fast.checkpoint import bundle
from mypt_fast.cli import cmd_generate, main
from mypt_fast.config import ModelConfig
from mypt_fast.model import GPT
from mypt_fast.tokenizer import Tokenizer

TEXT = "abcdefghn é日\\\n\t"


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A tiny char model at checkpoints/m, seen from the working directory."""
    tokenizer = Tokenizer.from_text(TEXT)
    cfg = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=tokenizer.n_tokens, device="cpu"
    )
    model = GPT(cfg, seed=1)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoints" / "m"
    bundle.write(
        path, config=cfg.to_dict(), state_dict=model.state_dict(), training_state={"step": 7},
        tokenizer=tokenizer.get_state(),
    )  # fmt: skip
    return path


def generate(*words: str) -> int:
    return main(["generate", "--model_name", "m", "--device", "cpu", *words])


def test_prompt_and_text_go_to_stdout_and_nothing_else(run_dir, capsys) -> None:
    assert generate("--prompt", "日é", "--seed", "1", "--max_new_tokens", "20") == 0
    out, err = capsys.readouterr()
    assert out.startswith("日é")
    assert len(out) == 2 + 20 + 1
    assert err == ""


def test_a_seed_repeats_the_text_and_samples_count_up_from_it(run_dir, capsys) -> None:
    reports = []
    for _ in range(2):
        assert generate("--prompt", "ab", "--seed", "5", "--num-samples", "2", "--json") == 0
        reports.append(json.loads(capsys.readouterr().out))
    first, again = reports
    assert [s["seed"] for s in first["samples"]] == [5, 6]
    assert [s["tokens"] for s in first["samples"]] == [s["tokens"] for s in again["samples"]]
    assert first["samples"][0]["text"] != first["samples"][1]["text"]
    assert first["step"] == 7


def test_several_samples_are_told_apart(run_dir, capsys) -> None:
    assert generate("--seed", "5", "--num_samples", "2", "--max_new_tokens", "3") == 0
    out = capsys.readouterr().out
    assert "--- sample 1 (seed 5) ---" in out
    assert "--- sample 2 (seed 6) ---" in out


class Watched(io.StringIO):
    """A stream that counts its flushes."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def test_tokens_are_flushed_as_they_come(run_dir, monkeypatch) -> None:
    stream = Watched()
    monkeypatch.setattr(sys, "stdout", stream)
    words = ["--prompt", "ab", "--seed", "1", "--max_new_tokens", "25", "--repeat_window", "0"]
    assert generate(*words) == 0
    assert stream.flushes >= 25


def test_generation_slides_past_the_context(run_dir, capsys) -> None:
    assert generate("--max_new_tokens", "90", "--repeat_window", "0", "--seed", "1", "--json") == 0
    sample = json.loads(capsys.readouterr().out)["samples"][0]
    assert len(sample["tokens"]) == 90
    assert sample["stopped"] == "length"


def test_backslashes_stay_unless_escapes_are_asked_for(run_dir, capsys) -> None:
    assert generate("--prompt", r"é\n", "--max_new_tokens", "0") == 0
    assert generate("--prompt", r"é\nb\\", "--escapes", "--max_new_tokens", "0") == 0
    assert capsys.readouterr().out == "é\\n\n" + "é\nb\\\n"


def test_prompt_from_file_and_stdin(run_dir, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "p.txt").write_text("日é", encoding="utf-8")
    assert generate("--prompt_file", "p.txt", "--max_new_tokens", "0") == 0
    for words in (["--prompt", "-"], ["--prompt_file", "-"]):
        piped = io.TextIOWrapper(io.BytesIO("é日".encode()), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", piped)
        assert generate(*words, "--max_new_tokens", "0") == 0
    assert capsys.readouterr().out == "日é\né日\né日\n"


def test_stop_tokens_by_string_and_by_id(run_dir, capsys) -> None:
    free = ["--prompt", "ab", "--seed", "2", "--max_new_tokens", "40", "--json"]
    assert generate(*free) == 0
    ids = json.loads(capsys.readouterr().out)["samples"][0]["tokens"]
    char = Tokenizer.from_text(TEXT).decode([ids[4]])
    for word in (str(ids[4]), char):
        assert generate(*free, "--stop_tokens", word) == 0
        sample = json.loads(capsys.readouterr().out)["samples"][0]
        assert sample["stopped"] == "stop_token"
        assert sample["tokens"] == ids[: ids.index(ids[4]) + 1]


def test_show_info_is_on_stderr(run_dir, capsys) -> None:
    assert generate("--show_info", "--max_new_tokens", "2", "--seed", "9") == 0
    err = capsys.readouterr().err
    assert "step 7" in err
    assert "context 16" in err
    assert "tok/s" in err
    assert "seed 9" in err


def test_settings_default_then_mode_then_preset_then_flag() -> None:
    assert cmd_generate.sampling({}) == cmd_generate.SETTINGS
    assert cmd_generate.sampling({"mode": "qa"})["temperature"] == 0.3
    assert cmd_generate.sampling({"mode": "qa", "preset": "creative"})["top_k"] == 100
    chosen = cmd_generate.sampling({"preset": "deterministic", "temperature": 0.5})
    assert chosen == {
        "temperature": 0.5, "top_k": 1, "top_p": 1.0, "repetition_penalty": 1.0
    }  # fmt: skip


def test_interrupting_ends_the_line_and_exits_130(run_dir, monkeypatch, capsys) -> None:
    from mypt_fast import generate as module

    def interrupted(tokenizer, generation):
        yield "é"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream_text", interrupted)
    assert generate("--prompt", "ab") == 130
    assert capsys.readouterr() == ("abé\n", "interrupted\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "xyz"], "character 'x'"),
        (["--prompt", "a", "--prompt_file", "b"], "--prompt_file"),
        (["--prompt_file", "missing.txt"], "missing.txt"),
        (["--num_samples", "0"], "--num_samples"),
        (["--temperature", "-1"], "temperature"),
        (["--stop_tokens", "ab"], "2 tokens"),
        (["--stop_tokens", "9999"], "9999"),
        (["--device", "tpu"], "unknown device"),
        (["--tempratur", "1"], "did you mean --temperature"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run_dir, capsys, words, said) -> None:
    assert main(["generate", "--model_name", "m", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_an_unknown_model_names_the_nearest_and_makes_no_folder(run_dir, capsys) -> None:
    assert main(["generate", "--model_name", "mm"]) == 2
    assert "the nearest run is 'm'" in capsys.readouterr().err
    assert sorted(p.name for p in run_dir.parent.iterdir()) == ["m"]


def test_damaged_weights_exit_3(run_dir, capsys) -> None:
    data = bytearray((run_dir / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (run_dir / "model.pt").write_bytes(data)
    assert generate("--prompt", "a") == 3
    assert "model.pt" in capsys.readouterr().err
