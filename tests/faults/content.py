"""A small bundle whose every member says which step it is of, and how many faults to try."""

import os
from pathlib import Path

import torch

from mypt_fast.checkpoint import bundle
from mypt_fast.config import ModelConfig

N_FAULTS = int(os.environ.get("MYPT_FAULTS", "400"))  # `make faults` asks for 10,000
CONFIG = ModelConfig(n_embd=4, n_head=1, n_layer=1, vocab_size=5, device="cpu").to_dict()


def save(path: Path, step: int) -> None:
    """Publish the state of `step`; one older state is kept."""
    parameter = torch.nn.Parameter(torch.full((300,), float(step)))
    parameter.grad = torch.ones(300)
    adamw = torch.optim.AdamW([parameter])
    adamw.step()
    bundle.write(
        path,
        config=CONFIG,
        state_dict={"w": torch.full((500,), float(step))},
        training_state={"step": step, "training_config": {"max_iters": 9}},
        tokenizer={"token_kind": "gpt2"},
        optimizer=adamw.state_dict(),
        gold_state={"gold_step": 1},
        state={"step": step},
        keep_last=1,
    )


def seen(path: Path) -> int:
    """The one step that every member of the bundle is of; a mixture or a notice raises."""
    got = bundle.read(path, walk_back=False)
    steps = {got.training_state["step"], got.manifest["step"], int(got.state_dict["w"][0])}
    assert len(steps) == 1, steps
    assert got.notices == [], got.notices
    return steps.pop()
