"""tests/kernels/test_adamw.py on a GPU."""

from tests.kernels.test_adamw import *  # noqa: F403
