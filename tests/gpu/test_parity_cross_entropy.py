"""tests/kernels/test_cross_entropy.py on a GPU."""

from tests.kernels.test_cross_entropy import *  # noqa: F403
