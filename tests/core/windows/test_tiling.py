import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.windows.tiling import Tile, tiled


@st.composite
def tiles(draw):
    size = draw(st.integers(8, 200))
    return Tile(size=size, overlap=draw(st.integers(0, size - 8)))


@given(tile=tiles(), height=st.integers(1, 60), width=st.integers(1, 60), unit=st.integers(1, 8))
def test_tiles_cover_every_pixel_and_reproduce_what_does_not_depend_on_them(
    tile, height, width, unit
):
    tile = Tile(size=tile.size * unit, overlap=tile.overlap * unit)
    x = torch.rand(1, height, width)

    seen = []

    def enlarge(x):
        seen.append(max(x.shape[-2:]) * unit)
        return x.repeat_interleave(unit, -1).repeat_interleave(unit, -2)

    out = tiled(enlarge, x, tile, unit_in=1, unit_out=unit)
    assert max(seen) <= tile.size
    # The weights sum to 1 up to float32 rounding.
    assert (out - enlarge(x)).abs().max() < 1e-6


@given(tile=tiles(), height=st.integers(1, 60), width=st.integers(1, 60), unit=st.integers(1, 8))
def test_every_tile_counts_at_every_pixel_of_it(tile, height, width, unit):
    tile = Tile(size=tile.size * unit, overlap=tile.overlap * unit)
    x = torch.zeros(1, height * unit, width * unit, requires_grad=True)
    seen = []

    def shrink(x):
        seen.append(x.sum() * 0 + torch.zeros(1, x.shape[-2] // unit, x.shape[-1] // unit))
        seen[-1].retain_grad()
        return seen[-1]

    out = tiled(shrink, x, tile, unit_in=unit, unit_out=1)
    assert out.shape == (1, height, width)
    out.sum().backward()
    weights = [part.grad for part in seen]
    assert all((weight > 0).all() for weight in weights)
    assert sum(float(weight.sum()) for weight in weights) == pytest.approx(height * width)


@pytest.mark.parametrize("tile", [None, Tile(size=64, overlap=16)])
def test_one_tile_is_the_plain_result(tile):
    x = torch.randn(2, 3, 32, 64)
    assert torch.equal(tiled(torch.sin, x, tile, unit_in=1, unit_out=1), torch.sin(x))


def test_neighbours_fade_into_each_other_without_a_step():
    values = iter([0.0, 1.0])
    x = torch.zeros(1, 4, 30)
    out = tiled(
        lambda x: torch.full_like(x, next(values)),
        x,
        Tile(size=20, overlap=10),
        unit_in=1,
        unit_out=1,
    )
    assert (out[..., :10] == 0).all() and (out[..., 20:] == 1).all()
    steps = out.diff(dim=-1)
    # The steepest step of a raised cosine over 10 pixels.
    assert steps.min() >= 0 and steps.max() <= torch.pi / 2 / 10


@pytest.mark.parametrize(("size", "overlap"), [(64, 64), (64, -1), (0, 0)])
def test_overlap_that_leaves_no_tile_is_refused(size, overlap):
    with pytest.raises(ValueError, match="overlap"):
        Tile(size=size, overlap=overlap)


def test_tile_below_the_step_of_the_vae_is_refused_with_the_size_to_use():
    with pytest.raises(ValueError, match="at least 24 pixels"):
        tiled(torch.sin, torch.zeros(1, 9, 9), Tile(size=20, overlap=9), unit_in=1, unit_out=8)
