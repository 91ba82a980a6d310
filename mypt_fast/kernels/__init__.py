"""The operators of the model, each behind one name, each with four ways to run.

`impl` says which: "triton" (the kernels in `jit/`), "reference" (the formulas of `reference/`, as
an operator that torch.compile does not look into), "inductor" (the plain PyTorch expression, for
torch.compile to fuse), or "auto", for which `choose` is the one rule.
"""

from mypt_fast.kernels._joined import Join, Norm
from mypt_fast.kernels._operator import (
    IMPLS,
    choose,
    describe,
    missing_for_triton,
    missing_header,
    why_not,
)
from mypt_fast.kernels.activation import swiglu
from mypt_fast.kernels.cross_entropy import cross_entropy
from mypt_fast.kernels.linear_cross_entropy import linear_cross_entropy
from mypt_fast.kernels.mlp import gelu_mlp, swiglu_mlp
from mypt_fast.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from mypt_fast.kernels.norm_mlp import norm_mlp
from mypt_fast.kernels.norm_qkv import norm_qkv
from mypt_fast.kernels.recast import linear
from mypt_fast.kernels.rope import rope_qkv, rope_tables

__all__ = [
    "IMPLS",
    "Join",
    "Norm",
    "add_layer_norm",
    "add_rms_norm",
    "choose",
    "cross_entropy",
    "describe",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "missing_for_triton",
    "missing_header",
    "norm_mlp",
    "norm_qkv",
    "rms_norm",
    "rope_qkv",
    "rope_tables",
    "swiglu",
    "swiglu_mlp",
    "why_not",
]
