"""Fine-tuning on episodes: the loss, what sees what, and runs that are resumed bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LETTERS, SMALL, events, write_dataset
from test_resume import assert_same_run, interrupt_at, position

from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.data.episode_loader import EpisodeLoader
from mypt_fast.data.format import open_split
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.mypt_order import MyptShardOrder
from mypt_fast.model import GPT
from mypt_fast.training.feed import model_inputs, step_weight, to_device
from tests.data.shard_files import write_episodes

CPU = torch.device("cpu")
V, T = len(LETTERS), 12


def episodes(folder, n=60, seed=0, packed=False, masked=True, splits=("train", "val")):
    """Episodes of 2 to 15 letters, or packed rows of three."""
    rng = np.random.default_rng(seed)
    for split in splits:
        lengths = [13] * n if packed else rng.integers(2, 16, size=n).tolist()
        total = sum(lengths)
        beside = {"mask": rng.integers(0, 2, total), "weights": rng.integers(0, 4, total) / 2}
        if packed:
            beside["segments"] = np.tile([1] * 4 + [2] * 5 + [3] * 2 + [0] * 2, n)
            beside["weights"] = beside["weights"] * (beside["segments"] > 0)
        starts = np.cumsum(lengths) - lengths
        write_episodes(
            folder / split, np.cumsum(rng.integers(1, 4, total)) % V,
            np.stack([starts, lengths], axis=1), **(beside if masked else {}),
        )  # fmt: skip
    state = {"token_kind": "char", "chars": list(LETTERS)}
    (folder / "tokenizer_state.json").write_text(json.dumps(state))
    return folder


def model_of(**more):
    more = {"vocab_size": V, "block_size": T, "n_embd": 16, "n_head": 2, "n_layer": 2, **more}
    return GPT(ModelConfig(dropout=0.0, **more), 1).double().eval()


ROPE = {"pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm", "tie_weights": True}


def batch_of(folder, rows=8, **more):
    loader = EpisodeLoader(
        open_split(folder, "train"), "here", T, seed=3, global_batch=rows, **more
    )
    return loader, loader.read(0, rows)


def test_the_fused_loss_is_the_weighted_mean_of_plain_cross_entropies(tmp_path):
    """Specification 2.4: sum(ce * mask) / max(sum(mask), 1), with fractional masks."""
    loader, batch = batch_of(episodes(tmp_path), use_loss_mask=True)
    model = model_of()
    fused = model(**model_inputs(batch, to_device(CPU))) / step_weight(loader, 8 * T)
    fused.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
    mask = torch.from_numpy(batch.documents.loss_mask).double().flatten()
    assert {0.0, 0.5, 1.0, 1.5} == set(mask.tolist())
    ce = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
    plain = (ce * mask).sum() / mask.sum().clamp(min=1)
    plain.backward()
    assert fused.item() == pytest.approx(plain.item(), abs=1e-6)
    for ours, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("arch", [{}, ROPE, {**ROPE, "segment_position_reset": False}])
def test_packed_segments_are_as_if_each_ran_alone(tmp_path, arch):
    """Without a reset of positions too, where they are rotations: only differences count."""
    _, batch = batch_of(episodes(tmp_path, packed=True), rows=3, use_loss_mask=True)
    model = model_of(**arch).float()  # rotations are of fp32 alone
    inputs = model_inputs(batch, to_device(CPU))
    packed = model(inputs["idx"], documents=inputs["documents"])
    for row in range(3):
        for number, begin, end in ((1, 0, 4), (2, 4, 9), (3, 9, 11)):
            assert (batch.documents.segment_ids[row, begin:end] == number).all()
            alone = model(inputs["idx"][row : row + 1, begin:end])
            torch.testing.assert_close(packed[row, begin:end], alone[0], atol=1e-6, rtol=1e-5)


def test_learned_positions_run_on_where_they_are_not_reset(tmp_path):
    _, batch = batch_of(episodes(tmp_path, packed=True), rows=1)
    inputs = model_inputs(batch, to_device(CPU))
    on, off = (model_of(segment_position_reset=reset) for reset in (True, False))
    a, b = (m(inputs["idx"], documents=inputs["documents"]) for m in (on, off))
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert (a[:, 4:9] - b[:, 4:9]).abs().max() > 1e-3
    shifted = off.position_embedding_table.weight.data.roll(-4, 0)
    on.position_embedding_table.weight.data.copy_(shifted)
    c = on(inputs["idx"], documents=inputs["documents"])
    torch.testing.assert_close(b[:, 4:9], c[:, 4:9])


def test_padding_at_the_end_of_a_row_changes_nothing_that_counts(tmp_path):
    _, batch = batch_of(episodes(tmp_path), rows=8, use_loss_mask=True)
    _, other = batch_of(tmp_path, rows=8, use_loss_mask=True, pad_id=7)
    assert not np.array_equal(batch.x, other.x)
    model, put = model_of(), to_device(CPU)
    losses = [model(**model_inputs(b, put)).item() for b in (batch, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(name, *flags):
    folder = ["--dataset_dir", "data/sft"] if Path("data/sft").is_dir() else []
    return main(["train", "--model_name", name, *SMALL, *folder, *flags])


@pytest.mark.parametrize(("packed", "mode", "method", "call"), [
    (False, "epoch", "next", 4 * 3 + 2),  # inside a step
    (True, "epoch", "next", 4 * 11 + 3),  # inside the last step
    pytest.param(True, "random", "next", 4 * 6 + 1, marks=pytest.mark.slow),
    pytest.param(False, "random", "read", 3, marks=pytest.mark.slow),
])  # fmt: skip
def test_an_episode_run_is_resumed_bit_for_bit(here, monkeypatch, packed, mode, method, call):
    episodes(Path("data/sft"), n=20, packed=packed)
    flags = ["--use_loss_mask", "--batch_sampling_mode", mode, "--epoch_seed", "9"]
    assert fit("whole", *flags) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, call, EpisodeLoader, method)
        assert fit("parts", *flags) == 130
    assert main(["train", "--model_name", "parts"]) == 0
    assert_same_run("whole", "parts")
    assert position("parts") == 12 * 8


def test_training_reads_the_episodes_in_mypts_order(here, monkeypatch):
    episodes(Path("data/sft"), n=30)
    seen = []
    original = EpisodeLoader.next

    def spy(self, rows):
        batch = original(self, rows)
        seen.extend(batch.x.tolist())
        return batch

    monkeypatch.setattr(EpisodeLoader, "next", spy)
    assert fit("a", "--epoch_seed", "21", "--episode_min_tokens", "4") == 0
    data = np.fromfile("data/sft/train/tokens.bin", "<u4").tolist()
    spans = np.fromfile("data/sft/train/episodes.idx", "<u8").reshape(-1, 2)
    valid = [(int(a), int(n)) for a, n in spans if n >= 4]
    assert len(valid) < 30
    order = []
    for epoch in range(5):
        order += np.random.RandomState(21 + epoch).permutation(len(valid)).tolist()
    for x, number in zip(seen, order, strict=False):
        start, length = valid[number]
        row = data[start : start + length][-(T + 1) :]
        assert x == (row + [0] * (T + 1 - len(row)))[:-1]
    assert len(seen) == 12 * 8


def test_what_does_not_count_is_not_learned(here):
    folder = episodes(Path("data/sft"))
    for split in ("train", "val"):
        (folder / split / "mask_weighted.bin").unlink()
        tokens = np.fromfile(folder / split / "tokens.bin", "<u4")
        (tokens < 8).astype("u1").tofile(folder / split / "mask.bin")
    from mypt_fast.checkpoint import bundle

    assert fit("masked", "--use_loss_mask") == 0
    assert fit("all") == 0
    bias = [
        bundle.read(Path("checkpoints") / n).state_dict["lm_head.bias"] for n in ("masked", "all")
    ]
    assert (bias[0][8:] < 0).all()
    assert (bias[1][8:] > 0).any()


def test_what_a_user_is_told(here, capsys):
    episodes(Path("data/sft"), masked=False, splits=("train",))
    assert fit("a", "--use_loss_mask", "--max_iters", "1") == 0
    err = capsys.readouterr().err
    assert "use_loss_mask is off: train split of data/sft stores no masks" in err
    assert "has no val split: validating on its train split" in err
    assert "longer than 13 tokens: their last ones are read" in err
    assert fit("b", "--pad_token_id", "16") == 2
    assert "pad_token_id 16; vocab_size is 16" in capsys.readouterr().err
    assert fit("c", "--episode_min_tokens", "16") == 2
    assert "lower episode_min_tokens" in capsys.readouterr().err


def test_mismatched_masks_name_the_file_and_the_counts(here, capsys):
    folder = episodes(Path("data/sft"))
    (folder / "train/mask.bin").write_bytes(b"\1" * 5)
    n = len(np.fromfile(folder / "train/tokens.bin", "<u4"))
    assert fit("a", "--use_loss_mask") == 3
    err = capsys.readouterr().err
    assert f"data/sft/train/mask.bin; 5 bytes, where {n} tokens" in err
    assert "Traceback" not in err


def test_episodes_can_still_be_read_as_one_stream(here):
    episodes(Path("data/sft"))
    losses = []
    for name, flags in (("rows", []), ("stream", ["--documents", "concat"])):
        assert fit(name, *flags, "--max_iters", "3") == 0
        losses.append([e["loss"] for e in events(name, "train")])
    assert losses[0] != losses[1]


def test_every_field_of_the_sft_configs_is_accepted(here):
    """The keys of specification 3.4's SFT table, on a model that a test can train."""
    episodes(Path("data/sft"), packed=True)
    episodes(Path("data/eval"), seed=5)
    config = {
        "name": "sft", "description": "x", "batch_size": 3, "block_size": T, "vocab_size": V,
        "n_embd": 16, "n_head": 2, "n_layer": 2, "dropout": 0.08, "bias": False,
        "use_checkpoint": True, "tie_weights": True, "pos_encoding": "rope", "mlp_type": "swiglu",
        "norm_type": "rmsnorm", "rope_theta": 10000.0, "rope_scale": 4.0, "use_loss_mask": True,
        "segment_position_reset": True, "neftune_alpha": 5.0, "batch_sampling_mode": "epoch",
        "pad_token_id": None, "episode_min_tokens": 10, "epoch_seed": 2808, "epoch_shuffle": True,
        "epoch_drop_last": True, "learning_rate": 8e-6, "max_iters": 4, "eval_interval": 2,
        "eval_iters": 2, "warmup_iters": 1, "grad_clip": 1.0, "weight_decay": 0.05,
        "use_amp": True, "amp_dtype": "bf16", "grad_accum_steps": 4, "eval_seed": 1337,
        "eval_sets": {"format": "data/eval", "operators": "data/sft"},
        "gold_selection": {"strategy": "val_loss", "guards": {"overfit_ratio": 6.0}},
        "token_accuracy_saturation": {"enabled": True, "window": 2, "min_steps_before_check": 1},
        "freeze_layers": 1,
    }  # fmt: skip
    Path("sft.json").write_text(json.dumps(config))
    argv = ["train", "--config", "sft.json", "--dataset_dir", "data/sft", "--model_name", "a"]
    assert main([*argv, "--no_use_amp"]) == 0
    last = events("a", "eval")[-1]
    assert np.isfinite([last["val_loss"], last["eval_format"], last["eval_operators"]]).all()
    assert last["train_masked_token_count"] > 0


def test_order_mypt_trains_on_mypts_batches_and_resumes(here, monkeypatch):
    write_dataset(Path("data/toy"))
    tokens = np.fromfile("data/toy/train/shard_00000.bin", "<u4")
    tokens[:700].tofile("data/toy/train/shard_00001.bin")
    seen = []
    original = TokenLoader.next

    def spy(self, rows):
        batch = original(self, rows)
        seen.extend(batch[0].tolist())
        return batch

    flags = ["--dataset_dir", "data/toy", "--order", "mypt", "--seed", "77"]
    with monkeypatch.context() as patched:
        patched.setattr(TokenLoader, "next", spy)
        assert fit("whole", *flags) == 0
    corpus = np.concatenate([tokens, tokens[:700]])
    order = MyptShardOrder([len(tokens), 700], T, 4, 77)  # batch_size 4, two of them a step
    starts = np.concatenate([order.next_starts() for _ in range(24)])
    assert seen == [corpus[s : s + T].tolist() for s in starts]
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4 * 7 + 2, TokenLoader, "next")
        assert fit("parts", *flags) == 130
    assert main(["train", "--model_name", "parts"]) == 0
    assert_same_run("whole", "parts")


def test_order_mypt_gives_the_losses_of_a_plain_loop(here):
    """Global NumPy generator, logits, cross_entropy, AdamW: nothing of the trainer's."""
    write_dataset(Path("data/toy"), n_train=2000)
    steps, flags = 60, ["--dropout", "0", "--max_iters", "60", "--eval_interval", "60"]
    source = ["--dataset_dir", "data/toy", "--order", "mypt", "--seed", "77"]
    assert fit("ours", *source, *flags) == 0
    tokens = np.fromfile("data/toy/train/shard_00000.bin", "<u4").astype(np.int64)
    model = GPT(ModelConfig(vocab_size=V, block_size=T, n_embd=16, n_head=2, n_layer=2), 77).eval()
    decayed = {n: p.dim() > 1 and "embedding" not in n for n, p in model.named_parameters()}
    groups = [
        {"params": [p for n, p in model.named_parameters() if decayed[n] is on], "weight_decay": wd}
        for on, wd in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    before, losses = np.random.get_state(), []
    np.random.seed(77)
    for step in range(steps):
        p = min((step - 2) / (steps - 2), 1)
        lr = 1e-2 * (step + 1) / 2 if step < 2 else 1e-3 + 0.5 * 9e-3 * (1 + np.cos(np.pi * p))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        total = 0.0
        for _ in range(2):
            np.random.randint(0, 1)
            np.random.randint(0, 1)
            starts = np.random.randint(0, len(tokens) - T - 1, size=4)
            x = torch.from_numpy(np.stack([tokens[s : s + T] for s in starts]))
            y = torch.from_numpy(np.stack([tokens[s + 1 : s + T + 1] for s in starts]))
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    np.random.set_state(before)
    assert [e["loss"] for e in events("ours", "train")] == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.3


def test_order_mypt_is_of_one_dataset_and_a_seed_of_32_bits(here, capsys):
    write_dataset(Path("data/toy"))
    flags = ["--dataset_dir", "data/toy", "--order", "mypt", "--seed", str(1 << 32)]
    assert fit("a", *flags) == 2
    assert "a seed of 32 bits; found seed 4294967296" in capsys.readouterr().err


def test_a_prepared_conversation_trains(here, capsys):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(12)
    ]
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["prepare", "--chat", "talks.jsonl", "--pack_block_size", "40", "--out_dir", "data/sft"]
    assert main(argv) == 0
    shape = ["--n_embd", "4", "--n_head", "1", "--n_layer", "1", "--block_size", "40"]
    assert fit("talks", "--use_loss_mask", *shape, "--max_iters", "2") == 0
    found = events("talks", "eval")[-1]
    assert found["val_masked_token_count"] > 0
    assert "use_loss_mask is off" not in capsys.readouterr().err
