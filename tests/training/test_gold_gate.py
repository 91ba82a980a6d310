"""The external gate: only where it is allowed, bounded, and no whenever something goes wrong."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import events
from test_resume import Killed, assert_same_run

from mypt_fast.checkpoint import bundle
from mypt_fast.checkpoint.manifest import SEAL, seal
from mypt_fast.config import ExternalGate
from mypt_fast.errors import CheckpointError
from mypt_fast.training import selection, store
from mypt_fast.training.gate import GateResult, deep_get, is_due, run_gate
from mypt_fast.training.signals import StopRequested

WRITE = "import json, sys; json.dump({}, open(sys.argv[sys.argv.index('--output') + 1], 'w'))"


def script(body: str, name: str = "gate.py") -> str:
    Path(name).write_text(body)
    return name


def answer(**content: object) -> str:
    """A script that writes this JSON where it is told to."""
    return script(WRITE.replace("{}", repr(content)))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(path: str | None, **settings: object) -> GateResult:
    ext = ExternalGate(enabled=True, script=path, metric_path="scores.f1", **settings)
    return run_gate(ext, Path(), "toy", 7)


def test_a_verdict_and_a_metric_are_read_by_their_paths() -> None:
    found = ask(answer(gate_passed=True, scores={"f1": 0.5}))
    assert (found.ran, found.ok, found.returncode, found.error) == (True, True, 0, None)
    assert (found.gate_pass, found.metric_value) == (True, 0.5)
    assert found.output_json == "gold_gate_step_7.json"
    assert list(found.fields()) == [
        "ran", "ok", "returncode", "gate_pass", "metric_value", "metric_path", "output_json",
        "error",
    ]  # fmt: skip
    assert not ask(answer(gate_passed=False)).gate_pass
    nested = ask(answer(a={"b": False}), pass_path="a.b")
    assert (nested.ok, nested.gate_pass) == (True, False)
    assert ask(answer(other=1)).gate_pass  # no verdict: the exit code is one


def test_placeholders_are_filled_and_an_output_flag_is_added_where_none_is_used() -> None:
    body = "import sys, json; json.dump({'gate_passed': sys.argv[1:] == %r}, open(%s, 'w'))"
    plain = script(body % (["--model", "toy", "--output", "gold_gate_step_7.json"], "sys.argv[-1]"))
    assert ask(plain, args=("--model", "{model_name}")).gate_pass
    used = script(body % (["toy.x", "gold_gate_step_7.json"], "sys.argv[-1]"))
    assert ask(used, args=("{model_name}.x", "{output_json}")).gate_pass


def test_no_shell_reads_the_arguments() -> None:
    body = "import sys, json; json.dump({'gate_passed': sys.argv[1] == %r}, open(sys.argv[3], 'w'))"
    text = "; touch executed $(touch executed) `touch executed` && touch executed"
    assert ask(script(body % text), args=(text,)).gate_pass
    assert not Path("executed").exists()


@pytest.mark.parametrize(("body", "error"), [
    ("raise SystemExit(3)", "exit code 3"),
    ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ("pass", "it wrote no gold_gate_step_7.json"),
    ("open('gold_gate_step_7.json', 'w').write('{')", "not valid JSON"),
    ("open('gold_gate_step_7.json', 'w').write('[' * 99999)", "nested too deeply"),
    ("open('gold_gate_step_7.json', 'w').write('[' + '1,' * 999999 + '1]')", "json"),
    ("import os; os.mkfifo('gold_gate_step_7.json')", "it wrote no"),
    (WRITE.replace("{}", "{'gate_passed': 'yes'}"), "neither true nor false"),
    (WRITE.replace("{}", "{'gate_passed': True, 'scores': {'f1': float('nan')}}"), ""),
    (WRITE.replace("{}", "{'gate_passed': True, 'scores': {'f1': True}}"), "is no number"),
    (WRITE.replace("{}", "{'gate_passed': True, 'scores': {'f1': 10**400}}"), ""),
])  # fmt: skip
def test_whatever_goes_wrong_means_no(body: str, error: str) -> None:
    found = ask(script(body))
    assert (found.ran, found.ok, found.gate_pass, found.metric_value) == (True, False, False, None)
    assert error in (found.error or "")
    assert "\n" not in (found.error or "x\n")


@pytest.mark.parametrize("path", [None, "nowhere.py", ".", "x" * 5000])
def test_a_script_that_is_not_there_says_no(path: str | None) -> None:
    found = ask(path)
    assert (found.ok, found.gate_pass) == (False, False)
    assert found.error


def test_a_verdict_of_an_earlier_attempt_is_not_believed() -> None:
    Path("gold_gate_step_7.json").write_text('{"gate_passed": true}')
    assert not ask(script("pass")).gate_pass


def test_a_script_that_does_not_end_is_ended_with_all_it_started() -> None:
    """Its child holds the output open and ignores the hang-up."""
    body = (
        "import subprocess, sys, os\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "os.close(1); os.close(2)\n"
        "while True: pass"
    )
    began = time.monotonic()
    found = ask(script(body), timeout_s=1.5)
    assert time.monotonic() - began < 60
    assert (found.ok, found.returncode, found.error) == (False, None, "timed out after 1.5 s")
    pid = int(Path("child").read_text())
    for _ in range(1000):
        if not running(pid):
            break
        time.sleep(0.01)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_output_without_end_is_read_and_only_its_tail_kept() -> None:
    body = (
        "import sys\nfor i in range(20000): print('x' * 100)\n"
        "print('last words \\xff', flush=True)\nsys.stdout.buffer.write(b'\\xff')\nsys.exit(1)"
    )
    found = ask(script(body))
    assert found.error == "exit code 1"
    assert "last words" in found.output_tail
    assert found.line.startswith("  gate: no (exit code 1; ")
    assert found.line.isprintable()
    assert len(found.output_tail) <= 2000


def test_a_stop_ends_the_script_at_once() -> None:
    def stop() -> None:
        if Path("started").exists():
            raise StopRequested

    ext = ExternalGate(
        enabled=True,
        script=script(
            "import os, time\nopen('pid', 'w').write(str(os.getpid()))\n"
            "open('started', 'w').close()\ntime.sleep(600)"
        ),
    )
    with pytest.raises(StopRequested):
        run_gate(ext, Path(), "toy", 7, stop)
    assert not running(int(Path("pid").read_text()))


def test_when_the_gate_is_due() -> None:
    every, third = ExternalGate(enabled=True), ExternalGate(enabled=True, run_interval_evals=3)
    assert [is_due(third, n, False) for n in range(5)] == [True, False, False, True, False]
    assert is_due(every, 1, False)
    assert is_due(third, 1, True)
    assert not is_due(ExternalGate(enabled=True, run_on_final_eval=False), 0, True)
    assert not is_due(ExternalGate(), 0, False)


def test_a_path_into_nested_objects() -> None:
    assert deep_get({"a": {"b": 3}}, "a.b") == 3
    assert deep_get({"a": [1]}, "a.b", 7) == 7
    assert deep_get([], "a", 7) == 7


# in a run


def gated(strategy: str = "hybrid", **ext: object) -> list[str]:
    """Flags of a run whose config names ./gate.py, which says yes to steps 5 and on."""
    script(
        "import json, sys\n"
        "from pathlib import Path\n"
        "name, out = sys.argv[1], sys.argv[3]\n"
        "step = json.loads(Path('checkpoints', name, 'training_state.json').read_text())['step']\n"
        "with open('asked', 'a') as f: f.write(f'{step} ')\n"
        "Path(out).write_text(json.dumps({'gate_passed': step >= 5, 'm': step}))\n"
    )
    gate = {"enabled": True, "script": "gate.py", "args": ["{model_name}"], "metric_path": "m"}
    rules = {"strategy": strategy, "external_gate": gate | ext, "apply_loss_guards": False}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}
    Path("gate.json").write_text(json.dumps({"gold_selection": rules, **shape}))
    return ["--config", "gate.json"]


def test_the_gate_runs_only_where_it_is_allowed(train, capsys) -> None:
    assert train("a", *gated()) == 0
    assert not Path("asked").exists()
    notes = [x for x in capsys.readouterr().err.splitlines() if "--allow_gate" in x]
    assert len(notes) == 1
    assert not Path("checkpoints/a_gold").exists()  # hybrid: no pass, no gold
    assert all("gold_gate" not in e for e in events("a", "eval"))


def test_permission_is_for_one_command_and_no_file_gives_it(train, capsys) -> None:
    Path("x.json").write_text('{"allow_gate": true}')
    assert train("x", "--config", "x.json") == 2
    assert "unknown key" in capsys.readouterr().err
    assert train("a", *gated(), "--allow_gate") == 0
    asked = Path("asked").read_text()
    assert train("a", "--max_iters", "20", resume=True) == 0
    assert Path("asked").read_text() == asked


def test_the_gate_judges_the_weights_that_were_just_saved(train, capsys) -> None:
    assert train("a", *gated(), "--allow_gate") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  gate: ")]
    assert lines == ["  gate: no | m 0", *(f"  gate: passed | m {n}" for n in (5, 10, 12))]
    assert Path("asked").read_text() == "0 5 10 12 "
    gates = [e["gold_gate"] for e in events("a", "eval")]
    assert [g["gate_pass"] for g in gates] == [False, True, True]
    assert [g["metric_value"] for g in gates] == [0.0, 5.0, 10.0]
    blocked = events("a", "gold_blocked")[0]
    assert blocked["reason"] == "hybrid strategy needs a pass: the external gate said no"
    assert (blocked["gate_pass"], blocked["gate_metric"]) == (False, 0.0)
    gold = events("a", "gold_checkpoint")[0]
    assert (gold["iter"], gold["strategy"], gold["gate_metric"]) == (5, "hybrid", 5.0)
    assert events("a", "gold_gate")[0]["iter"] == 12
    state = json.loads(Path("checkpoints/a/gold_selection_state.json").read_text())
    assert (state["strategy"], state["last_gate"]["metric_value"]) == ("hybrid", 12.0)
    assert Path("checkpoints/a/gold_gate_step_5.json").is_file()
    assert bundle.read(Path("checkpoints/a")).notices == []


def test_the_gates_metric_chooses_gold_and_its_best_survives_a_resume(train) -> None:
    flags = gated("external_gate", metric_goal="min")
    assert train("a", *flags, "--allow_gate") == 0
    golds = [e for e in events("a") if e["event"].startswith("gold_checkpoint")]
    assert [e["iter"] for e in golds] == [0]  # every later metric is larger
    assert events("a", "training_complete")[0]["best_gate_metric"] == 0.0
    assert train("a", "--max_iters", "20", "--allow_gate", resume=True) == 0
    golds = [e for e in events("a") if e["event"].startswith("gold_checkpoint")]
    assert [e["iter"] for e in golds] == [0]


def test_a_gate_every_second_evaluation_keeps_counting_across_a_resume(train) -> None:
    flags = [*gated(run_interval_evals=2, run_on_final_eval=False), "--allow_gate"]
    assert train("whole", *flags, "--max_iters", "20", "--schedule", "constant") == 0
    assert Path("asked").read_text() == "0 10 "
    Path("asked").unlink()
    assert train("parts", *flags, "--max_iters", "5", "--schedule", "constant") == 0
    # the final evaluation of the first part counts as one
    assert train("parts", "--max_iters", "20", "--allow_gate", resume=True) == 0
    assert Path("asked").read_text().split()[0] == "0"


def test_death_while_the_gate_runs_repeats_the_evaluation(train, monkeypatch) -> None:
    flags = [*gated(), "--allow_gate"]
    assert train("whole", *flags) == 0
    original = selection.run_gate

    def die(ext, folder, name, step, between):
        if step == 10:
            raise Killed
        return original(ext, folder, name, step, between)

    with monkeypatch.context() as patched:
        patched.setattr(selection, "run_gate", die)
        with pytest.raises(Killed):
            train("parts", *flags)
    assert [e["iter"] for e in events("parts", "eval")] == [0, 5]
    Path("asked").unlink()
    assert train("parts", "--allow_gate", resume=True) == 0
    assert Path("asked").read_text() == "10 12 "
    same = [{k: str(v).replace("parts", "whole") for k, v in e.items()} for e in kept("parts")]
    assert same == [{k: str(v) for k, v in e.items()} for e in kept("whole")]


def kept(name: str) -> list[dict]:
    return [e | {"timestamp": 0} for e in events(name) if e["event"].startswith("gold")]


def test_a_signal_while_the_gate_runs_saves_and_stops(train, monkeypatch) -> None:
    assert train("whole", *gated(), "--allow_gate") == 0
    original = selection.run_gate

    def interrupted(*arguments):
        if arguments[3] == 5 and not Path("sent").exists():
            Path("sent").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(selection, "run_gate", interrupted)
    assert train("parts", *gated(), "--allow_gate") == 130
    assert train("parts", "--allow_gate", resume=True) == 0
    # the two differ in the path of the gate's file alone
    for name in ("whole", "parts"):
        path = Path(f"checkpoints/{name}/manifest.json")
        text = path.read_text().replace("checkpoints/parts/", "checkpoints/whole/")
        said = {key: value for key, value in json.loads(text).items() if key != SEAL}
        path.write_text(json.dumps(seal(said)))
        log = Path(f"logs/train/{name}_eval.jsonl")
        log.write_text(log.read_text().replace("checkpoints/parts/", "checkpoints/whole/"))
    assert_same_run("whole", "parts")


def test_a_checkpoint_that_could_not_be_saved_is_not_judged(train, monkeypatch, capsys) -> None:
    """The one before it is still there, and would be judged in its place."""
    write = store.bundles.write

    def not_at_five(target, **content):
        if content["training_state"]["step"] == 5:
            raise CheckpointError(f"cannot save {target}", "No space left on device")
        write(target, **content)

    monkeypatch.setattr(store.bundles, "write", not_at_five)
    assert train("a", *gated(), "--allow_gate") == 0
    assert Path("asked").read_text() == "0 10 12 "
    at_five = events("a", "eval")[1]["gold_gate"]
    assert (at_five["ran"], at_five["gate_pass"]) == (False, False)
    assert at_five["error"] == "the checkpoint could not be saved"
    assert "  gate: no (the checkpoint could not be saved)" in capsys.readouterr().out
    assert [e["iter"] for e in events("a", "gold_checkpoint")] == [10]
