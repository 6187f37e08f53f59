"""The network in slices: the same numbers in less memory."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from star_core.models.slicing import ClipNorm, Slicing, over_frames
from star_core.planning.meta_memory import LiveTensors
from tests.two_levels import two_level_network


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network():
    return two_level_network()


@settings(max_examples=20)
@given(frames=st.integers(1, 4), slices=st.integers(1, 300), pixels=st.integers(1, 200))
def test_slices_change_nothing(network, frames, slices, pixels):
    generator = torch.Generator().manual_seed(frames)
    x, hint = (torch.randn(1, 4, frames, 6, 8, generator=generator) for _ in range(2))
    y, t = torch.randn(1, 3, 8, generator=generator), torch.tensor([500])
    before = x.clone()
    network.slicing = None
    plain = network(x, t, y, hint)
    network.slicing = Slicing(spatial_pixels=slices, temporal_pixels=pixels)
    sliced = network(x, t, y, hint)
    assert (sliced - plain).abs().max() < 1e-5 * plain.abs().max()
    assert torch.equal(x, before)


def test_gradients_flow_where_they_are_switched_on(network):
    x = torch.randn(1, 4, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    y, t = torch.zeros(1, 3, 8), torch.tensor([500])
    network.slicing = Slicing()
    with torch.enable_grad():
        hint = x.clone().requires_grad_()
        network(x, t, y, hint).sum().backward()
    assert hint.grad is not None and hint.grad.any()


def test_a_batch_of_clips_is_sliced_too(network):
    generator = torch.Generator().manual_seed(1)
    x, hint = (torch.randn(2, 4, 3, 6, 8, generator=generator) for _ in range(2))
    y, t = torch.randn(2, 3, 8, generator=generator), torch.tensor([500, 20])
    network.slicing = None
    plain = network(x, t, y, hint)
    network.slicing = Slicing(spatial_pixels=100, temporal_pixels=16)
    torch.testing.assert_close(network(x, t, y, hint), plain, rtol=1e-4, atol=1e-5)


def test_a_norm_of_parts_has_the_statistics_of_the_clip():
    generator = torch.Generator().manual_seed(1)
    norm = torch.nn.GroupNorm(4, 8, eps=0.1).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.normal_(generator=generator)
    clip = 5 + 3 * torch.randn(2, 8, 3, 4, 5, generator=generator)
    normed = ClipNorm(norm, clip)
    parts = torch.cat([normed(part) for part in clip.split(1, dim=3)], dim=3)
    torch.testing.assert_close(parts, norm(clip), rtol=1e-5, atol=1e-5)


class Elsewhere:
    """A tensor in memory that is not counted until it comes back."""

    def __init__(self, x):
        self.kept = x.numpy().copy()
        self.device, self.dtype = x.device, x.dtype

    def to(self, device, dtype, non_blocking=False):
        return torch.from_numpy(self.kept).clone()


class ElsewhereSlicing(Slicing):
    def offloaded(self, x) -> Any:
        return Elsewhere(x) if self.offload else x


def test_slices_need_less_memory_and_skips_elsewhere_still_less(network):
    x, y, t = torch.zeros(1, 4, 8, 18, 16), torch.zeros(1, 3, 8), torch.tensor([500])
    small, peaks = Slicing(spatial_pixels=300, temporal_pixels=48), []
    elsewhere = ElsewhereSlicing(spatial_pixels=300, temporal_pixels=48, offload=True)
    for slicing in (None, small, elsewhere):
        with network.working(slicing=slicing), LiveTensors() as used:
            network(x, t, y, x)
        peaks.append(used.peak)
    assert peaks[1] < 0.6 * peaks[0] and peaks[2] < 0.8 * peaks[1]


def test_offloaded_skips_all_wait_and_come_back(network):
    class Counting(Slicing):
        def offloaded(self, x):
            waited.append(x.shape)
            return super().offloaded(x)

    waited = []
    x, y, t = torch.randn(1, 4, 2, 6, 8), torch.zeros(1, 3, 8), torch.tensor([500])
    with network.working(slicing=Slicing()):
        plain = network(x, t, y, x)
    with network.working(slicing=Counting(offload=True)):
        assert torch.equal(network(x, t, y, x), plain)
    assert len(waited) == len(network.input_blocks)


def test_what_waits_leaves_another_device_only_where_that_is_asked_for():
    with FakeTensorMode():  # which lets "meta" be a device that can be copied from
        x = torch.empty(2, 3, dtype=torch.float16, device="meta")
        kept, stayed = (Slicing(offload=offload).offloaded(x) for offload in (True, False))
    assert (kept.device.type, kept.shape, kept.dtype) == ("cpu", x.shape, x.dtype)
    assert stayed is x


@pytest.mark.gpu
def test_skips_in_main_memory_change_nothing_on_a_gpu(network):
    gpu = copy.deepcopy(network).to("cuda")
    x, y, t = torch.randn(1, 4, 2, 34, 32), torch.zeros(1, 3, 8), torch.tensor([500])
    given = [tensor.cuda() for tensor in (x, t, y, x)]
    with gpu.working(slicing=Slicing(spatial_pixels=500)):
        plain = gpu(*given)
    with gpu.working(slicing=Slicing(spatial_pixels=500, offload=True)):
        assert torch.equal(gpu(*given), plain)
        assert not Slicing(offload=True).offloaded(given[0]).is_cuda


def test_impossible_slices_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Slicing(spatial_pixels=0)


def test_over_frames_gives_every_frame_once():
    seen = []

    def double(x):
        seen.append(len(x))
        return 2 * x

    x = torch.arange(7.0)[:, None, None, None].expand(7, 2, 5, 4)
    assert torch.equal(over_frames(double, Slicing(spatial_pixels=60), x), 2 * x)
    assert seen == [3, 3, 1]
