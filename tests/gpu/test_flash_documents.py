"""Attention inside documents on a GPU: the flash call against one call a document."""

import pytest
import torch

from mypt_fast import attention
from mypt_fast.attention import Segments
from mypt_fast.config import ModelConfig
from mypt_fast.model import GPT

LENGTHS = (700, 1, 130, 193, 1000, 24)  # of two rows of 1024, the last is padding


def documents(device: str) -> Segments:
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)) + 1, torch.tensor(LENGTHS))
    return Segments.from_ids(ids.view(2, 1024).to(device))


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_flash_call_gives_what_each_document_gives_alone(way, dtype, size) -> None:
    segments = documents(way.device)
    generator = torch.Generator(way.device).manual_seed(0)
    qkv = torch.randn(2, 1024, 3, 4, size, device=way.device, generator=generator).to(dtype)
    weights = torch.randn(2, 4, 1024, size, device=way.device, generator=generator)
    results = []
    for exact in (False, True):
        leaf = qkv.float().requires_grad_() if exact else qkv.clone().requires_grad_()
        q, k, v = (t.transpose(1, 2) for t in leaf.unbind(2))
        if not exact and not attention.has_flash(q, 0.0):
            pytest.skip("this GPU has no variable-length flash attention")
        y = attention.attend(q, k, v, segments, 0.0)  # fp32: one call a document
        (y * weights).sum().backward()
        results.append((y.float(), leaf.grad.float()))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_training_on_documents_compiles_whole_and_asks_the_host_for_nothing(way) -> None:
    cfg = ModelConfig(
        vocab_size=512, block_size=1024, n_embd=128, n_head=2, n_layer=2, dropout=0.0,
        pos_encoding="rope", mlp_type="swiglu", norm_type="rmsnorm",
    )  # fmt: skip
    model = GPT(cfg).to(way.device).train()
    idx = torch.randint(512, (2, 1024), device=way.device)
    mask, segments = torch.ones(2, 1024, device=way.device), documents(way.device)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(idx, idx, loss_mask=mask, documents=segments)
        loss.backward()
        return loss.detach()

    eager = step()
    if not attention.has_flash(torch.empty(1, 2, 1, 64, device=way.device).half(), 0.0):
        pytest.skip("this GPU has no variable-length flash attention")
    model.hidden = torch.compile(model.hidden, fullgraph=True)
    step()
    torch.cuda.set_sync_debug_mode("error")
    compiled = step()
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=0)
