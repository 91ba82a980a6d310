"""Old checkpoints go on: `mypt-fast train` resumes them, starts from them, and saves bundles."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mypt_fast import generate
from mypt_fast.checkpoint import bundle, legacy
from mypt_fast.cli import main
from tests.checkpoint.old_files import (
    CHAR,
    FIFTEEN,
    GPT2,
    LETTERS,
    SIZES,
    OldGPT,
    batch,
    fifteen_state,
    old_bundle,
    old_groups,
    single_file,
    trained,
)

BIAS = {**SIZES, "bias": True}
# every setting that a resumed run may choose, so that AdamW alone decides what a step does
STEP = [
    "--dataset_dir", "data/a", "--schedule", "constant", "--learning_rate", "1e-2",
    "--grad_clip", "0", "--eval_interval", "100", "--eval_iters", "1", "--no_use_amp",
    "--compile", "off", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data/a: only the letter a, so that every batch of a run is the same."""
    monkeypatch.chdir(tmp_path)
    dataset("data/a", [0])
    return tmp_path


def dataset(folder: str, letters: list[int]) -> str:
    for split, n in (("train", 900), ("val", 200)):
        path = Path(folder) / split
        path.mkdir(parents=True)
        np.resize(np.array(letters, dtype="<u4"), n).tofile(path / "shard_00000.bin")
    (Path(folder) / "tokenizer_state.json").write_text(json.dumps(CHAR))
    return folder


def train(name: str, *flags: str) -> int:
    return main(["train", "--model_name", name, *STEP, *flags])


def plain_continuation(model: OldGPT, old: torch.optim.AdamW, steps: int) -> OldGPT:
    """What PyTorch's AdamW makes of the model on batches of the letter a, its moments kept."""
    moments = {id(p): dict(old.state[p]) for p in model.parameters() if p in old.state}
    optimizer = torch.optim.AdamW(old_groups(model), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for p in model.parameters():
        if id(p) in moments:
            optimizer.state[p] = moments[id(p)]
    a = torch.zeros(4, 12, dtype=torch.long)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(a, a).backward()
        optimizer.step()
    return model


def same(run: Path, model: OldGPT) -> None:
    idx, _ = batch(SIZES, 5)
    with torch.no_grad():
        found, expected = generate.load(run).model(idx), model(idx)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("era", "cfg", "groups"), [("file", SIZES, 1), ("bundle", BIAS, 1), ("bundle", SIZES, 2)]
)
def test_a_resumed_run_steps_as_plain_adamw_would(era, cfg, groups, capsys) -> None:
    model, old = trained(cfg, tril=groups == 1, groups=groups)
    run = Path("checkpoints/old")
    if era == "file":
        kept = single_file(run / "latest.pt", model, cfg, optimizer=old)
        aside = kept
    else:
        kept = old_bundle(run, model, cfg, optimizer=old) / "model.pt"
        aside = run / "model.pt.legacy"
    before = kept.read_bytes()
    assert train("old", "--max_iters", "4") == 0
    assert "start from zero" not in capsys.readouterr().err
    same(run, plain_continuation(model, old, 1))
    assert aside.read_bytes() == before
    config = json.loads((run / "config.json").read_text())
    assert config["per_head_era"] is True
    assert json.loads((run / "training_state.json").read_text())["step"] == 4
    assert bundle.read(run).notices == []
    # from here on it is a run like any other
    assert train("old", "--max_iters", "6") == 0
    assert "per-head" not in capsys.readouterr().err
    assert aside.read_bytes() == before


def test_five_steps_in_two_starts_are_five_steps_of_plain_adamw() -> None:
    model, old = trained(SIZES)
    single_file(Path("checkpoints/old/latest.pt"), model, SIZES, optimizer=old)
    assert train("old", "--max_iters", "5") == 0
    assert train("old", "--max_iters", "8") == 0
    same(Path("checkpoints/old"), plain_continuation(model, old, 5))


def test_moments_that_do_not_fit_start_from_zero_and_training_goes_on(capsys) -> None:
    model, old = trained(SIZES)
    state = old.state_dict()
    del state["param_groups"][0]["params"][-1]
    single_file(Path("checkpoints/old/latest.pt"), model, SIZES, optimizer_state_dict=state)
    assert train("old", "--max_iters", "4") == 0
    err = capsys.readouterr().err
    assert err.count("its moments start from zero") == 1
    afresh = torch.optim.AdamW(model.parameters())
    same(Path("checkpoints/old"), plain_continuation(model, afresh, 1))


def test_the_data_has_to_be_named(capsys) -> None:
    single_file(Path("checkpoints/old/latest.pt"), OldGPT(SIZES), SIZES)
    assert main(["train", "--model_name", "old", "--device", "cpu", "--max_iters", "4"]) == 2
    assert "name it with --dataset_dir" in capsys.readouterr().err
    assert [p.name for p in Path("checkpoints/old").iterdir()] == ["latest.pt"]


def test_a_text_is_read_with_the_files_own_characters(tmp_path: Path, capsys) -> None:
    """A vocabulary built from the text anew would give every letter another id."""
    backwards = {"token_kind": "char", "chars": list(reversed(LETTERS))}
    model, old = trained(SIZES)
    run = Path("checkpoints/old")
    single_file(run / "latest.pt", model, SIZES, tokenizer=backwards, optimizer=old)
    Path("book.txt").write_text(LETTERS[-1] * 900)
    words = [w for w in STEP if w not in ("--dataset_dir", "data/a")]
    call = ["train", "--model_name", "old", "--input_file", "book.txt", "--max_iters", "4"]
    assert main([*call, *words]) == 0
    same(run, plain_continuation(model, old, 1))
    assert bundle.read(run).tokenizer["chars"] == backwards["chars"]
    Path("other.txt").write_text("zebra" * 99)
    call[4] = "other.txt"
    call[-1] = "5"
    assert main([*call, *words]) == 2
    assert "'z'" in capsys.readouterr().err


def test_a_preset_and_a_dry_run_go_with_an_old_file(tmp_path: Path, capsys) -> None:
    preset = {k: SIZES[k] for k in SIZES if k != "device"}
    Path("mine.json").write_text(json.dumps(preset))
    run = Path("checkpoints/old")
    single_file(run / "latest.pt", OldGPT(SIZES), SIZES)
    assert train("old", "--config", "mine.json", "--max_iters", "4", "--dry_run") == 0
    assert [p.name for p in run.iterdir()] == ["latest.pt"]
    assert train("old", "--config", "mine.json", "--max_iters", "4") == 0
    assert (run / "model.pt").is_file()
    Path("mine.json").write_text(json.dumps({**preset, "n_layer": 5}))
    assert train("old", "--config", "mine.json", "--max_iters", "5") == 2
    assert "n_layer is 2 in the run and 5" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["base", "checkpoints/base", "checkpoints/base/latest.pt"])
def test_a_new_run_starts_from_an_old_final(name: str, capsys) -> None:
    final, latest = OldGPT(SIZES, seed=1), OldGPT(SIZES, seed=2)
    single_file(Path("checkpoints/base/final.pt"), final, SIZES)
    single_file(Path("checkpoints/base/latest.pt"), latest, SIZES)
    words = ["--init_from_model", name, "--max_iters", "1", "--weight_decay", "0"]
    assert train("tuned", *words, "--learning_rate", "1e-9") == 0
    run = Path("checkpoints/tuned")
    same(run, latest if name.endswith("latest.pt") else final)
    assert json.loads((run / "config.json").read_text())["per_head_era"] is True
    assert sorted(p.name for p in Path("checkpoints/base").iterdir()) == ["final.pt", "latest.pt"]
    capsys.readouterr()
    assert train("tuned", *words, "--max_iters", "2") == 0
    assert "ignored" not in capsys.readouterr().err


def test_a_new_run_starts_from_an_old_bundle(capsys) -> None:
    model = OldGPT(BIAS)
    old_bundle(Path("checkpoints/base"), model, BIAS)
    words = ["--init_from_model", "base", "--max_iters", "1", "--weight_decay", "0"]
    assert train("tuned", *words, "--learning_rate", "1e-9") == 0
    same(Path("checkpoints/tuned"), model)


def test_only_latest_is_resumed_and_only_final_is_started_from(capsys) -> None:
    single_file(Path("checkpoints/a/final.pt"), OldGPT(SIZES), SIZES)
    single_file(Path("checkpoints/b/latest.pt"), OldGPT(SIZES), SIZES)
    assert legacy.old_run(Path("checkpoints/a")) is None
    assert legacy.old_run(Path("checkpoints/b"), legacy.INIT_FROM) is None
    shape = [f"--{k}={SIZES[k]}" for k in ("n_layer", "n_head", "n_embd", "block_size")]
    assert train("a", *shape, "--max_iters", "1") == 0
    err = capsys.readouterr().err
    assert "checkpoints/a/final.pt is not continued: --init_from_model a starts from it" in err
    assert train("c", "--init_from_model", "b", "--max_iters", "1") == 2
    assert not Path("checkpoints/c").exists()


def test_an_old_bundle_that_a_newer_mypt_hid_latest_behind_wins() -> None:
    """Resuming looks at the bundle first, also where it is old itself."""
    run = Path("checkpoints/old")
    model = OldGPT(SIZES, seed=8)
    old_bundle(run, model, SIZES, step=7)
    single_file(run / "latest.pt", OldGPT(SIZES, seed=9), SIZES, step=3)
    old = legacy.old_run(run)
    assert (old.file, old.state["step"]) == (None, 7)


def test_a_run_goes_back_to_its_old_file_where_nothing_was_saved_yet(capsys) -> None:
    """A rollback before the first save finds what the run was resumed from."""
    model, old = trained(SIZES)
    run = Path("checkpoints/old")
    single_file(run / "latest.pt", model, SIZES, optimizer=old)
    from mypt_fast import console, settings
    from mypt_fast.training.run import open_run
    from mypt_fast.training.trainer import Trainer

    typed = {"dataset_dir": "data/a", "max_iters": 9, "device": "cpu", "compile": "off"}
    resolved = settings.resolve(typed, model_name="old", read_old=legacy.old_run)
    opened = open_run(resolved)
    trainer = Trainer(opened, console.Live(9, 3))
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(9.0)
    assert trainer.store.roll_back() == 3
    assert torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)
    trainer.live.close()
    trainer.log.close()
    opened.close()


def test_a_run_with_fifteen_special_tokens_trains_on_its_own_data_only(capsys) -> None:
    """Their ids are what its data was written with; today's would be silently other tokens."""
    model, old = trained(GPT2, steps=1)
    run = Path("checkpoints/old")
    single_file(run / "latest.pt", model, GPT2, tokenizer=fifteen_state(), optimizer=old)
    for name, state in (("own", fifteen_state()), ("new", {"token_kind": "gpt2"})):
        (Path(dataset(f"data/{name}", [0, 50263, 9])) / "tokenizer_state.json").write_text(
            json.dumps(state)
        )
    words = ["--dataset_dir", "data/new", "--max_iters", "4"]
    assert train("old", *words) == 2
    assert "another vocabulary" in capsys.readouterr().err
    assert [p.name for p in run.iterdir()] == ["latest.pt"]
    words[1] = "data/own"
    assert train("old", *words) == 0
    saved = json.loads((run / "tokenizer.json").read_text())
    assert saved["special_tokens_by_name"] == FIFTEEN
