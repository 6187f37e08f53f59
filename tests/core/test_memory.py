import platform
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from star_core.allocator import keep_freed_memory
from star_core.memory import (
    SMALL_SLICES,
    DevicePlacement,
    MemoryLimits,
    is_out_of_memory,
    next_smaller,
    retry_on_oom,
)
from star_core.models.slicing import Slicing
from star_core.windows.tiling import Tile
from tests.standin import StandIn, on_card

# Older versions of torch raise its base class.
AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)


def test_a_module_goes_home_even_if_the_work_fails():
    module = nn.Linear(2, 2)
    with (
        StandIn(),
        pytest.raises(KeyboardInterrupt),
        DevicePlacement("cuda") as placement,
    ):
        placement.load(module)
        assert module.weight.is_cuda
        raise KeyboardInterrupt
    assert not on_card(module.weight)


@pytest.mark.parametrize("one_at_a_time", [True, False])
def test_a_device_holds_one_module_at_a_time_or_all(one_at_a_time):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)

    def places() -> tuple[bool, bool]:
        return on_card(first.weight), on_card(second.weight)

    with StandIn(), DevicePlacement("cuda", one_at_a_time=one_at_a_time) as placement:
        placement.load(first)
        placement.load(second)
        assert places() == (not one_at_a_time, True)
        placement.one_at_a_time = True
        placement.load(second)
        assert places() == (False, True)
        placement.load(first)
        assert places() == (True, False)
    assert places() == (False, False)


class Shared(nn.Module):
    """Two layers with one weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.ones(2))

    def forward(self, x):
        return self.second(self.first(x)) + self.table


def test_weights_that_come_back_are_the_tensors_that_stayed():
    module = Shared()
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    parameters = list(module.parameters())
    with StandIn() as card, torch.inference_mode():
        with DevicePlacement("cuda") as placement:
            placement.load(module)
            placement.load(module)
            assert card.counts["to_card"] == 4  # the shared weight once
            assert module(torch.ones(1, 2, device="cuda")).is_cuda
            assert not any(each.is_inference() for each in module.state_dict().values())
            assert not {each.data_ptr() for each in parameters} & set(before.values())
        assert card.counts["from_card"] == 0
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before
    module(torch.ones(1, 2)).sum().backward()
    assert module.first.weight.grad is not None


def test_a_module_that_fails_to_move_is_whole_and_moves_once_there_is_room():
    module, other = Shared(), nn.Linear(2, 2)
    room = [2]  # tensors: those of the other module

    def fails(tensor: Tensor) -> None:
        if not room[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        room[0] -= 1

    with StandIn() as card, DevicePlacement("cuda", one_at_a_time=False) as placement:
        card.before_copy = fails
        placement.load(other)
        room[0] = 1

        def work() -> Tensor:
            placement.load(module)
            return module(torch.ones(1, 2, device="cuda"))

        def shrink() -> str:
            assert not any(map(on_card, module.state_dict().values()))
            module(torch.ones(1, 2))
            placement.one_at_a_time, room[0] = True, 4
            return "offloading"

        assert retry_on_oom(work, shrink).is_cuda
        assert on_card(module.first.weight) and not on_card(other.weight)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("Allocation on device"), True),
        (AcceleratorError("CUDA error: out of memory"), True),
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_is_full_are_known(error, expected):
    assert is_out_of_memory(error) == expected


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


def test_clips_that_ask_for_the_same_share_what_was_found_to_fit():
    placement = DevicePlacement("cpu")
    wanted: Any = {"slicing": Slicing(offload=True), "vae_tile": None, "latent_tile": None}
    geometry: Any = {"vae_factor": 8, "downsamplings": 3}

    def limits(**changes: Any) -> MemoryLimits:
        return placement.limits(**wanted | changes | geometry)

    first, tile = limits(), Tile(size=1024, overlap=256)
    assert first.shrink_vae(1200) == "tiles of 1024 pixels for the VAE"
    assert limits() is first and first.vae_tile == tile
    assert limits(vae_tile=Tile(size=2048, overlap=512)).vae_tile != tile
    # A smaller frame is whole with these tiles.
    assert limits().shrink_vae(800) == "tiles of 768 pixels for the VAE"


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
