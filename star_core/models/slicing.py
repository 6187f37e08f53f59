"""Layers computed slice by slice: the same numbers in less memory.

Spatial layers work on each frame independently, temporal ones on each pixel. Only group norms over
whole clips depend on everything, through two numbers per group. Slices overwrite existing tensors,
so they are for inference only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ..devices import stash


@dataclass(frozen=True, kw_only=True)
class Slicing:
    """Limits what a layer computes at a time, in pixels of the layer's own resolution.

    spatial_pixels: for spatial layers, rounded down to whole frames, at least one.
    temporal_pixels: for temporal layers, rounded down to whole rows of all frames, at least one.
    offload: keeps skip connections in system RAM until they are needed.
    """

    spatial_pixels: int = 4096
    temporal_pixels: int = 512
    offload: bool = False

    def __post_init__(self) -> None:
        if min(self.spatial_pixels, self.temporal_pixels) < 1:
            raise ValueError(f"slices must have at least 1 pixel, got {self}")

    def frames(self, x: Tensor) -> Sequence[slice]:
        """Returns slices of the first dimension of frames x (b·f c h w)."""
        count = max(1, self.spatial_pixels // (x.shape[-2] * x.shape[-1]))
        return [slice(i, i + count) for i in range(0, len(x), count)]

    def rows(self, clip: Tensor) -> Sequence[Tensor]:
        """Returns views of a clip (b c f h w), each with all frames of a few rows."""
        return clip.split(max(1, self.temporal_pixels // clip.shape[-1]), dim=3)

    def offloaded(self, x: Tensor) -> Tensor:
        """Returns x, copied to system RAM if `offload` is on; `devices.send` brings it back."""
        return stash(x) if self.offload else x


def over_frames(fn: Callable[..., Tensor], slicing: Slicing | None, *tensors: Tensor) -> Tensor:
    """Applies fn to tensors of equal first dimension, a slice of that dimension at a time.

    tensors: the last is (b·f c h w) and decides the size of slices. slicing: None for one slice.
    """
    slices = slicing.frames(tensors[-1]) if slicing else ()
    if len(slices) < 2:
        return fn(*tensors)
    out = None
    for frames in slices:
        result = fn(*(tensor[frames] for tensor in tensors))
        if out is None:
            out = result.new_empty(len(tensors[0]), *result.shape[1:])
        out[frames] = result
    assert out is not None
    return out


class ClipNorm:
    """A group norm with the statistics of a whole clip, applicable to parts of the clip."""

    def __init__(self, norm: nn.GroupNorm, clip: Tensor, slicing: Slicing = Slicing()) -> None:
        """Computes the statistics of a clip (b c f h w), a slice at a time."""
        groups = norm.num_groups
        # Weight and bias are read by applying the norm to values of mean 0 and variance 1, because
        # a host may store them on another device or in another dtype.
        probe = clip.new_ones(1, clip.shape[1], 2)
        probe[..., 1].neg_()  # a constant copied from main memory would make the host wait
        high, low = norm(probe).float().unbind(-1)
        weight, bias = (high - low) / 2 * (1 + norm.eps) ** 0.5, (high + low) / 2
        channels = rearrange(clip, "b (g c) f h w -> f b g c h w", g=groups)
        # In slices, because each is copied to float32.
        slices = slicing.frames(channels)
        count = channels[0, 0, 0].numel() * len(channels)
        mean = sum(channels[frames].float().sum((0, 3, 4, 5)) for frames in slices) / count
        assert isinstance(mean, Tensor)
        deviations = (channels[frames].float() - mean[..., None, None, None] for frames in slices)
        variance = sum(each.square().sum((0, 3, 4, 5)) for each in deviations) / count
        assert isinstance(variance, Tensor)
        scale = (variance + norm.eps).rsqrt()
        per_channel = clip.shape[1] // groups
        mean, scale = (v.repeat_interleave(per_channel, dim=1) for v in (mean, scale))
        self.gain = (weight * scale)[..., None, None, None]
        self.shift = (bias - mean * weight * scale)[..., None, None, None]

    def __call__(self, part: Tensor) -> Tensor:
        """Normalises some of the clip's frames or pixels (b c f h w)."""
        return torch.addcmul(self.shift, part.float(), self.gain).to(part)
