"""F10: mutated configs end in a preset or in one line, never in a traceback."""

import copy
import json
import random
from pathlib import Path

from content import N_FAULTS

from mypt_fast import presets, settings
from mypt_fast.cli import main
from mypt_fast.errors import ConfigError

FULL = {
    "name": "x", "description": "y", "batch_size": 4, "block_size": 16, "n_embd": 24, "n_head": 2,
    "n_layer": 2, "dropout": 0.1, "bias": True, "pos_encoding": "rope", "warmup_iters": 0.05,
    "save_dtype": None, "keep_last": 2, "learning_rate": 3e-4, "max_iters": 10, "seed": 1,
    "eval_sets": {"general": "data/a"},
    "curriculum": {"phases": [
        {"name": "one", "dataset_dir": "data/a", "until_iter": 5},
        {"name": "two", "dataset_dir": "data/b", "until_iter": None},
    ]},
    "gold_selection": {"strategy": "hybrid", "guards": {"overfit_ratio": 4}},
}  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 10**400, -(10**19), 1e308, float("nan"), float("inf"), 0.5, "",
    "a", "\0", "\ud800", "x" * 5000, [], [None], {}, {"a": {"b": []}}, [[[]]], "cuda", "bf16",
    1 << 63, -0.0, "é\n\x1b[2J", {"": ""}, 3e-4,
]  # fmt: skip


def places(value, path=()):
    """Every key path of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def mutated(rng: random.Random) -> bytes:
    raw = copy.deepcopy(FULL)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(list(places(raw)))
        holder = raw
        for key in place[:-1]:
            holder = holder[key]
        kind = rng.randrange(4)
        if kind == 0 or isinstance(holder, list):
            holder[place[-1]] = rng.choice(VALUES)
        elif kind == 1:
            del holder[place[-1]]
        elif kind == 2:
            word = list(str(place[-1]))
            word[rng.randrange(len(word))] = rng.choice("aZ_-é \n")
            holder["".join(word)] = holder.pop(place[-1])
        else:
            holder[rng.choice(["n_layer", "eval_seed", "mixture", "nonsense"])] = rng.choice(VALUES)
        if not raw:
            break
    data = bytearray(json.dumps(raw).encode())
    if rng.random() < 0.3:  # damage below JSON
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def attempt(path: Path) -> str | None:
    """The words that refuse a config; None for a good one; any other exception goes up."""
    try:
        presets.load(path)
        settings.resolve({}, config_file=str(path), checkpoints=path.parent / "none")
    except ConfigError as e:
        return str(e)
    return None


def test_mutated_configs_are_settings_or_one_line(tmp_path: Path, capsys) -> None:
    rng, path = random.Random(3), tmp_path / "c.json"
    good = bad = 0
    for i in range(N_FAULTS):
        path.write_bytes(mutated(rng))
        refusal = attempt(path)
        if refusal is None:
            good += 1
            continue
        bad += 1
        assert refusal.isprintable(), path.read_bytes()
        assert "c.json" in refusal or "settings" in refusal, refusal
        assert len(refusal) < 600
        if i % 20 == 0:  # the same through the command line
            assert main(["train", "--config", str(path), "--dry_run"]) == 2
            assert capsys.readouterr().err.count("\n") == 1
    print(f"{N_FAULTS} configs: {good} good, {bad} refused in one line, 0 tracebacks")
    assert good + bad == N_FAULTS
    assert good > 0
    assert bad > N_FAULTS / 4
