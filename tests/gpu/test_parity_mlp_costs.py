"""tests/kernels/test_mlp_costs.py on a GPU."""

from tests.kernels.test_mlp_costs import *  # noqa: F403
