"""Training on documents: the loss of the tokens that count, resumed bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, events
from test_resume import assert_same_run, interrupt_at, position

from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.data.document_loader import DocumentLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.model import GPT
from mypt_fast.tokenizer import Tokenizer
from mypt_fast.training.evaluate import mean_loss
from mypt_fast.training.feed import model_inputs, step_weight, to_device
from mypt_fast.training.sources import DataOpener

MODES = ["mask", "bestfit"]


@pytest.fixture
def indexed(monkeypatch) -> None:
    """Give every corpus a document index: lengths that repeat, from 1 to 40."""

    def ends(self: TokenCorpus) -> np.ndarray:
        lengths = np.tile([7, 1, 40, 12, 3, 25, 5], self.n_tokens // 93)
        return np.append(np.cumsum(lengths), self.n_tokens).astype(np.uint64)

    monkeypatch.setattr(TokenCorpus, "document_ends", ends)


# 12 steps of 4 micro-steps each, evaluations at 0, 5, 10 and the end
@pytest.mark.parametrize(("documents", "method", "call"), [
    ("mask", "next", 4 * 3 + 2),  # inside a step
    ("bestfit", "next", 4 * 3 + 2),
    ("bestfit", "next", 4 * 11 + 3),  # inside the last step
    ("mask", "read", 23),  # inside the second evaluation
])  # fmt: skip
def test_interrupted_and_resumed_equals_uninterrupted(
    train, indexed, monkeypatch, documents: str, method: str, call: int
) -> None:
    assert train("whole", "--documents", documents) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, call, DocumentLoader, method)
        assert train("parts", "--documents", documents) == 130
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")
    assert position("parts") == 12 * 8


def test_documents_change_the_training_and_each_mode_is_itself(train, indexed) -> None:
    losses = {}
    for mode in ("concat", *MODES):
        assert train(mode, "--documents", mode) == 0
        losses[mode] = [e["loss"] for e in events(mode, "train")]
    assert losses["concat"] != losses["mask"] != losses["bestfit"] != losses["concat"]
    assert all(np.isfinite(x).all() for x in losses.values())


@pytest.mark.parametrize("documents", MODES)
def test_the_split_into_micro_batches_does_not_change_the_objective(
    train, indexed, documents: str
) -> None:
    flags = ["--dropout", "0", "--documents", documents, "--micro_batch_size"]
    for rows in (8, 3):
        assert train(f"m{rows}", *flags, str(rows)) == 0
    whole = [e["loss"] for e in events("m8", "train")]
    assert [e["loss"] for e in events("m3", "train")] == pytest.approx(whole, abs=2e-5)


def loader_of(documents: str, tokens: np.ndarray, **options: object) -> DocumentLoader:
    ends = np.append(np.arange(5, len(tokens), 11), len(tokens))
    return DocumentLoader(TokenCorpus.from_tokens(tokens), 12, ends, documents, seed=2, **options)


@pytest.mark.parametrize("documents", MODES)
def test_a_step_is_the_mean_over_its_valid_tokens(documents: str) -> None:
    """Also the step with the padded row: gradients of 1 x 8 and 8 x 1 rows, and by hand."""
    tokens = np.random.default_rng(0).integers(31, size=100)
    model = GPT(ModelConfig(vocab_size=31, block_size=12, n_embd=16, n_head=2, n_layer=1), 1)
    model.double().eval()
    put = to_device(torch.device("cpu"))

    def step(rows: int) -> list[torch.Tensor]:
        loader = loader_of(documents, tokens, global_batch=8)
        weight = step_weight(loader, 8 * 12)
        total = 0.0
        for _ in range(8 // rows):
            loss = model(**model_inputs(loader.next(rows), put)) / weight
            loss.backward()
            total += loss.item()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return [torch.tensor(total), *grads]

    batch = loader_of(documents, tokens).read(0, 8)
    losses = []
    for row in range(8):
        ids = batch.documents.segment_ids[row]
        for number in range(1, ids.max() + 1):
            (where,) = np.nonzero(ids == number)
            x, y, mask = (torch.from_numpy(a[row, where]) for a in (*batch[:2], batch[2].loss_mask))
            losses += F.cross_entropy(model(x[None])[0], y, reduction="none")[mask > 0].tolist()
    by_hand = sum(losses) / len(losses)
    assert len(losses) < 8 * 12
    for rows in (8, 4, 1):
        assert step(rows)[0].item() == pytest.approx(by_hand, rel=1e-6)
    for a, b in zip(step(8), step(1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("documents", MODES)
def test_an_evaluation_is_the_mean_over_valid_tokens_whatever_its_batches(documents: str) -> None:
    tokens = np.random.default_rng(0).integers(31, size=100)
    model = GPT(ModelConfig(vocab_size=31, block_size=12, n_embd=16, n_head=2, n_layer=1), 1)
    loader, cpu = loader_of(documents, tokens), torch.device("cpu")
    put = to_device(cpu)
    losses = [mean_loss(model, loader, 99, rows, cpu) for rows in (1, 3, 50)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    model.eval()
    rows = range(loader.n_windows)
    total = sum(model(**model_inputs(loader.read(i, 1), put)).item() for i in rows)
    assert losses[0] == pytest.approx(total / loader.weight(0, loader.n_windows), rel=1e-6)


def test_a_dataset_without_boundaries_is_refused(train, capsys) -> None:
    assert train("a", "--documents", "mask") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no document index" in error
    assert "--documents concat" in error


def test_a_dataset_whose_documents_end_with_a_token_is_scanned_with_one_note(
    train, capsys, monkeypatch
) -> None:
    original = DataOpener._fit_vocabulary

    def with_eot(self: DataOpener, tokenizer: Tokenizer, source: str) -> None:
        original(self, tokenizer, source)
        self.eot_id = 3

    monkeypatch.setattr(DataOpener, "_fit_vocabulary", with_eot)
    assert train("a", "--documents", "bestfit", "--max_iters", "2") == 0
    assert capsys.readouterr().err.count("no document index: documents end at token 3") == 1


def test_a_text_file_is_one_document(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("abcdefghij klmnop " * 60)
    flags = ["--input_file", "book.txt", "--tokenization", "char", "--max_iters", "3"]
    for mode in MODES:
        assert main(["train", "--model_name", mode, *SMALL, *flags, "--documents", mode]) == 0
    assert "document index" not in capsys.readouterr().err


def test_another_mode_on_resume_is_refused(train, indexed, capsys) -> None:
    assert train("a", "--documents", "mask") == 0
    assert train("a", "--max_iters", "14", "--documents", "bestfit", resume=True) == 2
    assert "documents is 'bestfit', the state has 'mask'" in capsys.readouterr().err
    assert train("a", "--max_iters", "14", "--documents", "concat", resume=True) == 2
    assert train("a", "--max_iters", "14", resume=True) == 0
    assert [e["iter"] for e in events("a", "train")] == list(range(14))


def test_an_unknown_mode_is_a_usage_error(train, capsys) -> None:
    assert train("a", "--documents", "best") == 2
    assert "bestfit" in capsys.readouterr().err
