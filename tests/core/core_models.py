"""Small models for the tests of `core`: the ones of specification 12.2, and random ones."""

import torch

from mypt_fast.core.config import GPTConfig
from mypt_fast.core.model import GPT
from mypt_fast.core.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 13, "block_size": 8, "n_embd": 12, "n_head": 2, "n_layer": 2, "dropout": 0.0,
    "device": "cpu",
}  # fmt: skip
LETTERS = "abcdefghijklm"
LLAMA = {"pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm"}
OPTIONS = {
    "A": {},
    "B": {"bias": True},
    "C": {**LLAMA, "tie_weights": True},
    "D": {"pos_encoding": "rope", "rope_theta": 500.0, "rope_scale": 4.0},
    "E": {"mlp_type": "swiglu", "norm_type": "rmsnorm", "segment_position_reset": False},
}
IDX = torch.tensor([[1, 5, 9, 2, 0, 12, 3, 7]])
TARGETS = torch.tensor([[5, 9, 2, 0, 12, 3, 7, 1]])
MASK = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]])
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 0, 0]])


def char_model(**options):
    """A small char model over the letters a to m, freshly drawn."""
    config = GPTConfig(**{**SIZES, **options})
    tokenizer = Tokenizer(config, "char")
    tokenizer.build_char_vocab(LETTERS)
    return GPT(config, tokenizer)


def filled(**options):
    """A model of specification 12.2, every parameter a known sine, in evaluation mode."""
    model = char_model(**options).eval()
    with torch.no_grad():
        for k, (name, p) in enumerate(model.named_parameters()):
            i = torch.arange(p.numel(), dtype=torch.float64)
            v = torch.sin(0.7 * i + 1.3 * k + 0.1)
            norm = "ln" in name and name.endswith("weight")
            p.copy_((1 + 0.1 * v if norm else 0.2 * v).float().view_as(p))
    return model
