"""Spatial tiles with feathered overlaps, so that memory does not grow with the frame."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..devices import send
from .chunking import overlapping_windows, window_weights


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Square tiles of a frame, in pixels of the up-sampled video.

    size: largest side of a tile. overlap: fewest pixels that neighbouring tiles share.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"tile overlap must be at least 0 and below the tile size of {self.size} pixels, "
                f"got {self.overlap}"
            )

    def windows(self, length: int, unit: int) -> list[range]:
        """Returns the windows of one side that is `length` units of `unit` pixels, in units.

        The size is rounded down and the overlap up. ValueError if no unit is left beside the
        overlap.
        """
        size, overlap = self.size // unit, -(-self.overlap // unit)
        if overlap >= size:
            raise ValueError(
                f"tiles of {self.size} pixels that overlap by {self.overlap} are too small for "
                f"a VAE that works in steps of {unit} pixels: use at least "
                f"{unit * (overlap + 1)} pixels"
            )
        return overlapping_windows(length, size, overlap)

    def in_latents(self, factor: int, *, step: int) -> "Tile":
        """Returns the same tile in latents, for a network.

        factor: pixels per latent. step: grid of the network in latents, 2^n for n down-samplings.
        ValueError if the tile is too small for `on_grid`.
        """
        size, overlap = self.size // factor, -(-self.overlap // factor)
        columns, rows = -(-overlap // step), max(0, -(-(overlap - 2) // step))
        least = max((columns + 1) * step, (rows + 1) * step + 2)
        if size < least:
            raise ValueError(
                f"tiles of {self.size} pixels that overlap by {self.overlap} are too small for "
                f"this network: use at least {factor * least} pixels, or less overlap"
            )
        return Tile(size=size, overlap=overlap)

    def on_grid(self, length: int, *, step: int, rest: int = 0) -> list[range]:
        """Returns the windows of one side of `length` latents for a network that halves sizes.

        Each starts at a multiple of `step` latents, so that it stays aligned after halving, and is
        `rest` longer than a multiple of it, as `length` must be.
        """
        if length <= self.size:
            return [range(length)]
        size, overlap = (self.size - rest) // step, max(0, -(-(self.overlap - rest) // step))
        windows = overlapping_windows((length - rest) // step, size, overlap)
        return [range(step * w.start, step * w.stop + rest) for w in windows]


def tiled(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: Tile | tuple[Tile, Tile] | None,
    *,
    unit_in: int,
    unit_out: int,
) -> Tensor:
    """Applies `fn` to x (... h w) tile by tile and blends the overlaps.

    fn: maps every `unit_in` pixels of a side to `unit_out` pixels. One unit is 1 (a latent), the
    other the VAE's factor; tiles start at whole latents.
    tile: of a pair the first gives the height and the second the width of tiles. None, or a tile
    that covers the frame, returns `fn(x)` itself.
    Blend weights sum to 1 and are positive on every pixel of a tile.
    """
    if tile is None:
        return fn(x)
    pixels = max(unit_in, unit_out)
    both = tile if isinstance(tile, tuple) else (tile, tile)
    rows, columns = (
        each.windows(size // unit_in, pixels) for each, size in zip(both, x.shape[-2:], strict=True)
    )
    if len(rows) == len(columns) == 1:
        return fn(x)
    return blend_tiles(
        lambda rows, columns: fn(x[..., rows, columns]),
        rows,
        columns,
        unit_in=unit_in,
        unit_out=unit_out,
    )


def blend_tiles(
    fn: Callable[[slice, slice], Tensor],
    rows: Sequence[range],
    columns: Sequence[range],
    *,
    unit_in: int = 1,
    unit_out: int = 1,
) -> Tensor:
    """Blends the results (... h w) of `fn` for each tile into one tensor.

    fn: called with the slices of rows and columns that a tile reads from the input.
    rows, columns: positions of the tiles, in latents. unit_in, unit_out: pixels per latent in the
    input and in the result.
    """
    out = None
    for rows_in, rows_out, row_weight in _placed(rows, unit_in, unit_out):
        for columns_in, columns_out, column_weight in _placed(columns, unit_in, unit_out):
            y = fn(rows_in, columns_in)
            if out is None:
                size = (rows[-1].stop * unit_out, columns[-1].stop * unit_out)
                out = y.new_zeros(*y.shape[:-2], *size)
            weight = row_weight[:, None] * column_weight
            out[..., rows_out, columns_out] += y * send(weight, y.device, y.dtype)
    assert out is not None
    return out


def _placed(
    windows: Sequence[range], unit_in: int, unit_out: int
) -> list[tuple[slice, slice, Tensor]]:
    """Returns the slice each window reads, the slice it writes and its blend weights."""
    weights = window_weights([range(w.start * unit_out, w.stop * unit_out) for w in windows])
    return [
        (
            slice(window.start * unit_in, window.stop * unit_in),
            slice(window.start * unit_out, window.stop * unit_out),
            weight,
        )
        for window, weight in zip(windows, weights, strict=True)
    ]
