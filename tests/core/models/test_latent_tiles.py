"""Spatial tiles of the network: memory that does not depend on the frame's size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.models.unet import ControlledVideoUNet, UNetConfig
from star_core.planning.meta_memory import LiveTensors
from star_core.windows.tiling import Tile, blend_tiles

CONFIG = UNetConfig(
    dim=16,
    context_dim=8,
    dim_mult=(1, 1, 1),
    num_heads=2,
    head_dim=8,
    num_res_blocks=1,
    attn_scales=(0.25,),
    norm_groups=4,
)
STEP = 4


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network():
    network = ControlledVideoUNet(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.normal_(0.1, parameter[0].numel() ** -0.5, generator=generator)
    return network


def inputs(height, width, frames=1):
    generator = torch.Generator().manual_seed(1)
    x, hint = torch.randn(2, 1, 4, frames, height, width, generator=generator)
    return x, torch.tensor([500]), torch.randn(1, 3, 8, generator=generator), hint


@st.composite
def grids(draw):
    """Tiles that are large enough, and a frame's sides in steps."""
    size = draw(st.integers(STEP + 2, 40))
    most = min((size // STEP - 1) * STEP, ((size - 2) // STEP - 1) * STEP + 2)
    tile = Tile(size=size, overlap=draw(st.integers(0, most)))
    return tile, draw(st.integers(0, 12)), draw(st.integers(1, 12))


@given(grids())
def test_tiles_are_sizes_of_the_network_on_its_grid_and_count_everywhere(grid):
    tile, rows, columns = grid
    height, width = STEP * rows + 2, STEP * columns
    placed = (
        tile.on_grid(height, step=STEP, rest=2),
        tile.on_grid(width, step=STEP),
    )
    for windows, length, rest in zip(placed, (height, width), (2, 0), strict=True):
        assert windows[0].start == 0 and windows[-1].stop == length
        for window in windows:
            assert window.start % STEP == 0 and len(window) % STEP == rest
            assert len(window) <= max(tile.size, rest)
        for before, after in zip(windows, windows[1:], strict=False):
            assert before.stop - after.start >= tile.overlap
    ones = blend_tiles(lambda r, c: torch.ones(r.stop - r.start, c.stop - c.start), *placed)
    torch.testing.assert_close(ones, torch.ones(height, width))
    seen = []

    def probe(rows, columns):
        seen.append(torch.zeros(rows.stop - rows.start, columns.stop - columns.start))
        return seen[-1].requires_grad_()

    with torch.enable_grad():
        blend_tiles(probe, *placed).sum().backward()
    assert all((part.grad > 0).all() for part in seen)


@given(size=st.integers(1, 300), overlap=st.integers(0, 299), factor=st.sampled_from([1, 2, 8]))
def test_a_tile_in_pixels_has_a_tile_in_latents_or_says_what_it_takes(size, overlap, factor):
    if overlap >= size:
        return
    tile = Tile(size=size, overlap=overlap)
    try:
        latents = tile.in_latents(factor, step=STEP)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        assert least > size
        Tile(size=least, overlap=overlap).in_latents(factor, step=STEP)
        return
    assert latents.size * factor <= size and latents.overlap * factor >= overlap
    latents.on_grid(402, step=STEP, rest=2)
    latents.on_grid(400, step=STEP)


@pytest.mark.parametrize("tile", [Tile(size=18, overlap=4), Tile(size=100, overlap=50)])
def test_one_tile_is_no_tile(network, tile):
    given = inputs(18, 16)
    network.tile = None
    plain = network(*given)
    network.tile = tile
    assert torch.equal(network(*given), plain)


def test_tiles_agree_with_the_whole_where_they_see_enough(network):
    """Without attention the network is local: far from a tile's edges it cannot tell."""
    blind = ControlledVideoUNet(UNetConfig(**{**vars(CONFIG), "attn_scales": ()})).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in blind.parameters():
        parameter.normal_(0.1, parameter[0].numel() ** -0.5, generator=generator)
    x, t, y, hint = inputs(10, 96)
    plain = blind(x, t, y, hint)
    blind.tile = Tile(size=80, overlap=64)
    tiled = blind(x, t, y, hint)
    far = (tiled - plain).abs()
    assert far[..., :12].max() < 0.2 * plain.std()


def test_memory_does_not_depend_on_the_frame(network):
    def peak(height, width):
        given = inputs(height, width)
        how = network.working(slicing=None, tile=Tile(size=10, overlap=2))
        with how, LiveTensors() as used:
            network(*given)
        return used.peak - 10 * given[0].nbytes  # what is joined is as large as the latents

    assert peak(26, 24) <= peak(18, 16)


def test_each_tile_sees_its_own_part_of_the_hint(network):
    x, t, y, hint = inputs(10, 32)
    network.tile = Tile(size=16, overlap=0)
    before = network(x, t, y, hint)
    hint[..., 16:] += 1
    after = network(x, t, y, hint)
    assert torch.equal(after[..., :16], before[..., :16])
    assert not torch.isclose(after[..., 16:], before[..., 16:]).any(-1).all()


def test_a_network_works_as_before_after_it_worked_otherwise(network):
    network.tile = None
    network.attention_window = 7
    how = network.working(slicing=None, tile=Tile(size=8, overlap=0), attention_window=9)
    with pytest.raises(RuntimeError, match="stopped"), how:
        assert network.tile is not None and network.attention_window == 9
        raise RuntimeError("stopped")
    assert network.tile is None and network.attention_window == 7
    network.attention_window = None
