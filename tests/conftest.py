"""What every test needs."""

import os
import tempfile

# The models here are tiny: a second thread gains nothing, and waits whenever the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# not into the user's cache folder, which the command line would choose
for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    folder = f"mypt_fast_tests_{os.getuid()}"
    os.environ.setdefault(name, os.path.join(tempfile.gettempdir(), folder, name))
