"""CogVideoX's VAE computed a few frames at a time: the same numbers in less memory.

The layers are diffusers'. They are causal in time and pass on a cache of their last frames. Only
the group norms depend on all frames (of a window in the encoder, of a group in the decoder),
through two numbers per group of channels. Tensors are overwritten, so this is for inference only.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.slicing import ClipNorm

# Pixels, at the layer's own resolution, that are computed at a time, in whole frames.
PIXELS = 2**19

Cache = dict[nn.Module, Tensor]  # the last input frames of each convolution


def encode(encoder: Any, video: Tensor) -> Tensor:
    """Returns the posterior's mean and log variance (b c f h w) of a window (b 3 f h w).

    encoder: that of diffusers' AutoencoderKLCogVideoX.
    """
    cache: Cache = {}
    x = _convolved(encoder.conv_in, video, cache)
    for layer in _layers(*encoder.down_blocks, encoder.mid_block):
        x = layer(x, None, cache)
    return _convolved(encoder.conv_out, x, cache, _normed(encoder.norm_out, x, None))


def decode(decoder: Any, z: Tensor, cache: Cache) -> Tensor:
    """Returns the frames (b 3 f h w) of one group of latent frames z (b c f h w).

    decoder: that of diffusers' AutoencoderKLCogVideoX. cache: left by the previous group, empty for
    the first; updated here.
    """
    x = _convolved(decoder.conv_in, z, cache)
    for layer in _layers(decoder.mid_block, *decoder.up_blocks):
        x = layer(x, z, cache)
    return _convolved(decoder.conv_out, x, cache, _normed(decoder.norm_out, x, z))


def _layers(*blocks: Any) -> Iterator[Callable[[Tensor, Tensor | None, Cache], Tensor]]:
    for block in blocks:
        yield from (partial(_resnet, resnet) for resnet in block.resnets)
        for name in ("downsamplers", "upsamplers"):
            yield from (partial(_resized, layer) for layer in getattr(block, name, None) or ())


def _resized(layer: Any, x: Tensor, z: Tensor | None, cache: Cache) -> Tensor:
    return torch.cat([layer(x[:, :, part]) for part in _parts(x, even=True)], dim=2)


def _resnet(resnet: Any, x: Tensor, z: Tensor | None, cache: Cache) -> Tensor:
    hidden = _convolved(resnet.conv1, x, cache, _normed(resnet.norm1, x, z))
    normed = _normed(resnet.norm2, hidden, z)
    if resnet.in_channels == resnet.out_channels:
        for part in _parts(x):
            x[:, :, part] += _next(resnet.conv2, normed(part), cache)
        return x
    for part in _parts(x):
        y = _next(resnet.conv2, normed(part), cache)
        hidden[:, :, part] = y + resnet.conv_shortcut(x[:, :, part])
    return hidden


def _normed(norm: Any, x: Tensor, z: Tensor | None) -> Callable[[slice], Tensor]:
    """Returns a function of frames: norm, modulated by z if there is one, and SiLU of x."""
    if z is None:
        clip_norm = ClipNorm(norm, x)
        return lambda part: F.silu(clip_norm(x[:, :, part]))
    clip_norm = ClipNorm(norm.norm_layer, x)
    z = _resized_like(z, x)

    def normed(part: slice) -> Tensor:
        gain, shift = (conv(z[:, :, part])[0] for conv in (norm.conv_y, norm.conv_b))
        return F.silu(clip_norm(x[:, :, part]).mul_(gain).add_(shift))

    return normed


def _resized_like(z: Tensor, x: Tensor) -> Tensor:
    """Resizes z to the frames and size of x; of an odd number of frames the first is separate."""
    frames, size = x.shape[2], x.shape[-2:]
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(z, size=(frames, *size))
    first, rest = z[:, :, :1], z[:, :, 1:]
    parts = [F.interpolate(first, size=(1, *size)), F.interpolate(rest, size=(frames - 1, *size))]
    return torch.cat(parts, dim=2)


def _convolved(
    conv: Any, x: Tensor, cache: Cache, normed: Callable[[slice], Tensor] | None = None
) -> Tensor:
    """Applies a causal convolution to x, or to what `normed` makes of its frames."""
    out = None
    for part in _parts(x):
        y = _next(conv, normed(part) if normed else x[:, :, part], cache)
        if out is None:
            out = y.new_empty(*y.shape[:2], *x.shape[2:])
        out[:, :, part] = y
    assert out is not None
    return out


def _next(conv: Any, part: Tensor, cache: Cache) -> Tensor:
    y, cache[conv] = conv(part, conv_cache=cache.get(conv))
    return y


def _parts(x: Tensor, *, even: bool = False) -> list[slice]:
    """Returns slices of frames. even: an even number each, plus one in the first if it is odd."""
    frames = x.shape[2]
    count = max(1, PIXELS // (x.shape[-2] * x.shape[-1]))
    odd = 0
    if even:
        count, odd = max(2, count // 2 * 2), frames % 2
    starts = [0, *range(odd + count, frames, count)]
    return [slice(a, b) for a, b in pairwise([*starts, frames])]
