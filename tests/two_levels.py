"""A network of two levels, with attention at both, for tests of how it works."""

import torch

from star_core.models.unet import ControlledVideoUNet, UNetConfig

CONFIG = UNetConfig(
    dim=16,
    context_dim=8,
    dim_mult=(1, 2),
    num_heads=2,
    head_dim=8,
    num_res_blocks=1,
    attn_scales=(1.0, 0.5),
    norm_groups=4,
)


def two_level_network() -> ControlledVideoUNet:
    """Every weight is random: in a new network those that start at zero would hide the rest."""
    network = ControlledVideoUNet(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.normal_(0.1, parameter[0].numel() ** -0.5, generator=generator)
    return network
