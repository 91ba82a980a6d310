"""tests/kernels/test_activation.py on a GPU."""

from tests.kernels.test_activation import *  # noqa: F403
