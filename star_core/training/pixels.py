"""Losses in pixels in little memory: only a part of the latents is decoded, with checkpointing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..vae.frame_vae import VideoVAE


class Decoder(NamedTuple):
    """A VAE's decoder with gradients: (b c f h w) -> (b 3 f h·factor w·factor)."""

    decode: Callable[[Tensor], Tensor]
    factor: int


@dataclass(frozen=True, kw_only=True)
class PixelCrop:
    """The part of the latents that is decoded for a loss in pixels.

    frames, height, width: of the part, in latents. margin: latents around it that are decoded too
    and cut off afterwards, because a pixel depends on the latents around it.
    """

    frames: int = 3
    height: int = 12
    width: int = 12
    margin: int = 4


def random_crop(
    size: tuple[int, int, int], crop: PixelCrop, generator: torch.Generator
) -> tuple[slice, slice, slice]:
    """Returns a random position of a crop in latents of `size` (f h w).

    A side that is shorter than the crop is taken whole.
    """

    def cut(side: int, length: int) -> slice:
        length = min(side, length)
        start = int(torch.randint(side - length + 1, (), generator=generator))
        return slice(start, start + length)

    return (
        cut(size[0], crop.frames),
        cut(size[1], crop.height),
        cut(size[2], crop.width),
    )


def decoded_part(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    part: tuple[slice, slice, slice],
    factor: int,
    margin: int = 4,
) -> Tensor:
    """Decodes a part of latents (b c f h w) to pixels (b 3 f h w), with gradients.

    Activations are recomputed in the backward pass, one sample after the other.

    decode: a VAE's decoder, (b c f h w) -> (b 3 f h·factor w·factor). part: frames, rows and
    columns, in latents. margin: see `PixelCrop`.
    """
    frames, *sides = part
    around = [
        slice(max(0, side.start - margin), min(size, side.stop + margin))
        for side, size in zip(sides, latents.shape[-2:], strict=True)
    ]
    inner = [
        slice((side.start - wide.start) * factor, (side.stop - wide.start) * factor)
        for side, wide in zip(sides, around, strict=True)
    ]
    samples = latents[:, :, frames, around[0], around[1]].split(1)
    pixels = [checkpoint(decode, sample, use_reentrant=False) for sample in samples]
    return torch.cat([sample[..., inner[0], inner[1]] for sample in pixels])


def decoder_of(vae: VideoVAE) -> Decoder:
    """Returns the decoder of a VAE, whose weights are frozen, for losses in pixels.

    All frames are decoded at once.
    """
    vae.model.eval().requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents, window=latents.shape[2], overlap=0)

    return Decoder(decode, vae.factor)
