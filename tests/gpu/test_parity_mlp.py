"""tests/kernels/test_mlp.py on a GPU."""

from tests.kernels.test_mlp import *  # noqa: F403
