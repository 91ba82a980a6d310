"""Bundles: what is written is what is read, by us and by others."""

import json
from pathlib import Path

import pytest
import torch

from mypt_fast.checkpoint import bundle
from mypt_fast.config import ModelConfig
from mypt_fast.errors import CheckpointError, IntegrityError

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
