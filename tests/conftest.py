"""What every test needs."""

import os

# The models here are tiny: a second thread gains nothing, and waits whenever the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
