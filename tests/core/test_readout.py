from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from star_core.diffusion.schedule import star_schedule
from star_core.training.objective import Sample
from star_core.training.readout import features, fit_last_layer, linear_decoder
from star_core.training.tiny import NETWORK, started

SMALL = replace(NETWORK, in_dim=4, out_dim=4, dim_mult=(1,), attn_scales=(), hint_prior=0.5)
T = 899


class LinearVAE:
    """Decodes by a convolution, as nothing but a fit of it can find out."""

    factor = 2

    def __init__(self):
        self.kernel = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(5))

    def decode(self, latents, **_):
        frames = F.conv2d(rearrange(latents, "b c f h w -> (b f) c h w"), self.kernel, padding=1)
        return rearrange(frames, "(b f) (c p q) h w -> b c f (h p) (w q)", b=len(latents), p=2, q=2)


def samples(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        lq = torch.randn(4, 3, 18, 16, generator=generator)
        hq = 0.6 * lq + 0.2 * lq.roll(1, dims=-1)
        yield Sample(hq, lq)


def noise(seed):
    return torch.randn(4, 3, 18, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    network, prompts = started(SMALL, 0)
    return network.eval(), prompts.positive.detach()


def error(network, y, sample, decoder):
    x_t = star_schedule().add_noise(sample.hq[None], noise(9)[None], torch.tensor([T]))
    with torch.no_grad():
        v = network(x_t, torch.tensor([T]), y, sample.lq[None])
    wrong = star_schedule().x_0(x_t, v, torch.tensor([T]))[0] - sample.hq
    return F.conv2d(rearrange(wrong, "c f h w -> f c h w"), decoder, padding=1).square().mean()


def test_the_linear_decoder_is_found_where_there_is_one():
    vae = LinearVAE()
    found = linear_decoder(vae, list(samples(3)))  # pyright: ignore
    torch.testing.assert_close(found, vae.kernel, rtol=1e-3, atol=1e-3)


def test_the_fitted_layer_leaves_less_error_on_clips_that_it_was_not_fitted_to(network):
    network, y = network
    decoder = LinearVAE().kernel
    *fitted, other = samples(5)
    before = error(network, y, other, decoder)
    clips = [features(network, y, s, noise(i), decoder, T) for i, s in enumerate(fitted)]
    fit_last_layer(network, clips, decoder, iterations=40, pull=1e-4)
    assert error(network, y, other, decoder) < 0.8 * before


def test_a_strong_pull_keeps_the_layer(network):
    network, y = network
    decoder = LinearVAE().kernel
    clips = [features(network, y, sample, noise(0), decoder, T) for sample in samples(1)]
    before = network.out[-1].weight.detach().clone()
    fit_last_layer(network, clips, decoder, iterations=5, pull=1e6)
    assert (network.out[-1].weight - before).abs().max() < 1e-4
