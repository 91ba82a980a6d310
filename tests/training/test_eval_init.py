"""Runs that start from another model's weights, longer contexts, frozen parts, noise, phases."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, events, write_dataset
from test_resume import Killed, assert_same_run, interrupt_at

from mypt_fast import settings
from mypt_fast.checkpoint import bundle
from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.data.loader import TokenLoader
from mypt_fast.model import GPT
from mypt_fast.training.init_from import fitted_positions
from mypt_fast.training.journal import Journal

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}
SLOW = pytest.mark.slow
RUN = ["--batch_size", "4", "--eval_interval", "5", "--eval_iters", "2", "--no_use_amp"]


def start(name: str, *flags: str) -> int:
    """Call `mypt-fast train` for a new run without the architecture of SMALL."""
    data = ["--dataset_dir", "data/toy"]
    return main(["train", "--model_name", name, "--max_iters", "3", *RUN, *data, *flags])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def weights(name: str) -> dict[str, torch.Tensor]:
    return bundle.read(Path("checkpoints") / name).state_dict


def state(name: str) -> dict:
    return bundle.read_info(Path("checkpoints") / name)["training_state"]


@pytest.mark.parametrize("source", ["base", "checkpoints/base", "base_gold"])
def test_a_run_starts_from_anothers_weights_with_a_fresh_optimizer(train, source: str) -> None:
    assert train("base") == 0
    before = weights(Path(source).name)
    # the rate is so small that the first evaluation's save is the source
    assert start("new", "--init_from_model", source, "--learning_rate", "1e-30") == 0
    for key, weight in weights("new").items():
        torch.testing.assert_close(weight, before[key], rtol=0, atol=1e-20)
    assert bundle.read(Path("checkpoints/new")).optimizer["state"][0]["step"] == 3
    assert [e["iter"] for e in events("new", "train")] == [0, 1, 2]
    assert state("new")["training_config"]["start_step"] == 0
    where = str(Path("checkpoints") / Path(source).name)
    assert state("new")["training_config"]["init_from_model"] == where
    assert events("new", "training_start")[0]["config"]["init_from_model"] == where
    assert events("base", "training_start")[0]["config"].get("init_from_model") is None


def test_the_first_loss_is_the_sources_last(train) -> None:
    assert train("base", "--dropout", "0") == 0
    assert start("new", "--init_from_model", "base", "--dropout", "0") == 0
    last = events("base", "training_complete")[0]["final_val_loss"]
    assert events("new", "eval")[0]["val_loss"] == last


def test_every_setting_that_is_no_architecture_is_the_new_runs(train, capsys) -> None:
    """Upstream drops most of them (Q-15)."""
    assert train("base", "--dropout", "0.3", "--batch_size", "4", "--weight_decay", "0.7") == 0
    ours = {
        "batch_size": 2, "dropout": 0.05, "use_checkpoint": True, "neftune_alpha": 3.0,
        "segment_position_reset": False, "batch_sampling_mode": "random", "epoch_seed": 3,
        "episode_min_tokens": 5, "pad_token_id": 1, "save_dtype": "bf16", "epoch_shuffle": False,
    }  # fmt: skip
    Path("c.json").write_text(json.dumps({**ours, "weight_decay": 0.2, "n_layer": 2}))
    flags = ["--config", "c.json", "--init_from_model", "base", "--batch_size", "2"]
    assert start("new", *flags) == 0
    config = bundle.read_info(Path("checkpoints/new"))["config"]
    assert ours.items() <= config.items()
    assert SHAPE.items() <= config.items()
    assert state("new")["training_config"]["weight_decay"] == 0.2
    assert start("plain", "--init_from_model", "base") == 0
    plain = bundle.read_info(Path("checkpoints/plain"))["config"]
    assert plain["dropout"] == ModelConfig().dropout  # not the source's either
    assert "architecture" not in capsys.readouterr().err


def test_the_architecture_is_the_sources_and_what_differs_is_one_line(train, capsys) -> None:
    assert train("base") == 0
    capsys.readouterr()
    Path("c.json").write_text('{"n_layer": 5, "vocab_size": 50304}')
    flags = ["--init_from_model", "base", "--config", "c.json", "--n_head", "4", "--n_embd", "16"]
    assert start("new", *flags) == 0
    notes = [x for x in capsys.readouterr().err.splitlines() if "architecture" in x]
    assert notes == [
        "note: the architecture is that of checkpoints/base: n_head 2, not 4, n_layer 2, not 5"
    ]
    assert start("strict", *flags, "--strict") == 2
    assert "n_head 2, not 4, n_layer 2, not 5" in error_line(capsys)
    assert not Path("checkpoints/strict").exists()


def test_a_resume_never_looks_at_the_source_again(train, monkeypatch, capsys) -> None:
    assert train("base") == 0
    flags = ["--init_from_model", "base", "--max_iters", "12"]
    assert start("whole", *flags) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4, Journal, "step")
        assert start("parts", *flags) == 130
    shutil.rmtree("checkpoints/base")
    shutil.rmtree("checkpoints/base_gold")
    assert main(["train", "--model_name", "parts"]) == 0
    assert_same_run("whole", "parts")
    assert state("parts")["training_config"]["init_from_model"] == "checkpoints/base"
    capsys.readouterr()
    assert start("parts", "--init_from_model", "base", "--max_iters", "13") == 0
    assert "ignored" not in capsys.readouterr().err  # that is where it began
    assert start("parts", "--init_from_model", "gone", "--max_iters", "14") == 0
    assert "init_from_model gone is ignored" in capsys.readouterr().err
    assert state("parts")["training_config"]["init_from_model"] == "checkpoints/base"


def test_low_precision_sources_start_from_the_exact_weights(train) -> None:
    assert train("base", "--save_dtype", "bf16") == 0
    exact = bundle.read(Path("checkpoints/base")).state_dict
    assert start("new", "--init_from_model", "base", "--learning_rate", "1e-30") == 0
    for key, weight in weights("new").items():
        torch.testing.assert_close(weight, exact[key], rtol=0, atol=1e-20)


def test_another_vocabulary_is_refused_before_anything_is_written(train, capsys) -> None:
    assert train("base") == 0
    other = write_dataset(Path("data/other"))
    (other / "tokenizer_state.json").write_text(
        json.dumps({"token_kind": "char", "chars": list("ABCDEFGHIJKLMNOP")})
    )
    assert start("new", "--init_from_model", "base", "--dataset_dir", "data/other") == 2
    assert "another vocabulary than checkpoints/base" in error_line(capsys)
    Path("t.txt").write_text("UPPER CASE " * 60)
    run = ["train", "--model_name", "new", "--init_from_model", "base", "--input_file", "t.txt"]
    assert main(run) == 2
    error_line(capsys)
    assert not Path("checkpoints/new").exists()


@pytest.mark.parametrize(("break_it", "code", "words"), [
    (lambda p: shutil.rmtree(p), 2, "nothing in checkpoints/base"),
    (lambda p: (p / "model.pt").unlink(), 2, "has no model.pt"),
    (lambda p: (p / "tokenizer.json").unlink(), 2, "has no tokenizer.json"),
    (lambda p: (p / "config.json").write_text("[]"), 2, "expected a JSON object"),
    (lambda p: (p / "config.json").write_text('{"n_layer": "x"}'), 2, "n_layer"),
    (lambda p: (p / "model.pt").write_bytes(b"junk"), 3, "model.pt"),
])  # fmt: skip
def test_a_source_that_cannot_be_used_is_one_line(train, capsys, break_it, code, words) -> None:
    assert train("base", "--keep_last", "0") == 0  # an older state would stand in
    break_it(Path("checkpoints/base"))
    assert start("new", "--init_from_model", "base") == code
    assert words in error_line(capsys)
    assert not Path("checkpoints/new").exists()


def test_weights_that_do_not_fit_their_config_are_one_line(train, capsys) -> None:
    assert train("base") == 0
    path = Path("checkpoints/base/config.json")
    path.write_text(path.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    (path.parent / "manifest.json").unlink()  # which would know better
    assert start("new", "--init_from_model", "base") == 2
    assert "do not fit its config.json" in error_line(capsys)


# longer contexts


@pytest.mark.parametrize("kind", ["learned", "rope"])
def test_the_context_grows_and_what_was_learned_stays(train, kind: str, capsys) -> None:
    assert train("base", "--pos_encoding", kind, "--dropout", "0") == 0
    flags = ["--block_size", "24", "--rope_scale", "2", "--learning_rate", "1e-30"]
    assert start("new", "--init_from_model", "base", "--dropout", "0", *flags) == 0
    assert "block_size is 24, where checkpoints/base has 12" in capsys.readouterr().err
    config = bundle.read_info(Path("checkpoints/new"))["config"]
    assert (config["block_size"], config["rope_scale"]) == (24, 2.0)
    old, new = weights("base"), weights("new")
    for key, weight in old.items():
        torch.testing.assert_close(new[key][: len(weight)], weight, rtol=0, atol=1e-20)
    assert main(["train", "--model_name", "new", "--max_iters", "5"]) == 0
    if kind == "learned":  # at full length it reads the first rows as before
        assert new["position_embedding_table.weight"].shape == (24, 16)
        x = torch.arange(12)[None] % 16
        models = [GPT(ModelConfig(**bundle.read_info(Path("checkpoints") / n)["config"]), None)
                  for n in ("base", "new")]  # fmt: skip
        for model, state_dict in zip(models, (old, new), strict=True):
            model.load_state_dict(state_dict)
            model.eval()
        with torch.no_grad():
            torch.testing.assert_close(models[0](x), models[1](x))


def test_new_position_rows_are_drawn_as_a_new_models_are() -> None:
    """Upstream draws them fifty times too large (Q-15)."""
    table = torch.ones(8, 256)
    longer = fitted_positions(table, 264, seed=3)
    assert torch.equal(longer[:8], table)
    assert float(longer[8:].std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(longer, fitted_positions(table, 264, seed=3))
    assert not torch.equal(longer, fitted_positions(table, 264, seed=4))
    assert torch.equal(fitted_positions(table, 5, seed=3), table[:5])


def test_a_resumed_run_keeps_its_context_and_says_what_to_do(train, capsys) -> None:
    assert train("a") == 0
    assert main(["train", "--model_name", "a", "--max_iters", "13", "--block_size", "24"]) == 0
    err = capsys.readouterr().err
    assert "--block_size 24 is ignored: checkpoints/a has 12" in err
    assert "another context needs a new run, with --init_from_model" in err


def test_settings_know_the_source_only_in_a_new_run(train) -> None:
    assert train("base") == 0
    new = settings.resolve({"init_from_model": "base"}, model_name="x")
    assert (new.init_dir, new.resume) == (Path("checkpoints/base"), False)
    again = settings.resolve({"init_from_model": "base"}, model_name="base")
    assert (again.init_dir, again.resume) == (None, True)


# frozen parts and noise


@pytest.mark.parametrize(("flags", "frozen"), [
    pytest.param(["--freeze_layers", "1"], ("blocks.0.",), marks=SLOW),
    pytest.param(["--freeze_embeddings"], ("token_embedding", "position_embedding"), marks=SLOW),
    (["--freeze_embeddings", "--pos_encoding", "rope"], ("token_embedding",)),
    (["--freeze_embeddings", "--tie_weights"],
     ("token_embedding", "position_embedding", "lm_head.weight")),
    (["--freeze_layers", "2", "--freeze_embeddings"], ("blocks.", "token_", "position_")),
])  # fmt: skip
def test_frozen_tensors_stay_bitwise_and_have_no_moments(
    train, monkeypatch, flags: list[str], frozen: tuple[str, ...]
) -> None:
    assert train("whole", *flags) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6, Journal, "step")
        assert train("parts", *flags) == 130
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")
    saved = bundle.read(Path("checkpoints/whole"))
    model = GPT(ModelConfig(**bundle.read_info(Path("checkpoints/whole"))["config"]), seed=1337)
    begin = model.state_dict()
    moved = {k for k, v in saved.state_dict.items() if not torch.equal(v, begin[k])}
    assert moved == {k for k in begin if not k.startswith(frozen)}
    trained = {k for k, _ in model.named_parameters() if not k.startswith(frozen)}
    assert len(saved.optimizer["state"]) == len(trained)
    shapes = sorted(tuple(s["exp_avg"].shape) for s in saved.optimizer["state"].values())
    assert shapes == sorted(tuple(dict(model.named_parameters())[k].shape) for k in trained)


def test_freezing_applies_to_a_run_that_starts_from_a_model(train) -> None:
    assert train("base") == 0
    assert start("new", "--init_from_model", "base", "--freeze_layers", "1") == 0
    old, new = weights("base"), weights("new")
    moved = {k for k in old if not torch.equal(old[k], new[k])}
    assert moved
    assert not any(k.startswith("blocks.0.") for k in moved)


def test_more_frozen_layers_than_there_are_is_one_line(train, capsys) -> None:
    assert train("a", "--freeze_layers", "3") == 2
    assert "freeze_layers is larger than n_layer" in error_line(capsys)


def test_noise_is_for_training_alone_and_resumes_exactly(train, monkeypatch) -> None:
    flags = ["--neftune_alpha", "5", "--dropout", "0"]
    assert train("whole", *flags) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4 * 6 + 3, TokenLoader, "next")
        assert train("parts", *flags) == 130
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")
    assert train("plain", "--dropout", "0") == 0
    first = [events(n, "train")[0]["loss"] for n in ("whole", "plain")]
    assert first[0] != first[1]
    assert events("whole", "eval")[0]["val_loss"] == events("plain", "eval")[0]["val_loss"]


def test_the_noise_has_the_size_of_its_paper() -> None:
    """U(-m, m) with m = alpha / sqrt(T C), drawn from torch's seeded generator."""
    cfg = ModelConfig(
        vocab_size=31, block_size=12, n_embd=16, n_head=2, n_layer=1, neftune_alpha=5.0, dropout=0.0
    )
    model, seen = GPT(cfg, 1).train(), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    idx = torch.randint(31, (64, 12), generator=torch.Generator().manual_seed(1))
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.hidden(idx)
    model.eval()
    model.hidden(idx)
    noise, again, other = (x - seen[3] for x in seen[:3])
    bound = 5 / (12 * 16) ** 0.5
    assert bound * 0.99 < float(noise.abs().max()) <= bound * 1.001
    assert float(noise.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert torch.equal(noise, again)
    assert not torch.equal(noise, other)


# phases


def phases(*parts: tuple[str, int | None]) -> list[str]:
    """Flags of a run through these datasets."""
    listed = [
        {"name": Path(folder).name, "dataset_dir": folder, "until_iter": end}
        for folder, end in parts
    ]
    Path("c.json").write_text(json.dumps({**SHAPE, "curriculum": {"phases": listed}}))
    return ["--config", "c.json", *SMALL]


# steps 0-3, 4-8, 9-11; four micro-steps each: death before, in and after both switches
@pytest.mark.parametrize("call", [
    4 * 4, 4 * 9 + 1,
    *(pytest.param(n, marks=SLOW) for n in (4 * 4 - 1, 4 * 4 + 1, 4 * 4 + 4, 4 * 9)),
])  # fmt: skip
def test_every_phase_goes_on_where_it_was(dataset, monkeypatch, call: int) -> None:
    write_dataset(Path("data/b"), seed=3)
    flags = phases(("data/toy", 4), ("data/b", 9), ("data/toy", None))
    assert main(["train", "--model_name", "whole", *flags]) == 0
    for event in ("interrupt", "kill"):
        with monkeypatch.context() as patched:
            if event == "interrupt":
                interrupt_at(patched, call, TokenLoader, "next")
                assert main(["train", "--model_name", event, *flags]) == 130
            else:
                kill_at(patched, call)
                with pytest.raises(Killed):
                    main(["train", "--model_name", event, *flags, "--save_interval", "4"])
        assert main(["train", "--model_name", event]) == 0
        assert_same_run("whole", event)
        assert [(e["iter"], e["new_phase"]) for e in events(event, "phase_switch")] == [
            (4, "b"), (9, "toy"),
        ]  # fmt: skip
    data = bundle.read_info(Path("checkpoints/whole"))["manifest"]["data"]
    assert [d["state"]["global_sample"] for d in data] == [4 * 8, 5 * 8, 3 * 8]
    assert [e["phase"] for e in events("whole", "eval")] == ["toy", "b", "toy"]


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    original, count = TokenLoader.next, [0]

    def counted(self: TokenLoader, *args: object) -> object:
        count[0] += 1
        if count[0] == call:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(TokenLoader, "next", counted)


def test_a_switch_at_an_evaluation_belongs_to_the_phase_before(dataset) -> None:
    write_dataset(Path("data/b"), seed=3)
    flags = phases(("data/toy", 5), ("data/b", None))
    assert main(["train", "--model_name", "a", *flags]) == 0
    kinds = [(e["event"], e.get("phase")) for e in events("a") if e.get("iter") == 5]
    order = [k for k in kinds if k[0] in ("eval", "phase_switch", "train")]
    assert order == [("eval", "toy"), ("phase_switch", None), ("train", None)]


@pytest.mark.parametrize(("parts", "words"), [
    ((("data/toy", None), ("data/toy", 5)), "only the last phase may be open-ended"),
    ((("data/toy", 5), ("data/toy", 5)), "must grow from phase to phase"),
    ((("data/toy", 5), ("data/toy", 4)), "must grow from phase to phase"),
    ((("data/toy", 0), ("data/toy", None)), "until_iter is out of range"),
    ((("data/toy", 5), ("data/gone", None)), "no dataset data/gone"),
    ((("data/toy", 5), ("", None)), "dataset_dir is missing"),
    ((("data/toy", "5"), ("data/toy", None)), "expected a whole number"),
])  # fmt: skip
def test_phases_that_cannot_be_are_one_line(dataset, capsys, parts, words) -> None:
    assert main(["train", "--model_name", "a", *phases(*parts)]) == 2
    assert words in error_line(capsys)
    assert not Path("checkpoints").exists()


def test_a_curriculum_without_phases_is_one_line(dataset, capsys) -> None:
    assert main(["train", "--model_name", "a", *phases()]) == 2
    assert "curriculum.phases is empty" in error_line(capsys)


@pytest.mark.parametrize("key", ["save_every", "save_interval"])
def test_both_names_of_the_save_interval_save(dataset, key: str) -> None:
    Path("c.json").write_text(json.dumps({**SHAPE, key: 3}))
    assert (
        main(
            [
                "train",
                "--model_name",
                "a",
                "--config",
                "c.json",
                "--dataset_dir",
                "data/toy",
                *SMALL,
            ]
        )
        == 0
    )
    assert state("a")["training_config"]["save_interval"] == 3


def test_a_run_without_a_manifest_keeps_its_gold(train, capsys) -> None:
    """As MyPT leaves it: the first evaluation after a resume replaced gold there (Q-4)."""
    assert train("a") == 0
    best = state("a_gold")["step"]
    Path("checkpoints/a/manifest.json").unlink()
    flags = ["--max_iters", "16", "--learning_rate", "5"]
    assert main(["train", "--model_name", "a", *flags]) == 0
    assert state("a_gold")["step"] == best
    assert "GOLD" not in capsys.readouterr().out.split("step 15/")[-1].split("Best")[0]


def test_the_flag_replaces_a_set_called_general(dataset) -> None:
    write_dataset(Path("data/one"), seed=3)
    write_dataset(Path("data/two"), seed=4)
    sets = {"general": "data/one", "two": "data/two"}
    Path("c.json").write_text(json.dumps({**SHAPE, "eval_sets": sets}))
    flags = [
        "--config",
        "c.json",
        *SMALL,
        "--dataset_dir",
        "data/toy",
        "--eval_dataset_dir",
        "data/two",
    ]
    assert main(["train", "--model_name", "a", *flags]) == 0
    for e in events("a", "eval"):
        assert e["eval_general"] == e["eval_two"]
