"""tests/kernels/test_norm_dropout.py on a GPU."""

from tests.kernels.test_norm_dropout import *  # noqa: F403
