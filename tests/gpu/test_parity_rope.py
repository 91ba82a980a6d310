"""tests/kernels/test_rope.py on a GPU."""

from tests.kernels.test_rope import *  # noqa: F403
