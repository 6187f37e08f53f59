from dataclasses import replace

import pytest
import torch

from star_core.diffusion.schedule import star_schedule
from star_core.losses import DFLossConfig, df_loss
from star_core.models.unet import ControlledVideoUNet
from star_core.training.pixels import PixelCrop, decoded_part, random_crop
from star_core.training.tiny import NETWORK
from star_core.vae.svd import svd_vae

SMALL = replace(
    NETWORK,
    in_dim=4,
    out_dim=4,
    dim_mult=(1,),
    attn_scales=(1.0,),
    hint_prior=0.0,
    guess_input=False,
)


@pytest.fixture(scope="module")
def decode():
    small = {
        "block_out_channels": [32, 32, 32],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 1,
        "norm_eps": 100.0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = svd_vae(small)
    vae.model.eval().requires_grad_(False)
    return lambda latents: vae.decode(latents, window=latents.shape[2], overlap=0)


def test_a_decoded_part_is_the_part_of_the_decoded_whole():
    def decode(latents):  # looks one latent around, as a decoder with a small view would
        blurred = torch.nn.functional.avg_pool3d(latents, (1, 3, 3), stride=1, padding=(0, 1, 1))
        return blurred.repeat_interleave(4, -1).repeat_interleave(4, -2)[:, :3]

    latents = torch.randn(2, 4, 5, 12, 10)
    whole = decode(latents)
    part = (slice(1, 4), slice(3, 9), slice(0, 4))
    ours = decoded_part(decode, latents, part, 4, margin=1)
    torch.testing.assert_close(ours, whole[:, :, 1:4, 12:36, 0:16])


def test_crops_lie_inside_and_are_whole_where_the_latents_are_smaller():
    generator = torch.Generator().manual_seed(0)
    crop = PixelCrop(frames=3, height=6, width=20)
    seen = {
        tuple((s.start, s.stop) for s in random_crop((8, 10, 12), crop, generator))
        for _ in range(99)
    }
    assert all(a >= 0 and b - a == 3 and b <= 8 for (a, b), _, _ in seen)
    assert all(b - a == 6 and b <= 10 for _, (a, b), _ in seen)
    assert {width for _, _, width in seen} == {(0, 12)}
    assert len(seen) > 10


def gradients(decode, variant):
    """Gradients of the DF term alone, decoded to pixels, in ControlNet and LIEM."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ControlledVideoUNet(SMALL)
    for conv in network.VideoControlNet.zero_convs.modules():
        if isinstance(conv, torch.nn.Conv2d):
            torch.nn.init.normal_(conv.weight, std=0.1)
    t, y = torch.tensor([300]), torch.zeros(1, 2, SMALL.context_dim)
    x_t, hint, hq = (torch.randn(1, 4, 2, 4, 4) for _ in range(3))
    x_0 = star_schedule().x_0(x_t, network(x_t, t, y, hint), t)
    part = (slice(0, 2), slice(1, 3), slice(0, 3))
    ours, theirs = (decoded_part(decode, z, part, 4, margin=1) for z in (x_0, hq))
    loss = df_loss(ours, theirs, t, DFLossConfig(variant=variant)).sum()
    if loss.requires_grad:
        loss.backward()
    parameters = dict(network.named_parameters())
    return {
        part: [p.grad for key, p in parameters.items() if part in key]
        for part in ("VideoControlNet.input_hint_block", "VideoControlNet.zero_convs", "local1")
    }


def test_the_gradient_of_the_df_term_reaches_controlnet_and_liem_through_the_decoder(decode):
    for part, found in gradients(decode, "paper").items():
        assert found and any(g is not None and g.any() for g in found), part


def test_the_reference_variant_sends_no_gradient(decode):
    for found in gradients(decode, "reference").values():
        assert found and all(g is None for g in found)


def test_decoding_again_on_the_way_back_changes_no_gradient(decode):
    latents = torch.randn(2, 4, 2, 6, 6, requires_grad=True)
    part = (slice(0, 2), slice(0, 6), slice(0, 6))
    decoded_part(decode, latents, part, 4).square().sum().backward()
    again = latents.detach().clone().requires_grad_(True)
    torch.stack([decode(z).square().sum() for z in again.split(1)]).sum().backward()
    torch.testing.assert_close(latents.grad, again.grad)
