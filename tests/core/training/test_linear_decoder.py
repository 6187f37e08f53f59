import torch
import torch.nn.functional as F
from einops import rearrange

from star_core.training.linear_decoder import linear_decoder
from star_core.training.objective import Sample


class LinearVAE:
    """Decodes by a convolution, as nothing but a fit of it can find out."""

    factor = 2

    def __init__(self):
        self.kernel = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(5))

    def decode(self, latents, **_):
        frames = F.conv2d(rearrange(latents, "b c f h w -> (b f) c h w"), self.kernel, padding=1)
        return rearrange(frames, "(b f) (c p q) h w -> b c f (h p) (w q)", b=len(latents), p=2, q=2)


def test_the_linear_decoder_is_found_where_there_is_one():
    vae, generator = LinearVAE(), torch.Generator().manual_seed(1)
    pairs = [Sample(*torch.randn(2, 4, 3, 18, 16, generator=generator)) for _ in range(3)]
    found = linear_decoder(vae, pairs)  # pyright: ignore
    torch.testing.assert_close(found, vae.kernel, rtol=1e-3, atol=1e-3)
