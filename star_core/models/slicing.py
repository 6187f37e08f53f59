"""A layer's work a slice at a time: the same numbers in less memory.

Spatial layers know nothing of other frames, temporal ones nothing of other pixels; only group norms
over whole clips look at everything, and they need no more than two numbers a group of it. Slices
are for inference: they write into tensors that are there already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Slicing:
    """How much a layer works on at a time, in pixels of the layer's own resolution.

    spatial_pixels: spatial layers take so many in whole frames, but at least one frame.
    temporal_pixels: temporal layers take so many, each through all frames, in whole rows, but at
    least one row. offload: skips wait in main memory and come back one by one.
    """

    spatial_pixels: int = 4096
    temporal_pixels: int = 512
    offload: bool = False

    def __post_init__(self) -> None:
        if min(self.spatial_pixels, self.temporal_pixels) < 1:
            raise ValueError(f"slices hold at least 1 pixel, got {self}")

    def frames(self, x: Tensor) -> Sequence[slice]:
        """Slices of the first dimension of frames (b·f c h w)."""
        count = max(1, self.spatial_pixels // (x.shape[-2] * x.shape[-1]))
        return [slice(i, i + count) for i in range(0, len(x), count)]

    def rows(self, clip: Tensor) -> Sequence[Tensor]:
        """Views of (b c f h w), all frames of a few rows."""
        return clip.split(max(1, self.temporal_pixels // clip.shape[-1]), dim=3)

    def waiting(self, x: Tensor) -> Tensor:
        """x where it is to wait; `.to(device)` brings it back."""
        if not self.offload or x.device.type == "cpu":
            return x
        # From pinned memory, CUDA copies without the program waiting for it.
        pinned = x.device.type == "cuda"
        kept = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
        return kept.copy_(x, non_blocking=pinned)


def over_frames(fn: Callable[..., Tensor], slicing: Slicing | None, *tensors: Tensor) -> Tensor:
    """fn of tensors with the same first dimension, slice by slice; the last is (b·f c h w)."""
    parts = slicing.frames(tensors[-1]) if slicing else ()
    if len(parts) < 2:
        return fn(*tensors)
    out = None
    for part in parts:
        result = fn(*(tensor[part] for tensor in tensors))
        if out is None:
            out = result.new_empty(len(tensors[0]), *result.shape[1:])
        out[part] = result
    assert out is not None
    return out


class ClipNorm:
    """A group norm whose statistics are those of a whole clip (b c f h w), for its parts."""

    def __init__(self, norm: nn.GroupNorm, clip: Tensor, slicing: Slicing = Slicing()) -> None:
        groups = norm.num_groups
        # What the norm does to a value is affine: asked here with values of mean 0 and variance 1,
        # because a host keeps the weights cast or elsewhere.
        probe = clip.new_tensor([1.0, -1.0]).expand(1, clip.shape[1], 2)
        high, low = norm(probe).float().unbind(-1)
        weight, bias = (high - low) / 2 * (1 + norm.eps) ** 0.5, (high + low) / 2
        channels = rearrange(clip, "b (g c) f h w -> f b g c h w", g=groups)
        # In slices: the sums would be taken of a copy in float32 otherwise.
        parts = slicing.frames(channels)
        count = channels[0, 0, 0].numel() * len(channels)
        mean = sum(channels[part].float().sum((0, 3, 4, 5)) for part in parts) / count
        assert isinstance(mean, Tensor)
        away = (channels[part].float() - mean[..., None, None, None] for part in parts)
        square = sum(part.square().sum((0, 3, 4, 5)) for part in away) / count
        assert isinstance(square, Tensor)
        scale = (square + norm.eps).rsqrt()
        per_channel = clip.shape[1] // groups
        mean, scale = (v.repeat_interleave(per_channel, dim=1) for v in (mean, scale))
        self.gain = (weight * scale)[..., None, None, None]
        self.shift = (bias - mean * weight * scale)[..., None, None, None]

    def __call__(self, part: Tensor) -> Tensor:
        """Of pixels or frames (b c f h w) of the clip."""
        return torch.addcmul(self.shift, part.float(), self.gain).to(part)
