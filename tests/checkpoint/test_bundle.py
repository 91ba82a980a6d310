"""Bundles: what is written is what is read, by us and by others."""

import json
import os
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_128_hexdigest

from mypt_fast.checkpoint import bundle
from mypt_fast.checkpoint.manifest import content_hash
from mypt_fast.config import ModelConfig
from mypt_fast.errors import CheckpointError, ConfigError, IntegrityError

CONFIG = ModelConfig(n_embd=4, n_head=1, n_layer=1, vocab_size=5, device="cpu").to_dict()


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"a.weight": torch.randn(5, 4, generator=g), "a.bias": torch.randn(5, generator=g)}


def optimizer() -> dict:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    adamw = torch.optim.AdamW([p])
    adamw.step()
    return adamw.state_dict()


def put(path: Path, **options: object) -> None:
    state = {"step": 7, "training_config": {"max_iters": 9}}
    bundle.write(path, config=CONFIG, state_dict=weights(), training_state=state, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "fp16"])
def test_weights_and_moments_come_back_exactly_in_any_dtype(tmp_path: Path, dtype: str) -> None:
    put(tmp_path / "m", optimizer=optimizer(), save_dtype=dtype, tokenizer={"token_kind": "gpt2"})
    got = bundle.read(tmp_path / "m")
    assert got.notices == []
    assert got.tokenizer == {"token_kind": "gpt2"}
    assert got.training_state["step"] == 7
    for key, value in weights().items():
        assert torch.equal(got.state_dict[key], value)
    assert torch.equal(got.optimizer["state"][0]["exp_avg"], optimizer()["state"][0]["exp_avg"])
    stored = torch.load(tmp_path / "m/model.pt", weights_only=True)["state_dict"]["a.weight"]
    assert stored.dtype is bundle.DTYPES[dtype or "fp32"]


def test_a_bundle_to_deploy_holds_the_rounded_weights(tmp_path: Path) -> None:
    put(tmp_path / "m", save_dtype="fp16")
    got = bundle.read(tmp_path / "m", optimizer=False)
    assert torch.equal(got.state_dict["a.bias"], weights()["a.bias"].half().float())
    assert got.notices == []


def test_a_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    big = torch.randn(400, 100)
    for dtype in ("fp32", "bf16"):
        tied = {"in": big, "out": big}
        path = tmp_path / dtype
        bundle.write(path, config=CONFIG, state_dict=tied, training_state={}, save_dtype=dtype)
        one_matrix = 400 * 100 * (4 if dtype == "fp32" else 2)
        assert (path / "model.pt").stat().st_size < 1.2 * one_matrix


def test_raw_state_dicts_of_older_bundles_are_read(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(CONFIG))
    torch.save(weights(), tmp_path / "m/model.pt")
    got = bundle.read(tmp_path / "m")
    assert torch.equal(got.state_dict["a.bias"], weights()["a.bias"])
    assert got.optimizer is None
    assert "cannot be verified" in got.notices[0]


def test_an_edited_json_member_is_used_and_named(tmp_path: Path) -> None:
    put(tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(path.read_text().replace('"dropout": 0.2', '"dropout": 0.1'))
    got = bundle.read(tmp_path / "m")
    assert got.config["dropout"] == 0.1
    assert got.notices == [
        "m: config.json was edited since it was saved (dropout 0.2 -> 0.1); using the edit"
    ]
    assert got.manifest is not None


def test_a_bundle_another_program_rewrote_loads_without_our_manifest(tmp_path: Path) -> None:
    put(tmp_path / "m", optimizer=optimizer())
    other = {k: v + 1 for k, v in weights().items()}
    torch.save({"state_dict": other}, tmp_path / "m/model.pt")
    (tmp_path / "m/training_state.json").write_text('{"step": 99}')
    for name in ("model.pt", "training_state.json"):
        os.utime(tmp_path / "m" / name, (4e9, 4e9))
    got = bundle.read(tmp_path / "m")
    assert got.manifest is None
    assert torch.equal(got.state_dict["a.bias"], other["a.bias"])
    assert "rewritten by another program" in got.notices[0]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(n, d) for n in ("model.pt", "optimizer.pt") for d in ("flip", "truncate", "empty")]
    + [("model.pt", "remove")],
)
def test_damaged_tensor_files_are_found_before_use(tmp_path: Path, name: str, damage: str) -> None:
    put(tmp_path / "m", optimizer=optimizer())
    path = tmp_path / "m" / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"flip": data, "truncate": data[:-1], "empty": b""}[damage])
    with pytest.raises((IntegrityError, CheckpointError), match=name.replace(".", r"\.")):
        bundle.read(tmp_path / "m")


def test_without_a_manifest_unreadable_weights_are_one_line(tmp_path: Path) -> None:
    put(tmp_path / "m")
    (tmp_path / "m/manifest.json").unlink()
    for content in (b"", b"junk", b"PK\x03\x04junk"):
        (tmp_path / "m/model.pt").write_bytes(content)
        with pytest.raises(IntegrityError) as e:
            bundle.read(tmp_path / "m")
        assert "\n" not in str(e.value)


def test_a_manifest_of_the_future_asks_for_an_update(tmp_path: Path) -> None:
    put(tmp_path / "m")
    path = tmp_path / "m/manifest.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 3'))
    with pytest.raises(IntegrityError, match="update mypt_fast"):
        bundle.read(tmp_path / "m")


def test_a_missing_run_says_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="check --model_name"):
        bundle.read(tmp_path / "none")


def test_what_only_looks_rewritten_is_damage(tmp_path: Path) -> None:
    """Two changed members are another program's work only if they are newer and whole."""
    put(tmp_path / "m", optimizer=optimizer())
    data = bytearray((tmp_path / "m/model.pt").read_bytes())
    data[data.index(weights()["a.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "m/model.pt").write_bytes(data)
    (tmp_path / "m/training_state.json").write_text('{"step": 99}')
    for when in (1e9, 4e9):  # older than the manifest; then newer, and not whole
        for name in ("model.pt", "training_state.json"):
            os.utime(tmp_path / "m" / name, (when, when))
        with pytest.raises(IntegrityError, match=r"model\.pt is not the file"):
            bundle.read(tmp_path / "m")


def test_an_edit_of_the_architecture_is_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path / "m", keep_last=1)
    put(tmp_path / "m", keep_last=1)
    path = tmp_path / "m/config.json"
    path.write_text(path.read_text().replace('"n_layer": 1', '"n_layer": 2'))
    with pytest.raises(IntegrityError, match=r"n_layer cannot be edited; it was 1 .* and is 2"):
        bundle.read(tmp_path / "m")


def test_an_edit_that_is_no_setting_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(path.read_text().replace('"dropout": 0.2', '"dropout": 7.5'))
    with pytest.raises(ConfigError, match="dropout is out of range"):
        bundle.read(tmp_path / "m")


def test_training_settings_may_be_edited_and_the_step_may_not(tmp_path: Path) -> None:
    put(tmp_path / "m")
    path = tmp_path / "m/training_state.json"
    good = path.read_text()
    path.write_text(good.replace('"max_iters": 9', '"max_iters": 90'))
    got = bundle.read(tmp_path / "m")
    assert got.training_state["training_config"]["max_iters"] == 90
    assert len(got.notices) == 1
    assert "training_state.json was edited" in got.notices[0]
    path.write_text(good.replace('"step": 7', '"step": 8'))
    with pytest.raises(IntegrityError, match="step cannot be edited; it was 7"):
        bundle.read(tmp_path / "m")


def test_another_layout_of_the_same_json_is_no_edit(tmp_path: Path) -> None:
    put(tmp_path / "m", tokenizer={"token_kind": "char", "chars": ["a", "é"]})
    for name in ("config.json", "tokenizer.json", "training_state.json", "manifest.json"):
        path = tmp_path / "m" / name
        path.write_text(json.dumps(json.loads(path.read_text())))
    assert bundle.read(tmp_path / "m").notices == []


def test_a_changed_vocabulary_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "m", tokenizer={"token_kind": "char", "chars": ["a", "b"]})
    path = tmp_path / "m/tokenizer.json"
    path.write_text(path.read_text().replace('"b"', '"c"'))
    with pytest.raises(IntegrityError, match=r"tokenizer\.json was changed"):
        bundle.read(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimizer.pt", "optimizer.pt is not there any more"),
        ("training_state.json", "using the manifest's copy"),
        ("gold_selection_state.json", "nothing depends on it"),
        ("manifest.json", "cannot be verified"),
    ],
)
def test_a_removed_member_is_one_notice(tmp_path: Path, name: str, said: str) -> None:
    put(tmp_path / "m", optimizer=optimizer(), gold_state={"gold_step": 1})
    (tmp_path / "m" / name).unlink()
    got = bundle.read(tmp_path / "m")
    assert [said in notice for notice in got.notices] == [True]
    assert got.training_state["step"] == 7
    assert torch.equal(got.state_dict["a.bias"], weights()["a.bias"])


def test_a_bundle_of_weights_and_config_alone_starts_at_step_0(tmp_path: Path) -> None:
    put(tmp_path / "m")
    for name in ("manifest.json", "training_state.json"):
        (tmp_path / "m" / name).unlink()
    got = bundle.read(tmp_path / "m")
    assert "no training_state.json; its steps count from 0" in got.notices[1]


def test_the_manifest_says_what_it_followed_and_what_it_holds(tmp_path: Path) -> None:
    put(tmp_path / "m", state={"step": 7, "rng": {"cpu": "AA=="}}, optimizer=optimizer())
    first = bundle.read_info(tmp_path / "m")["manifest"]
    put(tmp_path / "m", state={"step": 8, "rng": {"cpu": "AA=="}}, optimizer=optimizer())
    second = bundle.read_info(tmp_path / "m")["manifest"]
    assert first["parent"] is None
    assert second["parent"] == {"step": 7, "manifest": content_hash(first)}
    assert second["config_hash"] == content_hash(CONFIG)
    assert second["rng_hash"] == content_hash({"cpu": "AA=="})
    entry = second["tensors"]["model.pt"]["a.weight"]
    raw = weights()["a.weight"].numpy().tobytes()
    assert entry == {"dtype": "float32", "shape": [5, 4], "xxh3_128": xxh3_128_hexdigest(raw)}
    assert "state.0.exp_avg_sq" in second["tensors"]["optimizer.pt"]
