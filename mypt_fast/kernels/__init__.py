"""The operators of the model, each behind one name.

The one rule: tensors run on the plain PyTorch reference. A faster implementation joins here,
behind the same name, once it has been measured to win; `model.py` does not change.
"""

from mypt_fast.kernels.reference import (
    apply_rope,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rope_tables,
    swiglu,
)

__all__ = [
    "apply_rope",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope_tables",
    "swiglu",
]
