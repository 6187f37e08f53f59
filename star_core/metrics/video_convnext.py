"""ConvNeXt (Liu et al. 2022) for video, as in DOVER: every third block mixes frames.

Attribute names are the keys of DOVER's checkpoint.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class VideoConvNeXt(nn.Module):
    """The network: video (b 3 f h w) -> features (b d f/2 h/32 w/32), d the last of `dims`.

    depths, dims: number of blocks and width of each stage.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
    ) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv3d(3, dims[0], (2, 4, 4), (2, 4, 4)), _ChannelNorm(dims[0]))
        halving = [
            nn.Sequential(_ChannelNorm(a), nn.Conv3d(a, b, (1, 2, 2), (1, 2, 2)))
            for a, b in zip(dims, dims[1:], strict=False)
        ]
        self.downsample_layers = nn.ModuleList([stem, *halving])
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Block(dim, frames=3 if n % 3 == 1 else 1) for n in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = _ChannelNorm(dims[-1])

    def forward(self, video: Tensor) -> Tensor:
        """Returns the features of a normalised video."""
        x = video
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.norm(x)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b d f h w)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class _Block(nn.Module):
    def __init__(self, dim: int, *, frames: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv3d(dim, dim, (frames, 7, 7), padding=(frames // 2, 3, 3), groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.dwconv(x), "b d f h w -> b f h w d")
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + rearrange(y, "b f h w d -> b d f h w")
