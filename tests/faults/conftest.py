"""How many random faults: a few hundred by default, `MYPT_FAULTS` of them in `make faults`."""

import os

import pytest


@pytest.fixture
def n_faults() -> int:
    return int(os.environ.get("MYPT_FAULTS", "400"))
