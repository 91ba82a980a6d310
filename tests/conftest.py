"""What every test needs."""

import os
import tempfile

import pytest

# The models here are tiny: a second thread gains nothing, and waits whenever the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# not into the user's cache folder, which the command line would choose
for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    folder = f"mypt_fast_tests_{os.getuid()}"
    os.environ.setdefault(name, os.path.join(tempfile.gettempdir(), folder, name))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes what the user's own machine keeps, its ceiling for one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
