"""The differences between both backbones as data: files, sizes, defaults, how to build networks.

Only this module decides which backbone a file's network has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, Union

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
from .devices import supports
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


class Precision(NamedTuple):
    """The types in which the parts of a model compute."""

    network: torch.dtype
    vae: torch.dtype
    text: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A family of networks.

    name: in the metadata of files and in `config.backbone`. kind: that of its published files.
    config: the class of a network's size. build: creates a network from a config, see
    `build_network`. infer: returns the config from the tensors of a file that does not state it.
    weights: returns a file's tensors under the network's names. published: returns the sampling
    defaults and latent format of a network whose file does not state them. has_shift: whether its
    noise schedule has a shift; `conversion.convert` can then store a shift and a latent scale.
    vae, text_encoder: kinds of the other files that it needs. geometry: of the published VAE.
    text_parameters: how many the text encoder has. network_dtype, vae_dtype: types in which the
    original computes on a GPU. text_dtype: type of the text encoder on every device.
    prompts: used where the user gives none. reference: how the original implementation behaves.
    """

    name: str
    kind: FileKind
    config: type[NetworkConfig]
    build: Callable[..., Network]
    infer: Callable[[Mapping[str, Tensor]], NetworkConfig]
    weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    published: Callable[[Any], tuple[SamplingDefaults, LatentFormat]]
    has_shift: bool
    vae: tuple[FileKind, ...]
    text_encoder: tuple[FileKind, ...]
    geometry: Geometry
    text_parameters: int
    network_dtype: torch.dtype
    vae_dtype: torch.dtype
    text_dtype: torch.dtype
    prompts: PromptDefaults
    reference: Behaviour

    def precision(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Precision:
        """Returns the type of each part on a device.

        dtype: of the network, None for the backbone's own on a GPU and float32 on a CPU. The VAE
        gets it too, except for float16, which overflows in some VAEs, and for types that the device
        does not support.
        """
        if dtype is None and torch.device(device).type == "cpu":
            dtype = torch.float32
        network, vae = dtype or self.network_dtype, dtype or self.vae_dtype
        if dtype is None and not supports(device, network):
            network = torch.float16
        if vae == torch.float16:
            vae = self.vae_dtype
        if not supports(device, vae):
            vae = torch.float32
        return Precision(network=network, vae=vae, text=self.text_dtype)


def build_network(config: NetworkConfig, **options: Any) -> Network:
    """Creates a network with random weights.

    options: the keyword arguments of its class: operations (torch.nn or a host's layers), attention
    (see `models.attention`), device ("meta" if the weights come from a file) and dtype.
    """
    return backbone_of(config).build(config, **options)


def _build_cogvideox(config: CogVideoXConfig, **options: Any) -> Network:
    # Not at the top: diffusers takes seconds to import, and the other backbone does not need it.
    from .models.cogvideox_dit import CogVideoXDiT

    return CogVideoXDiT(config, **options)


def infer_unet(tensors: Mapping[str, Tensor]) -> UNetConfig:
    """Returns the config of a UNet whose file does not state it, from the shapes of its weights.

    Fields that shapes do not determine (head_dim, norm_groups, dropout) are as published. Where
    the necessary keys are missing, the published config is returned, and comparing the file with
    it shows what is wrong.
    """
    levels: list[list[int]] = [[]]  # for each resolution, the indices of its blocks
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


def _cogvideox_published(config: CogVideoXConfig) -> tuple[SamplingDefaults, LatentFormat]:
    if config.positions == "sincos":
        logger.warning(
            "This network has the size of CogVideoX-2B. The schedule and latents with which STAR "
            "trained it are unknown: those of CogVideoX-2B are used (shift %g, latent scale %g). "
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
    build=ControlledVideoUNet,
    infer=infer_unet,
    weights=lambda file: file,
    published=lambda config: (SamplingDefaults(), SD_LATENTS),
    has_shift=False,
    vae=(VAE_DIFFUSERS, VAE_PATCH, VAE_SVD, SVD),
    text_encoder=(CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, STABLE_DIFFUSION_2),
    geometry=SVDGeometry(),
    text_parameters=354_032_641,  # OpenCLIP ViT-H-14, text encoder only
    network_dtype=torch.float16,
    vae_dtype=torch.float32,
    text_dtype=torch.float32,
    prompts=STAR_PROMPTS,
    reference=REFERENCE,
)
COGVIDEOX = Backbone(
    name="cogvideox",
    kind=STAR_COGVIDEOX,
    config=CogVideoXConfig,
    build=_build_cogvideox,
    infer=cogvideox_weights.infer_config,
    weights=cogvideox_weights.in_diffusers_naming,
    published=_cogvideox_published,
    has_shift=True,
    vae=(VAE_COGVIDEOX,),
    text_encoder=(T5,),
    geometry=CausalVAEGeometry(),
    text_parameters=4_762_310_656,  # t5-v1_1-xxl, encoder only
    network_dtype=torch.bfloat16,
    vae_dtype=torch.bfloat16,
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


def backbone_of(config: NetworkConfig) -> Backbone:
    """Returns the backbone to which a config belongs."""
    return BACKBONES[config.backbone]


def identify_backbone(tensors: Mapping[str, Tensor]) -> Backbone:
    """Returns the backbone of a file's tensors by their keys; I2VGen-XL if they do not tell."""
    kind = identify(tensors)
    return next((b for b in BACKBONES.values() if b.kind is kind), I2VGENXL)
