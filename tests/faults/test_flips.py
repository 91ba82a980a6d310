"""F6 to F8: flipped bits, truncated, swapped, missing and future members of a bundle."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from content import N_FAULTS

from mypt_fast.checkpoint import bundle, snapshots
from mypt_fast.checkpoint.manifest import OWNED
from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.errors import IntegrityError, MyptError

CONFIG = ModelConfig(n_embd=4, n_head=1, n_layer=1, vocab_size=5, device="cpu").to_dict()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A bundle with every member."""
    parameter = torch.nn.Parameter(torch.ones(20))
    parameter.grad = torch.ones(20)
    adamw = torch.optim.AdamW([parameter])
    adamw.step()
    bundle.write(
        tmp_path / "m",
        config=CONFIG,
        state_dict={"a": torch.arange(40.0).reshape(5, 8)},
        training_state={"step": 7, "training_config": {"max_iters": 9, "model_name": "m"}},
        tokenizer={"token_kind": "char", "chars": ["a", "b", "é"]},
        optimizer=adamw.state_dict(),
        gold_state={"gold_step": 5, "best_val_loss": 2.5},
        original_config=b'{"n_layer": 1}',
        save_dtype="bf16",
        state={"step": 7, "rng": {"cpu": "AAAA"}, "data": [{"phase": "x", "state": {"n": 3}}]},
    )
    assert {p.name for p in (tmp_path / "m").iterdir()} == OWNED
    return tmp_path / "m"


def same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.dumps(json.loads(a)) == json.dumps(json.loads(b))
    except ValueError:
        return False


def attempt(path: Path) -> tuple[bundle.Bundle | None, str]:
    """Read a bundle, or return the words that refuse it; anything else goes up."""
    try:
        return bundle.read(path), ""
    except MyptError as e:
        return None, str(e)


def test_every_flipped_bit_is_found_before_use(saved: Path) -> None:
    rng, outcomes = random.Random(1), Counter()
    members = sorted(OWNED)
    for i in range(N_FAULTS):
        path = saved / members[i % len(members)]
        data = path.read_bytes()
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        os.utime(path, (1e9, 1e9))  # rot does not touch the clock
        got, refusal = attempt(saved)
        if got is None:
            assert path.name in refusal, (path.name, at, bit, refusal)
            assert refusal.isprintable()
            outcomes["refused by name"] += 1
        elif got.notices:
            assert path.name in " ".join(got.notices), (path.name, at, bit, got.notices)
            assert path.suffix == ".json"
            assert path.name not in ("manifest.json", "tokenizer.json")
            outcomes["an edit, named"] += 1
        else:
            assert same_json(data, flipped), (path.name, at, bit)
            outcomes["harmless: the same JSON"] += 1
        path.write_bytes(data)
    print(f"{N_FAULTS} flips: {dict(outcomes)}")
    assert sum(outcomes.values()) == N_FAULTS
    assert outcomes["refused by name"] > N_FAULTS / 2
    assert bundle.read(saved).notices == []


@pytest.mark.parametrize("name", sorted(OWNED))
@pytest.mark.parametrize("how", ["half", "short by one", "empty", "missing", "swapped", "longer"])
def test_a_broken_member_is_one_line_and_exit_code_3(
    saved: Path, capsys, name: str, how: str
) -> None:
    path = saved / name
    data = path.read_bytes()
    other = saved / ("optimizer.pt" if name == "model.pt" else "model.pt")
    if how == "missing":
        path.unlink()
    elif how == "swapped":
        path.rename(saved / "x")
        other.rename(path)
        (saved / "x").rename(other)
    else:
        # the last byte of a JSON member is a line end, and the line end after it another
        cut = {"half": data[: len(data) // 2], "short by one": data[:-2], "empty": b""}
        path.write_bytes(cut.get(how, data + b"}"))
    if name == "manifest.json" and how == "missing":
        assert main(["verify", str(saved)]) == 0  # that much is allowed; it says what it means
        assert "nothing says" in capsys.readouterr().out
        return
    assert main(["verify", str(saved)]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert name in err
    # what a run or a reader makes of it: a refusal or a notice, in one line, never anything else
    got, refusal = attempt(saved)
    if got is None:
        assert refusal.isprintable()
        with pytest.raises(IntegrityError):
            snapshots.settle(saved)
    else:
        assert snapshots.settle(saved) == []
        assert len(got.notices) == 1 + (name == "optimizer.pt")  # bf16 weights, said too
        assert name in got.notices[0]
        assert (how == "missing") or name in ("gold_selection_state.json", "original_config.json")


def test_members_of_two_saves_are_no_bundle(saved: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    for path in saved.iterdir():
        (older / path.name).write_bytes(path.read_bytes())
    content = bundle.read(saved)
    bundle.write(
        saved, config=CONFIG, state_dict={"a": content.state_dict["a"] + 1},
        training_state={"step": 8}, optimizer=content.optimizer, state={"step": 8},
    )  # fmt: skip
    for name in ("model.pt", "training_state.json", "manifest.json"):
        keep = (saved / name).read_bytes()
        (saved / name).write_bytes((older / name).read_bytes())
        if name != "manifest.json":  # else every member were newer than it: another program's
            os.utime(saved / name, (1e9, 1e9))
        with pytest.raises(IntegrityError):
            bundle.read(saved)
        (saved / name).write_bytes(keep)
    assert bundle.read(saved).notices == []


def test_a_member_of_a_future_version_asks_for_an_update(saved: Path, capsys) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    for schema in (3, 10**30, "9", None, [2], {}):
        path.write_text(json.dumps({**manifest, "schema": schema}))
        assert main(["verify", str(saved)]) == 3
        assert "update mypt_fast" in capsys.readouterr().err


def test_a_bundle_with_stale_temporaries_of_the_dead_reads_as_ever(saved: Path) -> None:
    for name in (".m.tmp-999999999", ".m.old-999999999"):
        saved.with_name(name).mkdir()
        (saved.with_name(name) / "model.pt").write_bytes(b"junk")
    assert bundle.read(saved).training_state["step"] == 7
