"""A linear approximation of a VAE's decoder: differences of latents as pixels, at little cost."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..vae.frame_vae import VideoVAE
from .objective import Sample


@torch.no_grad()
def linear_decoder(vae: VideoVAE, samples: Sequence[Sample], *, frames: int = 4) -> Tensor:
    """Returns the 3x3 convolution that best approximates how a VAE decodes differences of latents.

    It is fitted to the difference of each sample's two clips, `frames` latent frames of each.
    The kernel is (3·factor² c 3 3); its outputs are the pixels of a latent's square, colours
    outermost.
    """
    rows, columns = [], []
    for hq, lq, _ in samples:
        pair = [z[None, :, :frames].float() for z in (hq, lq)]
        pixels = [vae.decode(z, window=z.shape[2], overlap=0) for z in pair]
        latent_change, pixel_change = pair[1] - pair[0], pixels[1] - pixels[0]
        near = F.unfold(rearrange(latent_change, "1 c f h w -> f c h w"), 3, padding=1)
        rows.append(rearrange(near, "f k n -> (f n) k"))
        p = vae.factor
        columns.append(rearrange(pixel_change, "1 c f (h p) (w q) -> (f h w) (c p q)", p=p, q=p))
    inputs, outputs = torch.cat(rows).double(), torch.cat(columns).double()
    kernel = torch.linalg.lstsq(inputs, outputs).solution.T
    return rearrange(kernel.float(), "o (c y x) -> o c y x", y=3, x=3)
