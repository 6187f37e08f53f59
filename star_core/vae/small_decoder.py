"""Small decoders that take the place of a VAE's own: distilled from it, or TAESD's.

`training/decoder.py` distils one for a given VAE. TAESD (Bohan 2023, github.com/madebyollin/taesd)
decodes the latents of Stable Diffusion, which are those of Stable Video Diffusion's VAE too; it
decodes every frame alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.metadata import dataclass_from_json, read_object
from ..checkpoints.tensors import load_into, open_tensors, write_tensors
from ..models.temporal_conv import speed_up_temporal_convs
from .cogvideox import CausalVAEGeometry, CausalVideoVAE
from .frame_vae import FrameGeometry, VideoVAE
from .patch import Residual

METADATA = "star_decoder"  # metadata key of a file for its configuration as JSON
VAE_METADATA = "star_vae"  # the same of a VAE
PREFIX = "small_decoder."  # of its weights in the file of a VAE


@dataclass(frozen=True, kw_only=True)
class SmallDecoderConfig:
    """Sizes of a `SmallDecoder`.

    latent_channels, factor: of the VAE. width: channels of the residual blocks. blocks: their
    number.
    """

    latent_channels: int = 4
    factor: int = 8
    width: int = 64
    blocks: int = 3

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1:
            raise ValueError(f"all sizes of a decoder must be at least 1, got {self}")

    def build(self) -> SmallDecoder:
        """Returns an untrained decoder."""
        return SmallDecoder(self)


class SmallDecoder(nn.Module):
    """Decodes a window of latents; all its layers work at their resolution.

    A linear convolution alone gives a picture, residual blocks refine it, and after each block a
    convolution over three frames mixes them. Before training, only the linear one contributes.
    """

    def __init__(self, config: SmallDecoderConfig) -> None:
        super().__init__()
        self.config = config
        pixels, width = 3 * config.factor**2, config.width
        around: dict[str, Any] = {"padding": 1, "padding_mode": "replicate"}
        self.linear = nn.Conv2d(config.latent_channels, pixels, 3, **around)
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, **around)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(config.blocks))
        self.time = nn.ModuleList(
            nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)) for _ in range(config.blocks)
        )
        self.conv_out = nn.Conv2d(width, pixels, 3, **around)
        speed_up_temporal_convs(self)
        for layer in (self.conv_out, *self.time):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, frames: int) -> Tensor:
        """Returns frames (b·f 3 h·factor w·factor) in [-1, 1] of latents (b·f c h w).

        latents: scaled as the network makes them. frames: f.
        """
        x = self.conv_in(latents)
        for block, time in zip(self.blocks, self.time, strict=True):
            x = block(x)
            clip = rearrange(x, "(b f) c h w -> b c f h w", f=frames)
            x = rearrange(clip + time(clip), "b c f h w -> (b f) c h w")
        return F.pixel_shuffle(self.linear(latents) + self.conv_out(F.relu(x)), self.config.factor)


@dataclass(frozen=True, kw_only=True)
class TaesdConfig:
    """Sizes of a `TaesdDecoder`; the defaults are TAESD's.

    latent_channels: of the VAE. width: channels of all layers.
    """

    latent_channels: int = 4
    width: int = 64
    factor: ClassVar = 8

    def build(self) -> TaesdDecoder:
        """Returns an untrained decoder."""
        return TaesdDecoder(self)


class _TaesdBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, out_channels, 3, padding=1)]
        convolutions += [nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(2)]
        first, second, third = convolutions
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TaesdDecoder(nn.Sequential):
    """The decoder of TAESD: three times three residual blocks and an upsampling by 2.

    Its keys are those of the original file.
    """

    def __init__(self, config: TaesdConfig) -> None:
        width, first = config.width, nn.Conv2d(config.latent_channels, config.width, 3, padding=1)
        layers: list[nn.Module] = [nn.Identity(), first, nn.ReLU()]
        for _ in range(3):
            layers += [_TaesdBlock(width, width) for _ in range(3)]
            layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        layers += [_TaesdBlock(width, width), nn.Conv2d(width, 3, 3, padding=1)]
        super().__init__(*layers)

    def forward(self, latents: Tensor, frames: int = 1) -> Tensor:
        """Returns frames (n 3 8h 8w) in [-1, 1] of scaled latents (n c h w). frames: ignored."""
        return super().forward(torch.tanh(latents / 3) * 3) * 2 - 1


class SmallDecodedModel(nn.Module):
    """A VAE's network that decodes by a small decoder; its own decoder is removed.

    It has the methods of diffusers' AutoencoderKLTemporalDecoder that `VideoVAE` uses, and the
    network's children under their names.
    """

    def __init__(self, model: Any, decoder: SmallDecoder | TaesdDecoder) -> None:
        super().__init__()
        model.decoder = nn.Identity()
        self.config, self._encode = model.config, model.encode
        for name, child in model.named_children():
            self.add_module(name, child)
        self.decoder = decoder

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.decoder.parameters()).dtype

    def encode(self, frames: Tensor, return_dict: bool = False) -> tuple[Any]:
        """Returns (posterior,) of frames (n 3 h w). return_dict: ignored."""
        (posterior,) = self._encode(frames, return_dict=False)
        return (posterior,)

    def decode(self, z: Tensor, num_frames: int, return_dict: bool = False) -> tuple[Tensor]:
        """Returns (frames,) of latents z (b·f c h w) without the scaling factor. num_frames: f."""
        return (self.decoder(z * self.config["scaling_factor"], num_frames),)


@dataclass(frozen=True, kw_only=True)
class SmallDecodedGeometry(FrameGeometry):
    """Sizes of a VAE that decodes by a small decoder in place of its own.

    vae: of the VAE. decoder: of the small decoder.
    """

    vae: FrameGeometry
    decoder: SmallDecoderConfig | TaesdConfig
    latent_channels: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent_channels", self.vae.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent in height and width."""
        return self.vae.factor

    def build(self) -> VideoVAE:
        """Returns a VAE with random weights."""
        vae = self.vae.build()
        _decode_by(vae, self.decoder.build(), self)
        return vae


def with_decoder(
    geometry: FrameGeometry | CausalVAEGeometry, path: str | os.PathLike[str]
) -> SmallDecodedGeometry:
    """Returns the sizes of a VAE that decodes by the small decoder in a file.

    ValueError for a file that holds none or one for other latents, and for a VAE that decodes whole
    clips only.
    """
    if isinstance(geometry, CausalVAEGeometry):
        raise ValueError(
            "the VAE of CogVideoX decodes whole clips only, it takes no small decoder: leave it out"
        )
    if isinstance(geometry, SmallDecodedGeometry):  # from a file that holds one
        geometry = geometry.vae
    config, _ = _open(path)
    if (config.latent_channels, config.factor) != (geometry.latent_channels, geometry.factor):
        raise ValueError(
            f"{path} decodes latents of {config.latent_channels} channels, {config.factor} pixels "
            f"wide; the VAE's have {geometry.latent_channels} and {geometry.factor}: choose the "
            "decoder that was made for it"
        )
    return SmallDecodedGeometry(vae=geometry, decoder=config)


def use_decoder(vae: VideoVAE | CausalVideoVAE, path: str | os.PathLike[str]) -> None:
    """Makes a VAE decode by the small decoder in a file, in place.

    ValueError for a file that holds none or one for other latents, and for a VAE that decodes whole
    clips only.
    """
    geometry = with_decoder(vae.geometry, path)
    assert isinstance(vae, VideoVAE)
    decoder = load_decoder(path, device=vae.model.device, dtype=vae.model.dtype)
    _decode_by(vae, decoder, geometry)


def _decode_by(
    vae: VideoVAE, decoder: SmallDecoder | TaesdDecoder, geometry: SmallDecodedGeometry
) -> None:
    vae.geometry = geometry
    if isinstance(vae.model, SmallDecodedModel):
        vae.model.decoder = decoder
    else:
        vae.model = SmallDecodedModel(vae.model, decoder).eval().requires_grad_(False)


def load_decoder(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SmallDecoder | TaesdDecoder:
    """Loads a small decoder.

    path: a file of `save_decoder` or `save_with_decoder`, or one of TAESD in the original naming
    (taesd_decoder) or in diffusers' (AutoencoderTiny). ValueError for any other file.
    """
    config, tensors = _open(path)
    with torch.device("meta"):
        decoder = config.build()
    load_into(decoder, tensors, device=device, dtype=dtype, name=str(path))
    return decoder.eval().requires_grad_(False)


def _open(
    path: str | os.PathLike[str],
) -> tuple[SmallDecoderConfig | TaesdConfig, dict[str, Tensor]]:
    """Returns the sizes and the weights of the decoder in a file; ValueError if it holds none."""
    file = open_tensors(path)
    if METADATA in file.metadata:
        held = [key for key in file if key.startswith(PREFIX)]
        tensors = {key.removeprefix(PREFIX): file[key] for key in held or file}
        where = f"{path}, {METADATA}"
        content = read_object(file.metadata[METADATA], where)
        return dataclass_from_json(SmallDecoderConfig, content, where), tensors
    tensors = _taesd(file)
    if "1.weight" not in tensors or "19.weight" not in tensors:
        raise ValueError(
            f"{path} holds no small decoder: choose a file of `train --trains decoder`, or of TAESD"
        )
    width, channels = tensors["1.weight"].shape[:2]
    return TaesdConfig(latent_channels=channels, width=width), tensors


def _taesd(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of TAESD's decoder under the original names."""
    prefix = "decoder.layers."
    if not any(key.startswith(prefix) for key in file):
        return {key.removeprefix("taesd_decoder."): tensor for key, tensor in file.items()}
    # The original counts the clamp in front.
    return {
        re.sub(r"^\d+", lambda match: str(int(match[0]) + 1), key.removeprefix(prefix)): tensor
        for key, tensor in file.items()
        if key.startswith(prefix)
    }


def save_decoder(
    path: str | os.PathLike[str],
    decoder: SmallDecoder,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a decoder in float16, as a safetensors file that describes itself.

    metadata: further text. ValueError if the file exists while `overwrite` is off.
    """
    write_tensors(
        path,
        decoder.state_dict(),
        dtype=torch.float16,
        metadata={**(metadata or {}), METADATA: json.dumps(asdict(decoder.config))},
        overwrite=overwrite,
    )


def save_with_decoder(
    path: str | os.PathLike[str],
    vae_file: str | os.PathLike[str],
    decoder: SmallDecoder,
    *,
    overwrite: bool = False,
) -> None:
    """Writes the file of a VAE with a small decoder in it, by which `load_vae` lets it decode.

    The VAE's own weights stay as they are. ValueError if `path` exists while `overwrite` is off.
    """
    file = open_tensors(vae_file)
    tensors = {key: tensor for key, tensor in file.items() if not key.startswith(PREFIX)}
    small = {PREFIX + key: tensor.half() for key, tensor in decoder.state_dict().items()}
    metadata = {key: text for key, text in file.metadata.items() if key != "format"}
    config_file = Path(vae_file).with_name("config.json")
    if config_file.is_file() and VAE_METADATA not in metadata:
        metadata[VAE_METADATA] = config_file.read_text(encoding="utf-8")
    metadata[METADATA] = json.dumps(asdict(decoder.config))
    write_tensors(path, tensors | small, metadata=metadata, overwrite=overwrite)
