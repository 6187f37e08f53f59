"""Spatial tiles with feathered overlaps, so that memory does not grow with the frame."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .chunking import overlapping_windows, window_weights


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Square tiles of a frame, in pixels of the (up-sampled) video.

    size: no tile is larger than this. overlap: at least this much is shared by neighbours.
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
        """Cut `length` units of `unit` pixels, rounded so that memory stays as asked."""
        size, overlap = self.size // unit, -(-self.overlap // unit)
        if overlap >= size:
            raise ValueError(
                f"tiles of {self.size} pixels that overlap by {self.overlap} are too small for "
                f"a VAE that works in steps of {unit} pixels: use at least "
                f"{unit * (overlap + 1)} pixels"
            )
        return overlapping_windows(length, size, overlap)

    def in_latents(self, factor: int, *, step: int) -> "Tile":
        """The same tile in latents of `factor` pixels, for a network that works in `step` latents.

        ValueError where `on_grid` has no tile so small.
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
        """Windows that begin at multiples of `step` and are `rest` longer than one, as `length` is.

        For networks that halve sizes: where a window begins, so does one of its halves.
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
    """Apply `fn`, which turns every `unit_in` pixels into `unit_out`, to (... h w) tile by tile.

    tile: of two, one is as high and the other as wide as tiles are. One of the two units is 1 (a
    latent), the other the VAE's factor; tiles begin at whole latents. Overlaps are blended with
    weights that sum to 1 and are positive on every pixel of a tile. No tile, or one that holds the
    frame, is `fn(x)` itself.
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
    """The results (... h w) of `fn` for each tile, as in `tiled`, blended into one.

    rows, columns: where tiles lie, in latents. fn is given what they read of its own input.
    """
    out = None
    for rows_in, rows_out, row_weight in _placed(rows, unit_in, unit_out):
        for columns_in, columns_out, column_weight in _placed(columns, unit_in, unit_out):
            y = fn(rows_in, columns_in)
            if out is None:
                size = (rows[-1].stop * unit_out, columns[-1].stop * unit_out)
                out = y.new_zeros(*y.shape[:-2], *size)
            weight = row_weight[:, None] * column_weight
            out[..., rows_out, columns_out] += y * weight.to(y)
    assert out is not None
    return out


def _placed(
    windows: Sequence[range], unit_in: int, unit_out: int
) -> list[tuple[slice, slice, Tensor]]:
    """Where each window reads, where it writes and with which weights."""
    weights = window_weights([range(w.start * unit_out, w.stop * unit_out) for w in windows])
    return [
        (
            slice(window.start * unit_in, window.stop * unit_in),
            slice(window.start * unit_out, window.stop * unit_out),
            weight,
        )
        for window, weight in zip(windows, weights, strict=True)
    ]
