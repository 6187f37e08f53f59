"""The VAE of CogVideoX, causal in time: one latent frame for the first frame, then one for four.

The network is diffusers' AutoencoderKLCogVideoX (Yang et al. 2024, arXiv:2408.06072);
specification of the second backbone, section 7. This module adds files in either naming, whole
windows of frames, and spatial tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..devices import send
from ..windows.canvas import FrameSpan
from ..windows.chunking import cut_to, filled_to
from ..windows.tiling import Tile, tiled
from . import cogvideox_frames
from .block_geometry import BlockGeometry
from .naming import count_of, renamed

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

OVERLAP = 64  # pixels that neighbouring tiles share


@dataclass(frozen=True, kw_only=True)
class CausalVAEGeometry(BlockGeometry):
    """Sizes of the VAE under diffusers' names; the defaults are the published ones.

    sample_height, sample_width: size of the frames that it was trained on.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    latent_channels: int = 16
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720

    @property
    def latent_frames(self) -> int:
        """Video frames per latent frame; the first latent frame is always a single frame."""
        return self.temporal_compression_ratio

    def build(self) -> CausalVideoVAE:
        """Returns a VAE with random weights."""
        return causal_vae(asdict(self))

    def tile(self, tile: Tile | None) -> tuple[Tile, Tile]:
        """Returns the tiles of rows and of columns, at most as large as the trained frames.

        tile: in pixels, None for the trained size.
        """
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
        """Returns the rows and the columns, in latents, of the tiles of a frame.

        sides: (height, width) of the frame in pixels. tile: in pixels, None for the trained size.
        """
        rows, columns = (
            each.windows(side // self.factor, self.factor)
            for each, side in zip(self.tile(tile), sides, strict=True)
        )
        return rows, columns

    def encoded(self, span: FrameSpan, *, hold: bool) -> list[int]:
        """Returns the number of frames in each call of the encoder for a span.

        hold: see `ChunkConfig`; True encodes the frames that a group shares with the previous one
        once more.
        """
        windows = [filled_to(len(group.frames), self.latent_frames) for group in span.groups]
        shared = [group.shared for group in span.groups if group.shared and hold]
        return windows + [cut_to(frames, self.latent_frames) for frames in shared]


class CausalVideoVAE:
    """Encodes windows of video in [-1, 1] to latents and decodes them, both (b c f h w), float32.

    4k+1 frames become k+1 latent frames, the first of which is a single frame, so latents of
    different windows cannot be concatenated. Frames larger than the trained size are computed in
    blended tiles of that size.
    """

    def __init__(self, model: AutoencoderKLCogVideoX) -> None:
        """model: the network; its dtype is that of the computation."""
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
        """Returns the latents (b c 1+k h/8 w/8) of a window (b 3 1+4k h w).

        Norms use statistics of the whole window, as in the reference.
        noise: normal noise of the latents' shape, for a sample of the posterior; None for its mean.
        tile: smaller tiles than the trained size, in pixels.
        Raises ValueError for other numbers of frames and for sides that are no multiples of 8.
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
            latents = latents + std * send(noise, std.device, std.dtype)
        return latents * self.scaling_factor

    def _moments(self, video: Tensor) -> Tensor:
        video = send(video, self.model.device, self.model.dtype)
        if torch.is_grad_enabled():
            self.model.num_sample_frames_batch_size = video.shape[2]
            (posterior,) = self.model.encode(video, return_dict=False)
            return posterior.parameters.float()
        return cogvideox_frames.encode(self.model.encoder, video).float()

    def decode(self, latents: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Returns the video (b 3 1+4k h w) of the latents (b c 1+k h/8 w/8) of a window.

        It is decoded in groups of two latent frames, the first of three, as in training. Values may
        leave [-1, 1] a little. tile: smaller tiles than the trained size, in pixels.
        """
        frames = (latents.shape[2] - 1) * self.latent_frames + 1
        # Of an even number, the decoder would expand the first latent frame to four frames.
        if latents.shape[2] % 2 == 0:
            latents = torch.cat([latents, latents[:, :, -1:]], dim=2)
        tiles = self.geometry.tile(tile)
        video = tiled(self._decode, latents, tiles, unit_in=1, unit_out=self.factor)
        return video[:, :, :frames]

    decode_window = decode  # a clip is one window

    def _decode(self, latents: Tensor) -> Tensor:
        z = send(latents / self.scaling_factor, self.model.device, self.model.dtype)
        if torch.is_grad_enabled():
            (video,) = self.model.decode(z, return_dict=False)
            return video.float()
        cache: cogvideox_frames.Cache = {}
        groups = [z[:, :, group.start : group.stop] for group in decode_groups(z.shape[2])]
        decoder = self.model.decoder
        videos = [cogvideox_frames.decode(decoder, group, cache).float() for group in groups]
        return torch.cat(videos, dim=2)


def decode_groups(latent_frames: int) -> list[range]:
    """Returns the groups that an odd number of latent frames is decoded in: 3, then 2 at a time."""
    if latent_frames == 1:
        return [range(1)]
    return [range(0, 3), *(range(i, i + 2) for i in range(3, latent_frames, 2))]


def causal_vae(config: Mapping[str, Any]) -> CausalVideoVAE:
    """Returns a VAE with random weights.

    config: fields of diffusers' config; missing ones take the published values.
    """
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    fields.setdefault("scaling_factor", 0.7)
    channels = fields.setdefault("block_out_channels", (128, 256, 256, 512))
    fields.setdefault("down_block_types", ("CogVideoXDownBlock3D",) * len(channels))
    fields.setdefault("up_block_types", ("CogVideoXUpBlock3D",) * len(channels))
    return CausalVideoVAE(AutoencoderKLCogVideoX(**fields))


# SAT's names -> diffusers', applied in order to every key. Names of diffusers do not change.
RENAMES = [
    (r"^(en|de)coder\.mid\.block_1\.", r"\1coder.mid_block.resnets.0."),
    (r"^(en|de)coder\.mid\.block_2\.", r"\1coder.mid_block.resnets.1."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^(decoder\.up_blocks\.\d+\.)block\.", r"\1resnets."),
    (r"^(decoder\.up_blocks\.\d+\.)upsample\.", r"\1upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
]


def in_diffusers_naming(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the VAE's tensors in a file under diffusers' names, without the discriminator."""
    tensors = renamed(file, RENAMES)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("loss")}


def infer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infers diffusers' config fields from the shapes of the weights, in diffusers' naming."""
    resnet = "encoder.down_blocks.{}.resnets.{}.conv1.conv.weight"
    levels = count_of(tensors, resnet.format("{}", 0))
    return {
        "block_out_channels": [len(tensors[resnet.format(i, 0)]) for i in range(levels)],
        "layers_per_block": count_of(tensors, resnet.format(0, "{}")),
        "latent_channels": tensors["decoder.conv_in.conv.weight"].shape[1],
    }
