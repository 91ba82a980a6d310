"""tests/kernels/test_recomputed.py on a GPU."""

from tests.kernels.test_recomputed import *  # noqa: F403
