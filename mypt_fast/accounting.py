"""Arithmetic on a config: exact parameter counts, FLOPs per token, bytes of state. No torch."""

import math
from dataclasses import dataclass

from mypt_fast.config import ModelConfig


def swiglu_hidden(n_embd: int) -> int:
    """Width of the SwiGLU hidden layer: two thirds of 4C, rounded up to a multiple of 64."""
    return math.ceil(int(8 * n_embd / 3) / 64) * 64


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a GPT by part."""

    token_embedding: int
    position_embedding: int
    attention: int
    mlp: int
    norms: int
    lm_head: int

    @property
    def total(self) -> int:
        """All trainable parameters, a tied matrix counted once."""
        parts = (self.token_embedding, self.position_embedding, self.attention)
        return sum(parts) + self.mlp + self.norms + self.lm_head


def count_parameters(cfg: ModelConfig) -> ParameterCount:
    """Count the parameters of every architecture option exactly.

    Follows the layout of the weights: norms have a bias only as LayerNorm, the GELU MLP and the
    output layer always have biases, SwiGLU never (MyPT specification 2.1, 2.7). The per-head era's
    attention output has a bias whatever `bias` says (2.6).
    """
    V, C, L = cfg.vocab_size, cfg.n_embd, cfg.n_layer
    per_norm = C if cfg.norm_type == "rmsnorm" else 2 * C
    biases = (3 * C if cfg.bias else 0) + (C if cfg.bias or cfg.per_head_era else 0)
    mlp = 3 * C * swiglu_hidden(C) if cfg.mlp_type == "swiglu" else 8 * C * C + 5 * C
    return ParameterCount(
        token_embedding=V * C,
        position_embedding=cfg.block_size * C if cfg.pos_encoding == "learned" else 0,
        attention=L * (4 * C * C + biases),
        mlp=L * mlp,
        norms=(2 * L + 1) * per_norm,
        lm_head=V + (0 if cfg.tie_weights else V * C),
    )


def flops_per_token(cfg: ModelConfig) -> float:
    """Model FLOPs to train on one token: forward and backward, nothing recomputed.

    6 per weight of every matmul (the output layer included, embedding look-ups not) plus
    6 L C T for causal attention: its two T x T products over half the square
    (PaLM appendix B, arXiv 2204.02311, halved for the causal mask).
    """
    n = count_parameters(cfg)
    matmul = n.attention + n.mlp + cfg.vocab_size * cfg.n_embd
    return 6.0 * matmul + 6.0 * cfg.n_layer * cfg.n_embd * cfg.block_size


def mfu(tokens_per_s: float, flops_per_token: float, tflops: float) -> float:
    """Model FLOPs utilisation: the share of a matmul ceiling that a training speed comes to.

    The FLOPs are the model's own, those of `flops_per_token`: what is computed again to save
    memory takes time and counts as nothing (PaLM appendix B, arXiv 2204.02311).

    Args:
        tokens_per_s: trained.
        flops_per_token: of the model.
        tflops: the ceiling, TFLOP/s in the dtype of the training.
    """
    return tokens_per_s * flops_per_token / (1e12 * tflops)


@dataclass(frozen=True)
class StateBytes:
    """Bytes that stay for the whole run."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.moments


def state_bytes(cfg: ModelConfig, state: str = "exact") -> StateBytes:
    """Bytes of weights, gradients and the two AdamW moments.

    Args:
        cfg: the architecture.
        state: the layout. `exact` and `exact16` take the same: two halves of an fp32 weight are
            as large as it. `fast` has bf16 gradients and 8-bit moments, an fp32 scale for 256 of
            them, of everything but vectors (a matrix of less than 4,096 is not told apart here).
    """
    n = count_parameters(cfg).total
    if state != "fast":
        return StateBytes(weights=4 * n, gradients=4 * n, moments=8 * n)
    v = vector_parameters(cfg)
    coded = n - v
    return StateBytes(
        weights=4 * n, gradients=2 * coded + 4 * v, moments=2 * coded + coded // 32 + 8 * v
    )


def vector_parameters(cfg: ModelConfig) -> int:
    """Parameters of norms and biases."""
    n, C, L = count_parameters(cfg), cfg.n_embd, cfg.n_layer
    mlp = 0 if cfg.mlp_type == "swiglu" else 5 * C
    return n.norms + cfg.vocab_size + n.attention - 4 * L * C * C + L * mlp
