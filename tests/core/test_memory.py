import platform

import pytest
import torch
from torch import nn

from star_core.memory import SMALL_SLICES, DevicePlacement, keep_freed_memory, next_smaller
from star_core.models.slicing import Slicing
from star_core.windows.tiling import Tile


def test_a_module_goes_home_even_if_the_work_fails():
    module = nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), DevicePlacement("meta") as placement:
        placement.load(module)
        assert module.weight.is_meta
        module.to_empty(device="cpu")  # nothing comes back from meta
        raise KeyboardInterrupt
    assert module.weight.device.type == "cpu"


class Module(nn.Module):
    """Says where it is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.place = "home"

    def to(self, device):
        self.place = device if device == "there" else "home"


@pytest.mark.parametrize("one_at_a_time", [True, False])
def test_a_device_holds_one_module_at_a_time_or_all(one_at_a_time):
    first, second = Module(), Module()
    with DevicePlacement("there", one_at_a_time=one_at_a_time) as placement:
        placement.load(first)
        placement.load(second)
        assert (first.place, second.place) == ("home" if one_at_a_time else "there", "there")
        placement.one_at_a_time = True
        placement.load(second)
        assert (first.place, second.place) == ("home", "there")
        placement.load(first)
        assert (first.place, second.place) == ("there", "home")
    assert first.place == second.place == "home"


def test_memory_is_saved_first_by_what_leaves_the_result_as_it_is_then_by_smaller_tiles():
    slicing, tile, changes = Slicing(), None, []
    while smaller := next_smaller(slicing, tile, largest=1728, step=64):
        slicing, tile, change = smaller
        changes.append(change)
    assert changes[:3] == ["offloading", "smaller slices", "tiles of 1536 pixels"]
    assert changes[-1] == "tiles of 256 pixels" and tile == Tile(size=256, overlap=64)
    assert slicing == Slicing(offload=True, temporal_pixels=SMALL_SLICES)


def test_changes_that_are_no_option_are_skipped_and_tiles_have_four_steps_at_least():
    options = {"largest": 600, "offload": False, "slices": False}
    smaller = next_smaller(Slicing(), None, step=128, **options)
    assert smaller is not None and smaller.tile == Tile(size=512, overlap=128)
    assert next_smaller(Slicing(), None, step=129, **options) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_used_again_without_asking_the_system():
    import resource

    def pages_given() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB, 16384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    # small objects nibble at the first blocks
    assert [pages_given() for _ in range(8)][-1] < 1000
