"""How batches reach the model."""

import numpy as np
import pytest
import torch

from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.training.device import moved
from mypt_fast.training.feed import next_inputs, signed, widened


@pytest.mark.parametrize("top", [(1 << 16) - 1, (1 << 32) - 1])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_narrow_windows_become_the_batches_of_the_plain_way(top, prefetch):
    tokens = np.random.default_rng(0).integers(0, top, 5000, endpoint=True)
    tokens[::7] = top  # negative, if a sign were kept
    corpus = TokenCorpus.from_tokens(tokens)
    plain = TokenLoader(corpus, 32, seed=1, global_batch=4)
    narrow = TokenLoader(corpus, 32, seed=1, global_batch=4, prefetch=prefetch)
    for _ in range(10):
        wanted = next_inputs(plain, 4, torch.device("cpu"))
        found = widened(torch.from_numpy(signed(narrow.next_windows(4))))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor)
            assert found[name].is_contiguous()


def test_a_gpu_copies_from_page_locked_memory_and_nobody_waits():
    """Recorded on a stand-in: no GPU is asked."""
    calls = []

    class Pinned:
        def to(self, device, non_blocking=False):
            calls.append((device.type, non_blocking))
            return "there"

    class Pageable:
        device = torch.device("cpu")

        def is_pinned(self):
            return False

        def pin_memory(self):
            return Pinned()

    assert moved(Pageable(), torch.device("cuda")) == "there"
    assert calls == [("cuda", True)]
    x = torch.ones(2)
    assert moved(x, torch.device("cpu")) is x


def test_what_is_page_locked_already_is_copied_before_its_owner_writes_in_it_again() -> None:
    calls = []

    class Owned:
        device = torch.device("cpu")

        def is_pinned(self):
            return True

        def to(self, device):
            calls.append(device.type)

    moved(Owned(), torch.device("cuda"))
    assert calls == ["cuda"]
