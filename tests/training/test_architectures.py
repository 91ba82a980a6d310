"""Which GPUs a build of torch has code for, and what a user of another one is told."""

import pytest
import torch

from mypt_fast.errors import DeviceError
from mypt_fast.training import device

OLDER = "install an older torch, or one built for an older CUDA"
NEWER = "install a newer torch, or one built for a newer CUDA"
OTHER = "install a torch that was built for it"


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes the only GPU one of this compute capability, for this build."""

    def made(capability: tuple[int, int], built: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A Card")
        monkeypatch.setattr(torch.cuda, "get_arch_list", built.split)

    return made


@pytest.mark.parametrize(("capability", "built"), [
    ((12, 0), "sm_75 sm_80 sm_90 sm_100 sm_120"),
    ((12, 0), "sm_75 sm_80 sm_90 sm_100 sm_120f"),
    ((12, 1), "sm_75 sm_120f"),  # code of a family runs on all of it
    ((9, 0), "sm_80 sm_90a"),
    ((8, 6), "sm_50 sm_80 sm_90"),  # of the same generation, and not newer
    ((12, 0), "sm_80 compute_90"),  # PTX, which the driver compiles for newer cards
    ((9, 0), "compute_90"),
    ((9, 0), "compute_90a"),
    ((12, 1), "sm_90 compute_120f"),
    ((7, 0), ""),  # unknown: torch will tell
    ((7, 0), "gfx90a"),
])  # fmt: skip
def test_a_card_that_the_build_has_code_for_is_taken(gpu, capability, built) -> None:
    gpu(capability, built)
    assert device.pick(None, explicit=False) == (torch.device("cuda", 0), None)


@pytest.mark.parametrize(("capability", "built", "found", "cure"), [
    ((12, 0), "sm_50 sm_60 sm_75 sm_80 sm_86 sm_90", "5.0, 6.0, 7.5, 8.0, 8.6, 9.0", NEWER),
    ((7, 0), "sm_80 sm_75 sm_120", "7.5, 8.0, 12.0", OLDER),
    ((7, 0), "sm_75 sm_120f compute_120", "7.5, 12.0", OLDER),
    ((8, 6), "sm_90", "9.0", OLDER),
    ((9, 0), "sm_86 sm_120", "8.6, 12.0", OTHER),
    ((8, 0), "sm_75 sm_86", "7.5, 8.6", OTHER),
    # PTX of one family is for no newer one
    ((12, 0), "sm_90 compute_90a", "9.0", NEWER),
    ((12, 0), "compute_100f", "10.0", NEWER),
])  # fmt: skip
def test_a_card_without_code_is_refused_with_the_cure(gpu, capability, built, found, cure) -> None:
    gpu(capability, built)
    with pytest.raises(DeviceError) as caught:
        device.pick(None, explicit=False)
    asked = f"no code for A Card, compute capability {capability[0]}.{capability[1]}"
    assert caught.value.what.endswith(asked)
    assert caught.value.found == f"found code for {found}"
    assert caught.value.cure == f"{cure}, or pass --device cpu"
