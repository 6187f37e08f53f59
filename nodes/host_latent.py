"""Encodes a clip to a LATENT, which stores size and padding until it is decoded."""

from collections.abc import Callable
from typing import Any

from comfy.sd import VAE
from torch import Tensor

from ..star_core.diffusion.noise import FrameNoise
from ..star_core.parity import DEFAULT
from ..star_core.windows.geometry import Padding, minimal_padding, pad
from ..star_core.windows.tiling import Tile
from .host import Progress, video_from_images
from .host_vae import encode_video, star_vae

# Down-samplings of the published networks. A network with fewer accepts the same sizes.
MOST_LEVELS = 3


def clip_latent(
    vae: VAE,
    images: Tensor,
    *,
    size: tuple[int, int] | None = None,
    enlarge: Callable[[Tensor], Tensor] = lambda frame: frame,
    levels: int = MOST_LEVELS,
    noise: FrameNoise | None = None,
    tile: Tile | None = None,
) -> dict[str, Any]:
    """Returns the LATENT of images (f h w c), padded for a network with `levels` down-samplings.

    size: (width, height) of the frames that `enlarge` makes of frames (3 h w) in [0, 1]; None for
    the size of the images. noise: noise of the posterior's sample, None for its mean.
    """
    width, height = size or (images.shape[2], images.shape[1])
    factor = star_vae(vae).video_vae.factor
    padding = minimal_padding(height, width, vae_factor=factor, levels=levels)

    def prepare(frame: Tensor) -> Tensor:
        return pad(enlarge(frame[:3]) * 2 - 1, padding, DEFAULT.padding)

    frames = video_from_images(images)
    return {
        "samples": encode_video(vae, frames, prepare, noise=noise, tile=tile, on_step=Progress()),
        "star_size": (width, height),
        "star_padding": padding,
        "star_frames": len(frames),
    }


def padding_of(latent: dict[str, Any], factor: int) -> Padding | None:
    """Returns the padding to crop from decoded frames, None for a LATENT that stores none.

    factor: pixels per latent of the VAE. ValueError for latents that were resized.
    """
    if "star_padding" not in latent:
        return None
    left, right, top, bottom = padding = Padding(*latent["star_padding"])
    width, height = latent["star_size"]
    padded = (height + top + bottom, width + left + right)
    decoded = tuple(side * factor for side in latent["samples"].shape[-2:])
    if decoded != padded:
        raise ValueError(
            f"the latents stand for {decoded[1]}x{decoded[0]} pixels, but were encoded at "
            f"{padded[1]}x{padded[0]}: resize frames instead of latents, or decode with "
            "ComfyUI's VAE Decode, which does not crop"
        )
    return padding
