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


def tiled(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: Tile | None,
    *,
    unit_in: int,
    unit_out: int,
) -> Tensor:
    """Apply `fn`, which turns every `unit_in` pixels into `unit_out`, to (... h w) tile by tile.

    One of the two units is 1 (a latent), the other the VAE's factor; tiles begin at whole
    latents. Overlaps are blended with weights that sum to 1 and are positive on every pixel of a
    tile. No tile, or one that holds the frame, is `fn(x)` itself.
    """
    if tile is None:
        return fn(x)
    pixels = max(unit_in, unit_out)
    rows, columns = (tile.windows(size // unit_in, pixels) for size in x.shape[-2:])
    if len(rows) == len(columns) == 1:
        return fn(x)
    out = None
    for rows_in, rows_out, row_weight in _placed(rows, unit_in, unit_out):
        for columns_in, columns_out, column_weight in _placed(columns, unit_in, unit_out):
            y = fn(x[..., rows_in, columns_in])
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
