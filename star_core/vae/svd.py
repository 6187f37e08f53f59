"""The VAE of Stable Video Diffusion: an encoder of single frames, a decoder that mixes frames.

The network is diffusers' AutoencoderKLTemporalDecoder (Blattmann et al. 2023); specification,
section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..models.temporal_conv import speed_up_temporal_convs
from .block_geometry import BlockGeometry
from .frame_vae import FrameGeometry, VideoVAE
from .naming import count_of, renamed


@dataclass(frozen=True, kw_only=True)
class SVDGeometry(BlockGeometry, FrameGeometry):
    """Sizes of the VAE under diffusers' names; the defaults are SVD's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4

    def build(self) -> VideoVAE:
        """Returns a VAE with random weights."""
        return svd_vae(asdict(self))


def svd_vae(config: Mapping[str, Any]) -> VideoVAE:
    """Returns a VAE with random weights.

    config: fields of diffusers' config; missing ones take SVD's values. Two fields that diffusers
    does not have, `norm_num_groups` and `norm_eps`, apply to every group norm. They are for narrow
    VAEs: norms over one or two channels with a tiny epsilon remove the brightness and contrast of a
    frame, and few channels cannot carry those past the last norm.
    """
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
        AutoencoderKLTemporalDecoder,
    )

    options = {key: value for key, value in config.items() if not key.startswith("_")}
    groups, eps = options.pop("norm_num_groups", None), options.pop("norm_eps", None)
    channels = options.setdefault("block_out_channels", (128, 256, 512, 512))
    options.setdefault("layers_per_block", 2)
    options.setdefault("down_block_types", ("DownEncoderBlock2D",) * len(channels))
    model = AutoencoderKLTemporalDecoder(**options)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups or module.num_groups
            module.eps = eps or module.eps
    speed_up_temporal_convs(model)
    sizes = {field.name: model.config[field.name] for field in fields(SVDGeometry)}
    return VideoVAE(model, SVDGeometry(**sizes))


# SVD's names -> diffusers', applied in order to every key. Names of diffusers do not change.
RENAMES = [
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.0\.)norm\.", r"\1group_norm."),
    (r"(\.attentions\.0\.)([qkv])\.", r"\1to_\2."),
    (r"(\.attentions\.0\.)proj_out\.", r"\1to_out.0."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.conv_out\.time_mix_conv\.", ".time_conv_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (
        r"^(decoder\..*resnets\.\d+\.)((?:norm|conv)[12]|conv_shortcut)\.",
        r"\1spatial_res_block.\2.",
    ),
    (r"\.time_stack\.in_layers\.0\.", ".temporal_res_block.norm1."),
    (r"\.time_stack\.in_layers\.2\.", ".temporal_res_block.conv1."),
    (r"\.time_stack\.out_layers\.0\.", ".temporal_res_block.norm2."),
    (r"\.time_stack\.out_layers\.3\.", ".temporal_res_block.conv2."),
    (r"(resnets\.\d+\.)mix_factor$", r"\1time_mixer.mix_factor"),
]


def in_diffusers_naming(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the VAE's tensors in a file, or in a whole SVD checkpoint, under diffusers' names."""
    tensors = renamed(file, RENAMES)
    for key, tensor in tensors.items():
        if ".attentions." in key and tensor.ndim == 4:  # 1x1 convolutions are linear layers here
            tensors[key] = tensor.flatten(1)
    conv_out = tensors.get("encoder.conv_out.bias")
    if conv_out is not None and "quant_conv.weight" not in tensors:
        # In SVD's file it is folded into the encoder's last layer.
        tensors["quant_conv.weight"] = torch.eye(len(conv_out))[..., None, None]
        tensors["quant_conv.bias"] = torch.zeros(len(conv_out))
    return tensors


def infer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infers diffusers' config fields from the shapes of the weights, in diffusers' naming."""
    resnet = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    levels = count_of(tensors, resnet.format("{}", 0))
    return {
        "block_out_channels": [len(tensors[resnet.format(i, 0)]) for i in range(levels)],
        "layers_per_block": count_of(tensors, resnet.format(0, "{}")),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
    }
