"""The memory that the model asks its host for."""

import pytest
import torch

from star_core.models.slicing import Slicing
from star_core.models.unet import ControlledVideoUNet
from star_core.planning.meta_memory import LiveTensors
from star_core.windows.chunking import ChunkConfig
from star_core.windows.tiling import Tile

pytestmark = pytest.mark.host


def test_memory_is_asked_for_by_tile_and_by_where_skips_wait(host):
    asked = []
    base = type(host.model.model)
    required = base.memory_required

    def recorded(self, shape, cond_shapes=None):
        asked[-1].append(required(self, shape, cond_shapes))
        return asked[-1][-1]

    tile = Tile(size=24, overlap=0)
    tiles = [
        host.sampling.patch_tiles(host.model, tile, factor=4, offload=o) for o in (False, True)
    ]
    base.memory_required = recorded
    try:
        for model in (host.model, *tiles):
            asked.append([])
            host.ksampler(model, "euler", steps=1)
    finally:
        base.memory_required = required
    whole, tiled, offloaded = map(max, asked)
    assert offloaded <= tiled < whole
    slicings = (Slicing(), Slicing(offload=True))
    shape, config = (1, 4, 8, 90, 160), host.model_file.UNetConfig()
    held, moved = (
        host.model_file.activations(config, shape, torch.float16, slicing=slicing)
        for slicing in slicings
    )
    assert moved < held


def test_memory_is_asked_for_one_window_not_for_the_clip(host):
    asked = []
    model = host.sampling.patch_chunks(host.model, ChunkConfig(length=4, overlap=2), "smooth")
    base = type(host.model.model)
    required = base.memory_required

    def recorded(self, shape, cond_shapes=None):
        asked.append(shape[2])
        return required(self, shape, cond_shapes)

    base.memory_required = recorded
    try:
        host.ksampler(model, "euler", steps=1)
    finally:
        base.memory_required = required
    assert asked and max(asked) == 4


@pytest.mark.parametrize(("frames", "height", "width"), [(8, 90, 160), (16, 42, 48)])
def test_memory_asked_for_covers_the_full_size_network_and_not_much_more(
    host, frames, height, width
):
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = host.model_file.UNetConfig()
    with FakeTensorMode(), torch.inference_mode():
        network = ControlledVideoUNet(config, dtype=torch.float16).eval()
        network.slicing = Slicing()
        x = torch.empty(1, 4, frames, height, width, dtype=torch.float16)
        t, y = torch.zeros(1), torch.empty(1, 77, 1024, dtype=torch.float16)
        with LiveTensors() as used:
            network(x, t, y, x)
    asked = host.model_file.activations(config, x.shape, torch.float16)
    assert used.peak < asked < 1.25 * used.peak
