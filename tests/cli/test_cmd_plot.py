"""`mypt-fast plot`: pictures from good, cut, resumed and hostile logs."""

import builtins
import json

import pytest

from mypt_fast import plot, run_log
from mypt_fast.cli import main

PNG = b"\x89PNG\r\n\x1a\n"


def events(first: int, last: int, *, start: int = 0, minute: int = 0, loss: float = 5.0):
    """Events of one run from its start to step `last`, an evaluation every ten steps."""

    def at(step: int) -> str:
        seconds = 60 * minute + step - first
        return f"2026-02-09T14:{seconds // 60:02d}:{seconds % 60:02d}"

    config = {"start_step": start, "tokens_per_step": 100}
    model = {"total_params": 1000, "n_layer": 2, "n_embd": 8}
    yield {"event": "training_start", "timestamp": at(first), "config": config, "model": model}
    for step in range(first, last):
        common = {"iter": step, "timestamp": at(step), "lr": 0.1}
        if step % 10 == 0:
            value = loss - step / 100
            sets = {"eval_code": value + 0.2, "eval_duration_s": 1.0}
            yield {"event": "eval", **common, "val_loss": value, **sets}
            yield {"event": "gold_checkpoint", **common, "val_loss": value}
        yield {"event": "train", **common, "loss": loss - step / 99, "tokens_per_sec": 50}


def write(path, *runs, tail: str = "") -> None:
    lines = [json.dumps(e) + "\n" for run in runs for e in run]
    path.write_text("".join(lines) + tail)


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """logs/train/m_eval.jsonl with one good run, seen from the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "logs" / "train" / "m_eval.jsonl"
    path.parent.mkdir(parents=True)
    write(path, events(0, 30))
    return path


def is_png(path) -> bool:
    data = path.read_bytes()
    return data.startswith(PNG) and b"IEND" in data[-16:] and len(data) > 10_000


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_a_good_log_becomes_a_png(tmp_path, capsys, axis: str) -> None:
    assert main(["plot", "m", "--out", "a.png", "--x", axis, "--title", "Mine"]) == 0
    assert is_png(tmp_path / "a.png")
    assert capsys.readouterr() == ("wrote a.png\n", "")


def test_several_logs_share_a_picture(tmp_path, log) -> None:
    write(tmp_path / "b.jsonl", events(0, 50, loss=4.0))
    assert main(["plot", "m", "b.jsonl"]) == 0
    assert is_png(tmp_path / "loss.png")


def test_a_cut_line_junk_and_nan_are_counted_and_left_out(tmp_path, log, capsys) -> None:
    nan = {"event": "train", "iter": 30, "timestamp": "2026-02-09T14:00:31", "loss": float("nan")}
    more = [{"event": "train", "iter": "x"}, {"no": "event"}, nan]
    write(log, events(0, 30), more, tail='not json\n[1]\n\n{"event": "train", "it')
    assert main(["plot", "m", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)["logs"][0]
    assert (report["skipped_lines"], report["not_finite"]) == (4, 1)
    assert "4 lines skipped" in err
    assert is_png(tmp_path / "loss.png")


def test_a_resumed_run_is_one_line_whose_repeated_steps_count_once(log) -> None:
    write(log, events(0, 30), events(20, 40, start=20, minute=10, loss=3.0))
    read = run_log.read_log(log)
    steps, losses = run_log.series(read.train, "loss", "step")
    assert steps == list(range(40))
    assert losses[19] == pytest.approx(5 - 19 / 99)
    assert losses[20] == pytest.approx(3 - 20 / 99)
    assert run_log.series(read.train, "loss", "tokens")[0] == [100 * s for s in range(40)]
    seconds = run_log.series(read.train, "loss", "time")[0]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 60  # the ten minutes between the runs are not training
    assert read.starts == 2
    assert main(["plot", "m"]) == 0


def test_an_evaluation_at_the_checkpoint_survives_the_resume(log) -> None:
    write(log, events(0, 21), events(20, 21, start=20))
    assert run_log.series(run_log.read_log(log).evals, "val_loss", "step")[0] == [0, 10, 20]


def test_a_run_begun_anew_in_the_same_log_replaces_the_old_one(log) -> None:
    write(log, events(0, 30), events(0, 5, loss=2.0))
    read = run_log.read_log(log)
    assert run_log.series(read.train, "loss", "step")[0] == list(range(5))
    assert [p.step for p in read.gold] == [0]


def test_the_last_evaluation_comes_from_training_complete(log) -> None:
    done = {"event": "training_complete", "total_steps": 30, "final_val_loss": 1.5}
    write(log, events(0, 30), [done])
    steps, losses = run_log.series(run_log.read_log(log).evals, "val_loss", "step")
    assert (steps[-1], losses[-1]) == (30, 1.5)


def test_a_log_of_mypt_without_steps_or_start_can_be_drawn(log, tmp_path) -> None:
    evals = [e for e in events(0, 30) if e["event"] == "eval"]
    write(log, [{**e, "tokens_processed": 7 * e["iter"]} for e in evals])
    assert run_log.series(run_log.read_log(log).evals, "val_loss", "tokens")[0] == [0, 70, 140]
    assert main(["plot", "m", "--x", "tokens"]) == 0
    assert is_png(tmp_path / "loss.png")


def test_names_are_drawn_as_they_are(log, tmp_path) -> None:
    events_ = [{**e, "eval_$x_{": 1.0, "new_phase": "日$"} for e in events(0, 30)]
    events_.append({"event": "phase_switch", "iter": 12, "new_phase": "$^日"})
    write(tmp_path / "$a^{b_eval.jsonl", events_)
    assert main(["plot", "$a^{b_eval.jsonl", "--title", "$^"]) == 0
    assert is_png(tmp_path / "loss.png")


def test_further_sets_are_found_and_durations_are_not_losses(log) -> None:
    assert run_log.read_log(log).eval_sets == ["eval_code"]


def test_long_series_keep_their_extremes() -> None:
    x, y = list(range(50_000)), [1.0] * 50_000
    y[31_234], y[7] = 9.0, -9.0
    thin_x, thin_y = plot.thinned(x, y)
    assert len(thin_x) <= plot.MAX_POINTS + 2
    assert thin_x == sorted(thin_x)
    assert (max(thin_y), min(thin_y)) == (9.0, -9.0)


def test_the_running_mean_neither_lags_nor_widens_the_start() -> None:
    assert plot.running_mean([9.0, 3.0, 3.0, 3.0, 6.0], 3) == [9.0, 5.0, 3.0, 4.0, 4.5]
    assert plot.running_mean([1.0, 2.0], 1) == [1.0, 2.0]


NO_LOSSES = [
    ("", "nothing to plot"),
    ("x\ny\n", "2 lines that are not events"),
    ('{"event": "train", "iter": 1, "loss": NaN}\n', "no finite losses"),
]


@pytest.mark.parametrize(("content", "said"), NO_LOSSES)
def test_a_log_without_losses_is_one_line(log, capsys, content: str, said: str) -> None:
    log.write_text(content)
    assert main(["plot", "m"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("error: ") or "note: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "no log 'nothing'"),
        (["m", "--out", "no/such/folder/a.png"], "cannot write"),
        (["m", "--out", "a.nonsense"], "cannot write"),
        (["m", "--x", "day"], "--x"),
    ],
)
def test_mistakes_are_one_line(capsys, words, said) -> None:
    assert main(["plot", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_without_matplotlib_the_cure_is_named(monkeypatch, capsys) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["plot", "m"]) == 2
    assert "pip install 'mypt_fast[plot]'" in capsys.readouterr().err


def test_speed_has_mfu_on_its_right_where_the_log_has_it(log, tmp_path, monkeypatch) -> None:
    seen, finish = [], plot._Panels.finish

    def watch(self, *words: str) -> None:
        finish(self, *words)
        self.figure.draw_without_rendering()
        panel = self.below["tokens_per_sec"]
        for axis in panel.child_axes:
            seen.append(axis.get_ylabel())
            assert axis.get_ylim()[1] / panel.get_ylim()[1] == pytest.approx(0.4 / 50)

    monkeypatch.setattr(plot._Panels, "finish", watch)
    assert main(["plot", "m", "--out", "a.png"]) == 0
    assert seen == []
    write(log, ({**e, "mfu": 0.4} if e["event"] == "train" else e for e in events(0, 30)))
    assert main(["plot", "m", "--out", "a.png"]) == 0
    assert seen == ["MFU"]
    assert is_png(tmp_path / "a.png")
