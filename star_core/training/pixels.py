"""Losses in pixels at the memory of losses in latents: only a part is decoded, and never kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..vae.frame_vae import VideoVAE


class Decoder(NamedTuple):
    """A VAE's decoder with gradients, (b c f h w) -> (b 3 f h·factor w·factor)."""

    decode: Callable[[Tensor], Tensor]
    factor: int


@dataclass(frozen=True, kw_only=True)
class PixelCrop:
    """The part of the latents that a loss in pixels decodes.

    frames, height, width: of the part, in latents. margin: latents around it that are decoded with
    it and cut off again, because a decoder sees its neighbourhood.
    """

    frames: int = 3
    height: int = 12
    width: int = 12
    margin: int = 4


def random_crop(
    size: tuple[int, int, int], crop: PixelCrop, generator: torch.Generator
) -> tuple[slice, slice, slice]:
    """Where to cut latents of `size` (f h w), the whole side where it is shorter than the crop."""

    def cut(have: int, want: int) -> slice:
        want = min(have, want)
        start = int(torch.randint(have - want + 1, (), generator=generator))
        return slice(start, start + want)

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
    """Pixels (b 3 f h w) of a part of latents (b c f h w), with gradients, in little memory.

    decode: a VAE's decoder, (b c f h w) -> (b 3 f h·factor w·factor). Its activations are computed
    again on the way back instead of kept, one sample after the other.
    """
    frames, *sides = part
    around = [
        slice(max(0, side.start - margin), min(have, side.stop + margin))
        for side, have in zip(sides, latents.shape[-2:], strict=True)
    ]
    inner = [
        slice((side.start - wide.start) * factor, (side.stop - wide.start) * factor)
        for side, wide in zip(sides, around, strict=True)
    ]
    samples = latents[:, :, frames, around[0], around[1]].split(1)
    pixels = [checkpoint(decode, sample, use_reentrant=False) for sample in samples]
    return torch.cat([sample[..., inner[0], inner[1]] for sample in pixels])


def decoder_of(vae: VideoVAE) -> Decoder:
    """A VAE's decoder for losses: all frames of a part at once."""
    vae.model.eval().requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents, window=latents.shape[2], overlap=0)

    return Decoder(decode, vae.factor)
