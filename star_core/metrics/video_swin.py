"""Video Swin Transformer (Liu et al. 2022), with FAST-VQA's gated bias (Wu et al. 2022).

Attribute names are the keys of DOVER's checkpoint.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WINDOW = (8, 7, 7)
Size = tuple[int, int, int]  # frames, height, width


class VideoSwin(nn.Module):
    """The network: video (b 3 f h w) -> features (b d f/2 h/32 w/32), d = 8 * embed_dim.

    f must be a multiple of 16, h and w of 224, so that every stage consists of whole windows.
    depths, heads: number of blocks, and of attention heads, of each stage.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
    ) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(embed_dim)
        last = len(depths) - 1
        self.layers = nn.ModuleList(
            _Stage(embed_dim * 2**n, depth, count, gated=n < last, merges=n < last)
            for n, (depth, count) in enumerate(zip(depths, heads, strict=True))
        )
        self.norm = nn.LayerNorm(embed_dim * 2**last)

    def forward(self, video: Tensor) -> Tensor:
        """Returns the features of a normalised video. Raises ValueError for another size."""
        if video.shape[2] % 16 or video.shape[3] % 224 or video.shape[4] % 224:
            raise ValueError(f"the video must be (b 3 16n 224n 224n), got {tuple(video.shape)}")
        x = self.patch_embed(video)
        for layer in self.layers:
            x = layer(x)
        return rearrange(self.norm(x), "b f h w d -> b d f h w")


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (2, 4, 4), stride=(2, 4, 4))
        self.norm = nn.LayerNorm(dim)

    def forward(self, video: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(video), "b d f h w -> b f h w d"))


class _Stage(nn.Module):
    """Blocks at one resolution, every second one with its windows shifted by half."""

    def __init__(self, dim: int, depth: int, heads: int, *, gated: bool, merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(dim, heads, gated=gated, shifted=bool(n % 2)) for n in range(depth)
        )
        self.downsample = _Merge(dim) if merges else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class _Merge(nn.Module):
    """Merges 2x2 neighbouring tokens into one that is twice as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b f (h y) (w x) d -> b f h w (x y d)", y=2, x=2)
        return self.reduction(self.norm(x))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, *, gated: bool, shifted: bool) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _WindowAttention(dim, heads, gated=gated)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2], x.shape[3])
        # A dimension of only one window is not shifted.
        shift = [
            w // 2 if self.shifted and side > w else 0 for side, w in zip(size, WINDOW, strict=True)
        ]
        back = [-s for s in shift]
        shifted = torch.roll(self.norm1(x), back, dims=(1, 2, 3))
        tokens = self.attn(_windows(shifted), size, (shift[0], shift[1], shift[2]))
        shifted = rearrange(
            tokens,
            "(b nf nh nw) (f h w) d -> b (nf f) (nh h) (nw w) d",
            nf=size[0] // WINDOW[0],
            nh=size[1] // WINDOW[1],
            nw=size[2] // WINDOW[2],
            f=WINDOW[0],
            h=WINDOW[1],
        )
        x = x + torch.roll(shifted, shift, dims=(1, 2, 3))
        return x + self.mlp(self.norm2(x))


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for each distance in time and space.

    gated: whether a second table of biases applies inside a fragment of the picture, and the first
    one between fragments.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, *, gated: bool) -> None:
        super().__init__()
        self.heads = heads
        distances = (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1) * (2 * WINDOW[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, heads))
        if gated:
            self.fragment_position_bias_table = nn.Parameter(torch.zeros(distances, heads))
        self.gated = gated
        self.register_buffer("relative_position_index", _distance_index())
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, windows: Tensor, size: Size, shift: Size) -> Tensor:
        """Attends inside windows (n l d) of a video of `size` tokens that was rolled by `shift`."""
        count = size[0] * size[1] * size[2] // (WINDOW[0] * WINDOW[1] * WINDOW[2])
        q, k, v = rearrange(self.qkv(windows), "n l (k a d) -> k n a l d", k=3, a=self.heads)
        bias = self._bias("relative_position_bias_table")  # (a l l)
        if self.gated:
            # Weighted by the distance between fragments, not only by whether it is 0: as published.
            between = _fragment_distance(size, shift).to(windows)[:, None]
            bias = bias * between + self._bias("fragment_position_bias_table") * (1 - between)
        else:
            bias = bias[None]
        if any(shift):
            bias = bias + _shift_mask(size, shift).to(windows)[:, None]
        bias = bias.expand(count, -1, -1, -1).repeat(len(windows) // count, 1, 1, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(rearrange(attended, "n a l d -> n l (a d)"))

    def _bias(self, table: str) -> Tensor:
        return rearrange(self.get_parameter(table)[self.relative_position_index], "i j a -> a i j")


def _windows(x: Tensor) -> Tensor:
    f, h, w = WINDOW
    return rearrange(x, "b (nf f) (nh h) (nw w) d -> (b nf nh nw) (f h w) d", f=f, h=h, w=w)


def _distance_index() -> Tensor:
    """Returns the row (l l) of the table of biases for each pair of tokens of a window."""
    positions = torch.stack(torch.meshgrid(*map(torch.arange, WINDOW), indexing="ij")).flatten(1)
    distance = positions[:, :, None] - positions[:, None]  # (3 l l)
    index = torch.zeros_like(distance[0])
    for along, side in zip(distance, WINDOW, strict=True):
        index = index * (2 * side - 1) + along + side - 1
    return index


@lru_cache(maxsize=16)
def _fragment_distance(size: Size, shift: Size) -> Tensor:
    """Returns the distances (n l l) of each window's tokens in fragments, h and w together."""
    rows = torch.arange(size[1]) * WINDOW[1] // size[1]
    columns = torch.arange(size[2]) * WINDOW[2] // size[2]
    fragments = torch.stack(
        (rows[:, None].expand(size[1:]), columns[None].expand(size[1:])), dim=-1
    ).expand(*size, 2)
    fragments = torch.roll(fragments, [-s for s in shift], dims=(0, 1, 2))
    fragments = _windows(fragments[None])  # (n l 2)
    return (fragments[:, None] - fragments[:, :, None]).abs().sum(dim=-1)


@lru_cache(maxsize=16)
def _shift_mask(size: Size, shift: Size) -> Tensor:
    """Returns -100 between tokens of a window (n l l) that were not neighbours before the shift."""
    region = torch.zeros(size)
    for dim, (side, window, offset) in enumerate(zip(size, WINDOW, shift, strict=True)):
        line = torch.zeros(side)
        if offset:
            line[side - window : side - offset] = 1
            line[side - offset :] = 2
        shape = [1, 1, 1]
        shape[dim] = side
        region = region * 3 + line.view(shape)
    regions = _windows(region[None, ..., None])[..., 0]  # (n l)
    return torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)
