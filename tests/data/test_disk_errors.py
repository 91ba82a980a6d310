"""A disk or a server that is away for a moment ends no run; one that stays away does, by name."""

import os
import shutil
import subprocess
import sys

import pytest

# pread of a shard fails as often as $FAILURES says, with the error number of $ERROR.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int left = -1;
static int fails(int fd) {
  char name[64], path[4096];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(name, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  if (!strstr(path, "shard_0") || !getenv("ARMED")) return 0;
  if (left < 0) left = atoi(getenv("FAILURES"));
  if (left == 0) return 0;
  --left;
  errno = atoi(getenv("ERROR"));
  return 1;
}
#define WRAP(NAME)                                                    \
  ssize_t NAME(int fd, void *out, size_t count, off_t at) {           \
    static ssize_t (*real)(int, void *, size_t, off_t);               \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #NAME);             \
    return fails(fd) ? -1 : real(fd, out, count, at);                 \
  }
WRAP(pread)
WRAP(pread64)
"""
SCRIPT = """
import os, sys
import numpy as np
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DataError
corpus = TokenCorpus.from_dataset(sys.argv[1], "train", "native", "pread")
oracle = TokenLoader(TokenCorpus.from_dataset(sys.argv[1], "train", "numpy"), 16, seed=0)
os.environ["ARMED"] = "1"
with TokenLoader(corpus, 16, seed=0, prefetch=2) as loader:
    try:
        for _ in range(20):
            assert np.array_equal(loader.next(1)[0], oracle.next(1)[0])
    except DataError as error:
        print("stopped:", error)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    if not shutil.which("gcc"):
        pytest.skip("no gcc to build the faulty disk with")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    target = folder / "shim.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", str(folder / "shim.c"), "-o", str(target), "-ldl"]
    subprocess.run(command, check=True)
    return target


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("error", "failures", "survives"), [(5, 1, True), (116, 1, True), (13, 1, False)]
)
def test_a_short_absence_is_waited_for(shim, write_dataset, tmp_path, error, failures, survives):
    folder = write_dataset(tmp_path, [3000], 2)
    env = {**os.environ, "LD_PRELOAD": str(shim), "ERROR": str(error), "FAILURES": str(failures)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    if survives:
        assert done.stdout == ""
    else:
        assert "shard_00000.bin; cannot be read at byte" in done.stdout
        assert os.strerror(error) in done.stdout
