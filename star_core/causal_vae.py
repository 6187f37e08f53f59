"""The VAE of CogVideoX: causal in time, the first frame alone and then four in one.

The network is diffusers' AutoencoderKLCogVideoX (Yang et al. 2024, arXiv:2408.06072);
specification of the second backbone, section 7. What is here: files in either naming, whole
windows of frames, spatial tiles.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .canvas import Part
from .chunking import cut_to, filled_to
from .known_files import VAE_COGVIDEOX, identify
from .models import causal_frames
from .tensor_files import TensorFile, load_into, open_tensors
from .tiling import Tile, tiled
from .vae import PatchVAEGeometry, VAEGeometry, VideoVAE, load_vae
from .vae import geometry_of as svd_geometry_of

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

OVERLAP = 64  # pixels that neighbouring tiles share


@dataclass(frozen=True, kw_only=True)
class CausalVAEGeometry:
    """What it takes to build the VAE, as diffusers names it; the defaults are as published.

    sample_height, sample_width: of the frames that it was trained on.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    latent_channels: int = 16
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))

    @property
    def factor(self) -> int:
        """By how much latents are smaller than the frame."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latent_frames(self) -> int:
        """Frames of the video that one of latents holds."""
        return self.temporal_compression_ratio

    def build(self) -> CausalVideoVAE:
        """A VAE with random weights."""
        return causal_vae_from_config(asdict(self))

    def tile(self, tile: Tile | None) -> tuple[Tile, Tile]:
        """High and wide at most as it was trained; of `tile` where that is smaller."""
        rows, columns = (
            min(trained, tile.size) if tile else trained
            for trained in (self.sample_height, self.sample_width)
        )
        overlap = tile.overlap if tile else OVERLAP
        return (
            Tile(size=rows, overlap=min(overlap, rows // 2)),
            Tile(size=columns, overlap=min(overlap, columns // 2)),
        )

    def tiles(self, sides: tuple[int, int], tile: Tile | None) -> tuple[list[range], list[range]]:
        """Rows and columns, in latents, of frames (height, width) that are worked on together."""
        rows, columns = (
            each.windows(side // self.factor, self.factor)
            for each, side in zip(self.tile(tile), sides, strict=True)
        )
        return rows, columns

    def encoded(self, part: Part, *, hold: bool) -> list[int]:
        """How many frames are encoded together, each time: windows, and what they hold."""
        windows = [filled_to(len(piece.frames), self.latent_frames) for piece in part.pieces]
        shared = [piece.shared for piece in part.pieces if piece.shared and hold]
        return windows + [cut_to(frames, self.latent_frames) for frames in shared]


class CausalVideoVAE:
    """Windows of video in [-1, 1] to latents and back, both (b c f h w), float32.

    4k+1 frames are k+1 latent frames, of which the first holds one frame: latents of different
    windows cannot be put together. Frames larger than the trained size are worked on in tiles of
    it, blended; `tile`: smaller ones. model: the torch module; its dtype is the one computed in.
    """

    def __init__(self, model: AutoencoderKLCogVideoX) -> None:
        self.model = model
        names = [field.name for field in fields(CausalVAEGeometry)]
        self.geometry = CausalVAEGeometry(**{name: model.config[name] for name in names})
        self.factor, self.latent_frames = self.geometry.factor, self.geometry.latent_frames
        self.latent_channels: int = model.config["latent_channels"]
        self.scaling_factor: float = model.config["scaling_factor"]

    def encode(
        self,
        video: Tensor,
        *,
        noise: Tensor | None = None,
        tile: Tile | None = None,
    ) -> Tensor:
        """Latents (b c 1+k h/8 w/8) of a window (b 3 1+4k h w).

        Its norms know of the whole window, as in the reference. noise: normal noise of the latents'
        shape for a sample of the posterior; None for its mean. ValueError for other sizes.
        """
        f, *sides = video.shape[2:]
        if (f - 1) % self.latent_frames or any(side % self.factor for side in sides):
            raise ValueError(
                f"the VAE takes 4k+1 frames whose width and height are multiples of {self.factor}, "
                f"got {f} frames {sides[1]}x{sides[0]}: pad them first"
            )
        tiles = self.geometry.tile(tile)
        moments = tiled(self._moments, video, tiles, unit_in=self.factor, unit_out=1)
        latents, log_variance = moments.chunk(2, dim=1)
        if noise is not None:
            std = (0.5 * log_variance.clamp(-30, 20)).exp()
            latents = latents + std * noise.to(std)
        return latents * self.scaling_factor

    def _moments(self, video: Tensor) -> Tensor:
        video = video.to(self.model.device, self.model.dtype)
        if torch.is_grad_enabled():
            self.model.num_sample_frames_batch_size = video.shape[2]
            (posterior,) = self.model.encode(video, return_dict=False)
            return posterior.parameters.float()
        return causal_frames.encode(self.model.encoder, video).float()

    def decode(self, latents: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Video (b 3 1+4k h w) of the latents (b c 1+k h/8 w/8) of a window.

        Two latent frames at a time, the first time three, as the network was trained. An even
        number of them is filled up, because its decoder would take the first for four frames.
        Values may leave [-1, 1] a little.
        """
        frames = (latents.shape[2] - 1) * self.latent_frames + 1
        if latents.shape[2] % 2 == 0:
            latents = torch.cat([latents, latents[:, :, -1:]], dim=2)
        tiles = self.geometry.tile(tile)
        video = tiled(self._decode, latents, tiles, unit_in=1, unit_out=self.factor)
        return video[:, :, :frames]

    decode_window = decode  # a clip is one window

    def _decode(self, latents: Tensor) -> Tensor:
        z = (latents / self.scaling_factor).to(self.model.device, self.model.dtype)
        if torch.is_grad_enabled():
            (video,) = self.model.decode(z, return_dict=False)
            return video.float()
        cache: causal_frames.Cache = {}
        groups = [z[:, :, group.start : group.stop] for group in decode_groups(z.shape[2])]
        decoder = self.model.decoder
        videos = [causal_frames.decode(decoder, group, cache).float() for group in groups]
        return torch.cat(videos, dim=2)


def decode_groups(latent_frames: int) -> list[range]:
    """Latent frames that the decoder sees together, of an odd number: 3, then 2 at a time."""
    if latent_frames == 1:
        return [range(1)]
    return [range(0, 3), *(range(i, i + 2) for i in range(3, latent_frames, 2))]


def causal_vae_from_config(config: Mapping[str, Any]) -> CausalVideoVAE:
    """A VAE with random weights from diffusers' config fields; those left out are the published."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    fields.setdefault("scaling_factor", 0.7)
    channels = fields.setdefault("block_out_channels", (128, 256, 256, 512))
    fields.setdefault("down_block_types", ("CogVideoXDownBlock3D",) * len(channels))
    fields.setdefault("up_block_types", ("CogVideoXUpBlock3D",) * len(channels))
    return CausalVideoVAE(AutoencoderKLCogVideoX(**fields))


def load_causal_vae(
    file: TensorFile,
    config: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CausalVideoVAE:
    """Load a VAE in diffusers' naming or SAT's (alone or among a whole model's weights).

    config: of diffusers' config.json; None to take the file's (metadata, JSON under `star_vae`) or
    to infer it from the shapes. ValueError for a file that is no such VAE.
    """
    tensors = in_diffusers_naming(file)
    with torch.device("meta"):
        vae = causal_vae_from_config(_config(file, tensors, config))
    load_into(vae.model, tensors, device=device, dtype=dtype, name=str(file.path))
    vae.model.eval().requires_grad_(False)
    return vae


def open_vae(
    path: str | os.PathLike[str],
    *,
    scale: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoVAE | CausalVideoVAE:
    """Load the VAE of either backbone, from a file or from diffusers' folder.

    scale: of the latents, for a file of CogVideoX's that does not state it. ValueError as in
    `vae.load_vae` for what is no VAE.
    """
    found = _open(path)
    if found is None:
        return load_vae(path, device=device, dtype=dtype)
    file, stated = found
    vae = load_causal_vae(file, stated, device=device, dtype=dtype)
    if scale is not None and not stated and "star_vae" not in file.metadata:
        vae.scaling_factor = scale
    return vae


def geometry_of(path: str | os.PathLike[str]) -> VAEGeometry | PatchVAEGeometry | CausalVAEGeometry:
    """Of the file or folder of either backbone's VAE, which is not loaded."""
    found = _open(path)
    if found is None:
        return svd_geometry_of(path)
    file, stated = found
    with torch.device("meta"):
        return causal_vae_from_config(_config(file, in_diffusers_naming(file), stated)).geometry


def _open(path: str | os.PathLike[str]) -> tuple[TensorFile, dict[str, Any] | None] | None:
    """The weights and what config.json beside them says; None for no VAE of CogVideoX's."""
    weights = vae_file(path)
    if weights.is_dir() or identify(file := open_tensors(weights)) is not VAE_COGVIDEOX:
        return None
    config, stated = weights.with_name("config.json"), {}
    if config.is_file():
        stated = json.loads(config.read_text(encoding="utf-8"))
    return file, stated if stated.get("_class_name") == "AutoencoderKLCogVideoX" else None


def _config(
    file: TensorFile, tensors: Mapping[str, Tensor], stated: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    known = stated or json.loads(file.metadata.get("star_vae", "null"))
    return known or inferred_config(tensors)


def vae_file(path: str | os.PathLike[str]) -> Path:
    """The weights in diffusers' folder (the VAE's own or the one above `vae`), or the file."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    names = [f"diffusion_pytorch_model.{end}" for end in ("safetensors", "bin")]
    places = [inner / name for inner in (folder / "vae", folder) for name in names]
    return next((place for place in places if place.is_file()), folder)


# SAT's names -> diffusers'. Applied in order to every key; diffusers' own pass unchanged.
_RENAMES = [
    (r"^(en|de)coder\.mid\.block_1\.", r"\1coder.mid_block.resnets.0."),
    (r"^(en|de)coder\.mid\.block_2\.", r"\1coder.mid_block.resnets.1."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^(decoder\.up_blocks\.\d+\.)block\.", r"\1resnets."),
    (r"^(decoder\.up_blocks\.\d+\.)upsample\.", r"\1upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
]


def in_diffusers_naming(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's tensors, without the discriminator that its training used."""
    prefix = "first_stage_model."
    if any(key.startswith(prefix) for key in file):
        file = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
    file = {key: tensor for key, tensor in file.items() if not key.startswith("loss")}
    levels = len({key.split(".")[2] for key in file if key.startswith("decoder.up.")})

    def renamed(key: str) -> str:
        # SAT counts the decoder's blocks from the fine end, diffusers from the coarse one.
        key = re.sub(
            r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", key
        )
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        return key

    return {renamed(key): tensor for key, tensor in file.items()}


def inferred_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def number_of(pattern: str) -> int:
        return next(i for i in count() if pattern.format(i) not in tensors)

    resnet = "encoder.down_blocks.{}.resnets.{}.conv1.conv.weight"
    levels = number_of(resnet.format("{}", 0))
    return {
        "block_out_channels": [len(tensors[resnet.format(i, 0)]) for i in range(levels)],
        "layers_per_block": number_of(resnet.format(0, "{}")),
        "latent_channels": tensors["decoder.conv_in.conv.weight"].shape[1],
    }
