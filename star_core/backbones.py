"""The networks of both backbones behind one face: what a file holds, its size, building it.

A backbone is chosen by what is in a file, here and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from .checkpoints.kinds import (
    CLIP_OPEN_CLIP,
    CLIP_TRANSFORMERS,
    STABLE_DIFFUSION_2,
    STAR_COGVIDEOX,
    STAR_I2VGENXL,
    SVD,
    T5,
    VAE_COGVIDEOX,
    VAE_DIFFUSERS,
    VAE_PATCH,
    VAE_SVD,
    FileKind,
    identify,
)
from .models import cogvideox_weights
from .models.cogvideox_weights import COGVIDEOX_2B, CogVideoXConfig
from .models.unet import ControlledVideoUNet, UNetConfig
from .parity import COGVIDEOX_REFERENCE, REFERENCE, Behaviour
from .sampling_defaults import (
    COGVIDEOX_2B_LATENTS,
    COGVIDEOX_2B_SAMPLING,
    COGVIDEOX_LATENTS,
    COGVIDEOX_SAMPLING,
    SD_LATENTS,
    LatentFormat,
    SamplingDefaults,
)
from .text.prompts import STAR_PROMPTS, PromptDefaults
from .vae.cogvideox import CausalVAEGeometry
from .vae.frame_vae import FrameGeometry
from .vae.svd import SVDGeometry

if TYPE_CHECKING:
    from .models.cogvideox_dit import CogVideoXDiT

logger = logging.getLogger(__name__)

NetworkConfig = Union[UNetConfig, CogVideoXConfig]  # noqa: UP007
Network = Union[ControlledVideoUNet, "CogVideoXDiT"]
Geometry = Union[FrameGeometry, CausalVAEGeometry]  # noqa: UP007


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What code needs to know to have a backbone's networks.

    name: in the metadata of files and of `config`, the class that states a size. kind: of its
    published files. infer: the size from the tensors of a file that does not state it. weights: a
    file's tensors under the network's names. published: how a network of that size is used where
    its file does not say. vae, text_encoder: kinds of the other files that it needs. geometry: of
    the published VAE. text_parameters, text_dtype: how many the text encoder has, and what they
    are; None where they are as the rest. prompts: where the user gives none. reference: what the
    original does.
    """

    name: str
    kind: FileKind
    config: type[NetworkConfig]
    infer: Callable[[Mapping[str, Tensor]], NetworkConfig]
    weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    published: Callable[[NetworkConfig], tuple[SamplingDefaults, LatentFormat]]
    vae: tuple[FileKind, ...]
    text_encoder: tuple[FileKind, ...]
    geometry: Geometry
    text_parameters: int
    text_dtype: torch.dtype | None
    prompts: PromptDefaults
    reference: Behaviour


def build_network(config: NetworkConfig, **options: Any) -> Network:
    """A network of a size. options: operations, attention, device, dtype, as its class says."""
    if isinstance(config, UNetConfig):
        return ControlledVideoUNet(config, **options)
    # Not at the top: diffusers takes seconds to import, and the other backbone does without.
    from .models.cogvideox_dit import CogVideoXDiT

    return CogVideoXDiT(config, **options)


def infer_unet(tensors: Mapping[str, Tensor]) -> UNetConfig:
    """Configuration of a UNet whose file does not state it, from the shapes of its weights.

    What shapes do not tell (head_dim, norm_groups, dropout) is as published. Where the keys that
    tell it are missing, the published size is returned: comparing with it says what is wrong.
    """
    levels: list[list[int]] = [[]]  # of each resolution, the indices of its blocks
    for index in count(1):
        if f"input_blocks.{index}.op.weight" in tensors:
            levels.append([])
        elif f"input_blocks.{index}.0.out_layers.3.weight" in tensors:
            levels[-1].append(index)
        else:
            break
    try:
        dim, in_dim = tensors["input_blocks.0.0.weight"].shape[:2]
        widths = [
            tensors[f"input_blocks.{blocks[0]}.0.out_layers.3.weight"].shape[0] for blocks in levels
        ]
        inner = tensors["input_blocks.0.1.proj_in.weight"].shape[0]
        if any(size % UNetConfig.head_dim for size in (inner, *widths)):
            return UNetConfig()
        return UNetConfig(
            in_dim=in_dim,
            out_dim=tensors["out.2.weight"].shape[0],
            dim=dim,
            context_dim=tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            dim_mult=tuple(width // dim for width in widths),
            num_heads=inner // UNetConfig.head_dim,
            num_res_blocks=len(levels[0]),
            attn_scales=tuple(
                0.5**level
                for level, blocks in enumerate(levels)
                if f"input_blocks.{blocks[0]}.1.norm.weight" in tensors
            ),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return UNetConfig()


def _cogvideox_published(config: NetworkConfig) -> tuple[SamplingDefaults, LatentFormat]:
    if isinstance(config, CogVideoXConfig) and config.positions == "sincos":
        logger.warning(
            "This network has the size of CogVideoX-2B. With which schedule and latents STAR "
            "trained it is unknown: those of CogVideoX-2B are taken (shift %g, latent scale %g). "
            "Write the file again with `convert --shift 1 --latent-scale 0.7` to try those of 5B.",
            COGVIDEOX_2B_SAMPLING.shift,
            COGVIDEOX_2B_LATENTS.scale,
        )
        return COGVIDEOX_2B_SAMPLING, COGVIDEOX_2B_LATENTS
    return COGVIDEOX_SAMPLING, COGVIDEOX_LATENTS


I2VGENXL = Backbone(
    name="i2vgenxl",
    kind=STAR_I2VGENXL,
    config=UNetConfig,
    infer=infer_unet,
    weights=lambda file: file,
    published=lambda config: (SamplingDefaults(), SD_LATENTS),
    vae=(VAE_DIFFUSERS, VAE_PATCH, VAE_SVD, SVD),
    text_encoder=(CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, STABLE_DIFFUSION_2),
    geometry=SVDGeometry(),
    text_parameters=354_032_641,  # of OpenCLIP ViT-H-14's text half
    text_dtype=None,
    prompts=STAR_PROMPTS,
    reference=REFERENCE,
)
COGVIDEOX = Backbone(
    name="cogvideox",
    kind=STAR_COGVIDEOX,
    config=CogVideoXConfig,
    infer=cogvideox_weights.infer_config,
    weights=cogvideox_weights.in_diffusers_naming,
    published=_cogvideox_published,
    vae=(VAE_COGVIDEOX,),
    text_encoder=(T5,),
    geometry=CausalVAEGeometry(),
    text_parameters=4_762_310_656,  # of t5-v1_1-xxl's encoder
    text_dtype=torch.bfloat16,
    prompts=PromptDefaults(prompt="", positive="", negative=None, caption_dropout=0.1),
    reference=COGVIDEOX_REFERENCE,
)
BACKBONES = {backbone.name: backbone for backbone in (I2VGENXL, COGVIDEOX)}
SIZES: dict[str, NetworkConfig] = {
    "i2vgenxl": UNetConfig(),
    "cogvideox-5b": CogVideoXConfig(),
    "cogvideox-2b": COGVIDEOX_2B,
}


def backbone_of(what: NetworkConfig | Mapping[str, Tensor]) -> Backbone:
    """The backbone of a size, or of a file's tensors; I2VGen-XL where these tell nothing."""
    if isinstance(what, Mapping):
        kind = identify(what)
        return next((b for b in BACKBONES.values() if b.kind is kind), I2VGENXL)
    return BACKBONES[what.backbone]
