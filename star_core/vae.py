"""The VAE of Stable Video Diffusion: frames encoded one by one, decoded with their neighbours.

The network is diffusers' AutoencoderKLTemporalDecoder (Blattmann et al. 2023); specification,
section 5. What is here: files in either naming, spatial tiles, temporal windows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from .canvas import Part
from .chunking import adjacent_or_overlapping, window_weights
from .known_files import VAE_PATCH, identify
from .models.patch_vae import PatchVAE
from .models.temporal_conv import speed_up_temporal_convs
from .tensor_files import load_into, open_tensors
from .tiling import Tile, tiled

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
        AutoencoderKLTemporalDecoder,
    )


@dataclass(frozen=True, kw_only=True)
class VAEGeometry:
    """What shapes tell of a VAE, as diffusers names it; the defaults are those of SVD."""

    latent_frames: ClassVar = 1  # frames of the video that one of latents holds

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))

    @property
    def factor(self) -> int:
        """By how much latents are smaller than the frame."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def finest_channels(self) -> int:
        """Of the layers that work at the frame's size."""
        return self.block_out_channels[0]

    def build(self) -> VideoVAE:
        """A VAE with random weights."""
        return vae_from_config(asdict(self))

    def tiles(self, sides: tuple[int, int], tile: Tile | None) -> tuple[list[range], list[range]]:
        """Rows and columns, in latents, of frames (height, width) that are worked on together."""
        height, width = (side // self.factor for side in sides)
        if tile is None:
            return [range(height)], [range(width)]
        return tile.windows(height, self.factor), tile.windows(width, self.factor)

    def encoded(self, part: Part, *, hold: bool) -> list[int]:
        """How many frames are encoded together, each time."""
        return [1] * len(part.needed)


@dataclass(frozen=True, kw_only=True)
class PatchVAEGeometry:
    """Of a `PatchVAE`; the defaults are those of the built-in model."""

    latent_frames: ClassVar = 1

    patch: int = 4
    latent_channels: int = 32
    width: int = 64
    encoder_blocks: int = 2
    decoder_blocks: int = 3

    tiles, encoded = VAEGeometry.tiles, VAEGeometry.encoded

    @property
    def factor(self) -> int:
        """By how much latents are smaller than the frame."""
        return self.patch

    @property
    def finest_channels(self) -> int:
        """What the layers hold of each pixel."""
        return 1 + self.width // self.patch**2

    def build(self) -> VideoVAE:
        """A VAE with random weights."""
        return vae_from_config(asdict(self))


class VideoVAE:
    """Video in [-1, 1] to latents and back, both (b c f h w), float32 on the model's device.

    model: the torch module; its dtype is the one computed in. Gradients flow unless the caller
    switches them off.
    """

    latent_frames = VAEGeometry.latent_frames

    def __init__(self, model: AutoencoderKLTemporalDecoder | PatchVAE) -> None:
        self.model = model
        self.factor: int = self.geometry.factor
        self.latent_channels: int = model.config["latent_channels"]
        self.scaling_factor: float = model.config["scaling_factor"]

    @property
    def geometry(self) -> VAEGeometry | PatchVAEGeometry:
        kind = PatchVAEGeometry if isinstance(self.model, PatchVAE) else VAEGeometry
        return kind(**{field.name: self.model.config[field.name] for field in fields(kind)})

    def encode_frame(
        self, frame: Tensor, *, noise: Tensor | None = None, tile: Tile | None = None
    ) -> Tensor:
        """Latents (b c h/factor w/factor) of one frame (b 3 h w).

        noise: normal noise of the latents' shape for a sample of the posterior; None for its
        mean. ValueError unless the factor divides height and width.
        """
        height, width = frame.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"the VAE takes frames whose width and height are multiples of {self.factor}, got "
                f"{width}x{height}: pad them first (geometry.minimal_padding)"
            )
        moments = tiled(self._moments, frame, tile, unit_in=self.factor, unit_out=1)
        latents, log_variance = moments.chunk(2, dim=1)
        if noise is not None:
            std = (0.5 * log_variance.clamp(-30, 20)).exp()
            latents = latents + std * noise.to(std)
        return latents * self.scaling_factor

    def encode(
        self,
        video: Tensor,
        *,
        noise: Callable[[int], Tensor] | None = None,
        tile: Tile | None = None,
    ) -> Tensor:
        """Latents of a video (b 3 f h w), frame by frame; noise: frame index -> (b c h w)."""
        latents = [
            self.encode_frame(frame, noise=noise(i) if noise else None, tile=tile)
            for i, frame in enumerate(video.unbind(2))
        ]
        return torch.stack(latents, dim=2)

    def _moments(self, frame: Tensor) -> Tensor:
        frame = frame.to(self.model.device, self.model.dtype)
        (posterior,) = self.model.encode(frame, return_dict=False)
        return posterior.parameters.float()

    def decode_windows(
        self,
        latents: Tensor,
        *,
        window: int = 3,
        overlap: int = 1,
        tile: Tile | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Decode latents (b c f h w) a few frames at a time; yields finished frames in order.

        Frames see each other only inside a window, so windows share `overlap` frames, blended.
        With overlap 0 they stand one after the other and the last may be shorter: windows of 3
        are the reference. on_step: called with the frames finished and the frames in all. Values
        may leave [-1, 1] a little. ValueError unless 0 <= overlap < window.
        """
        total, done = latents.shape[2], 0
        windows = adjacent_or_overlapping(total, window, overlap)
        decode = partial(self.decode_window, tile=tile)
        for video in joined(decode, latents.unbind(2), windows):
            done += video.shape[2]
            yield video
            if on_step:
                on_step(done, total)

    def decode_window(self, latents: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Latents (b c f h w) -> frames that see each other."""
        return tiled(self._decode, latents, tile, unit_in=1, unit_out=self.factor)

    def decode(self, latents: Tensor, **options: Any) -> Tensor:
        """The whole video at once; options as in `decode_windows`."""
        return torch.cat(list(self.decode_windows(latents, **options)), dim=2)

    def _decode(self, latents: Tensor) -> Tensor:
        frames = latents.shape[2]
        z = rearrange(latents / self.scaling_factor, "b c f h w -> (b f) c h w")
        z = z.to(self.model.device, self.model.dtype)
        (video,) = self.model.decode(z, num_frames=frames, return_dict=False)
        return rearrange(video, "(b f) c h w -> b c f h w", f=frames).float()


def joined(
    decode: Callable[[Tensor], Tensor], latents: Iterable[Tensor], windows: Sequence[range]
) -> Iterator[Tensor]:
    """Decodes windows of frames (b c h w) and blends what they share; yields what is finished.

    latents: from the first frame on, read as far as a window needs. What is before the first
    window or behind the last is not decoded.
    """

    def videos() -> Iterator[Tensor]:
        coming, held, first = iter(latents), [], 0  # latents from frame `first` on
        for window in windows:
            held += islice(coming, max(window.stop - first - len(held), 0))
            del held[: window.start - first]
            first = window.start
            yield decode(torch.stack(held, dim=2))

    return blended(videos(), windows)


def blended(videos: Iterable[Tensor], windows: Sequence[range]) -> Iterator[Tensor]:
    """Blends what the videos (b c f h w) of windows of frames share; yields what is finished."""
    carried = None  # weighted frames that the next window has its share in
    for i, (video, weight) in enumerate(zip(videos, window_weights(windows), strict=True)):
        window = windows[i]
        video = video * weight.to(video).reshape(-1, 1, 1)
        if carried is not None:
            video[:, :, : carried.shape[2]] += carried
        end = windows[i + 1].start if i + 1 < len(windows) else window.stop
        carried = video[:, :, end - window.start :]
        yield video[:, :, : end - window.start]


def vae_from_config(config: Mapping[str, Any]) -> VideoVAE:
    """A VAE with random weights from diffusers' config fields; fields left out take SVD's values.

    A config with `patch` is that of a `PatchVAE`, and has all of its fields.

    Two fields more than diffusers has, for narrow VAEs: `norm_num_groups` and `norm_eps` of every
    group norm. With groups of one or two channels and a tiny epsilon it forgets how bright and how
    contrasty a frame is, and few channels cannot carry that past the last norm.
    """
    if "patch" in config:
        return VideoVAE(PatchVAE(**config))
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
        AutoencoderKLTemporalDecoder,
    )

    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    groups, eps = fields.pop("norm_num_groups", None), fields.pop("norm_eps", None)
    channels = fields.setdefault("block_out_channels", (128, 256, 512, 512))
    fields.setdefault("layers_per_block", 2)
    fields.setdefault("down_block_types", ("DownEncoderBlock2D",) * len(channels))
    model = AutoencoderKLTemporalDecoder(**fields)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups or module.num_groups
            module.eps = eps or module.eps
    speed_up_temporal_convs(model)
    return VideoVAE(model)


def load_vae(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoVAE:
    """Load a VAE from a file, or from a diffusers folder (the VAE's own or the one above `vae`).

    The file may be in diffusers' naming or in SVD's, alone or inside a full SVD checkpoint. Its
    configuration is that of the folder's config.json, of the file's metadata (JSON under
    `star_vae`), or inferred from the shapes. ValueError for a file that is no such VAE.
    """
    path, tensors, config = _open(path)
    with torch.device("meta"):
        vae = vae_from_config(config)
    load_into(vae.model, tensors, device=device, dtype=dtype, name=str(path))
    vae.model.eval().requires_grad_(False)
    return vae


def geometry_of(path: str | os.PathLike[str]) -> VAEGeometry | PatchVAEGeometry:
    """Of a VAE's file or folder, which is not loaded. ValueError as in `load_vae`."""
    _, tensors, config = _open(path)
    if "patch" in config:
        known = {field.name for field in fields(PatchVAEGeometry)}
        return PatchVAEGeometry(**{name: config[name] for name in known})
    return _geometry(tensors)


def _open(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The file, its weights (memory-mapped, in diffusers' naming) and the configuration."""
    path = Path(path)
    config = None
    if path.is_dir():
        path, config = _open_folder(path)
    file = open_tensors(path)
    if identify(file) is VAE_PATCH and "star_vae" in file.metadata:
        return path, dict(file), json.loads(file.metadata["star_vae"])
    tensors = _in_diffusers_naming(file)
    if "decoder.time_conv_out.weight" not in tensors:
        raise ValueError(
            f"{path} has no video VAE, it seems to be a {identify(file).title}: use the VAE of "
            "Stable Video Diffusion (vae/diffusion_pytorch_model.safetensors of "
            "stable-video-diffusion-img2vid) or a whole SVD checkpoint"
        )
    if config is None:
        config = json.loads(file.metadata.get("star_vae", "null")) or asdict(_geometry(tensors))
    return path, tensors, config


def _open_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Weights file and configuration of a diffusers folder."""
    if (folder / "vae" / "config.json").exists():
        folder = folder / "vae"
    names = ("safetensors", "fp16.safetensors", "bin", "fp16.bin")
    files = [folder / f"diffusion_pytorch_model.{name}" for name in names]
    found = [file for file in files if file.exists()]
    if not found or not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds no VAE: it needs config.json and {files[0].name}, or name the "
            "checkpoint file itself"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("_class_name") != "AutoencoderKLTemporalDecoder":
        raise ValueError(
            f"{folder} holds a {config.get('_class_name')}, not the video VAE "
            "AutoencoderKLTemporalDecoder: use the one of stable-video-diffusion-img2vid"
        )
    return found[0], config


# SVD's names -> diffusers'. Applied in order to every key; diffusers' own pass unchanged.
_RENAMES = [
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


def _in_diffusers_naming(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "first_stage_model."
    if any(key.startswith(prefix) for key in file):
        file = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
    levels = len({key.split(".")[2] for key in file if key.startswith("decoder.up.")})

    def renamed(key: str) -> str:
        # SVD counts the decoder's blocks from the fine end, diffusers from the coarse one.
        key = re.sub(
            r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", key
        )
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        return key

    tensors = {renamed(key): tensor for key, tensor in file.items()}
    for key, tensor in tensors.items():
        if ".attentions." in key and tensor.ndim == 4:  # 1x1 convolutions are linear layers here
            tensors[key] = tensor.flatten(1)
    conv_out = tensors.get("encoder.conv_out.bias")
    if conv_out is not None and "quant_conv.weight" not in tensors:
        # SVD's file has it folded into the encoder's last layer.
        tensors["quant_conv.weight"] = torch.eye(len(conv_out))[..., None, None]
        tensors["quant_conv.bias"] = torch.zeros(len(conv_out))
    return tensors


def _geometry(tensors: Mapping[str, Tensor]) -> VAEGeometry:
    def number_of(pattern: str) -> int:
        return next(i for i in count() if pattern.format(i) not in tensors)

    resnet = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    levels = number_of(resnet.format("{}", 0))
    return VAEGeometry(
        block_out_channels=tuple(len(tensors[resnet.format(i, 0)]) for i in range(levels)),
        layers_per_block=number_of(resnet.format(0, "{}")),
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
    )
