"""tests/kernels/test_large_offsets.py on a GPU."""

from tests.kernels.test_large_offsets import *  # noqa: F403
