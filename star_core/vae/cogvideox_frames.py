"""CogVideoX's VAE a few frames at a time: the numbers of whole windows in less memory.

The layers are diffusers' own. They are causal in time and hand on their last frames themselves;
only the group norms look at all frames (of a window in the encoder, of a group in the decoder), and
those need no more than two numbers a group of them. For inference: tensors are written over.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.slicing import ClipNorm

PIXELS = 2**19  # of the layer's own resolution that are worked on together, in whole frames

Cache = dict[nn.Module, Tensor]  # of each convolution, what it has last seen


def encode(encoder: Any, video: Tensor) -> Tensor:
    """Window (b 3 f h w) -> moments (b c f h w)."""
    cache: Cache = {}
    x = _convolved(encoder.conv_in, video, cache)
    for layer in _layers(*encoder.down_blocks, encoder.mid_block):
        x = layer(x, None, cache)
    return _convolved(encoder.conv_out, x, cache, _normed(encoder.norm_out, x, None))


def decode(decoder: Any, z: Tensor, cache: Cache) -> Tensor:
    """Latents (b c f h w) of one group -> frames (b 3 f h w). cache: of the groups before."""
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
    """Frames of x, normalised by the statistics of all of them, z taken into account, and SiLU."""
    if z is None:
        whole = ClipNorm(norm, x)
        return lambda part: F.silu(whole(x[:, :, part]))
    whole = ClipNorm(norm.norm_layer, x)
    z = _as_large(z, x)

    def normed(part: slice) -> Tensor:
        gain, shift = (conv(z[:, :, part])[0] for conv in (norm.conv_y, norm.conv_b))
        return F.silu(whole(x[:, :, part]).mul_(gain).add_(shift))

    return normed


def _as_large(z: Tensor, x: Tensor) -> Tensor:
    """z of the frames and size of x; of an odd number of frames the first stands alone."""
    frames, size = x.shape[2], x.shape[-2:]
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(z, size=(frames, *size))
    first, rest = z[:, :, :1], z[:, :, 1:]
    parts = [F.interpolate(first, size=(1, *size)), F.interpolate(rest, size=(frames - 1, *size))]
    return torch.cat(parts, dim=2)


def _convolved(
    conv: Any, x: Tensor, cache: Cache, of: Callable[[slice], Tensor] | None = None
) -> Tensor:
    """The whole of a causal convolution of x, or of what `of` makes of it."""
    out = None
    for part in _parts(x):
        y = _next(conv, of(part) if of else x[:, :, part], cache)
        if out is None:
            out = y.new_empty(*y.shape[:2], *x.shape[2:])
        out[:, :, part] = y
    assert out is not None
    return out


def _next(conv: Any, part: Tensor, cache: Cache) -> Tensor:
    y, cache[conv] = conv(part, conv_cache=cache.get(conv))
    return y


def _parts(x: Tensor, *, even: bool = False) -> list[slice]:
    """Slices of frames. even: an even number each, after a first odd one where it must be."""
    frames = x.shape[2]
    count = max(1, PIXELS // (x.shape[-2] * x.shape[-1]))
    odd = 0
    if even:
        count, odd = max(2, count // 2 * 2), frames % 2
    begins = [0, *range(odd + count, frames, count)]
    return [slice(a, b) for a, b in pairwise([*begins, frames])]
