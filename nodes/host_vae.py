"""STAR's VAE as a host VAE: latents of whole clips (b c f h w), time mixed inside windows.

The host's own nodes work with it. `encode_video` and `decode_video` do what those cannot: tiles
without doubled memory, smaller tiles when memory runs out, one frame on the device at a time.
Only `host_vae` depends on private parts of the host's VAE class.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor, nn

from ..star_core.diffusion.noise import FrameNoise
from ..star_core.parity import DEFAULT
from ..star_core.planning.cost import Cost, decoding, encoding
from ..star_core.vae.cogvideox import CausalVideoVAE
from ..star_core.vae.frame_vae import VideoVAE
from ..star_core.vae.load import load_vae
from ..star_core.vae.small_decoder import use_decoder
from ..star_core.windows.chunking import filled_to
from ..star_core.windows.geometry import Padding, crop
from ..star_core.windows.tiling import Tile
from .host_features import check_host, memory_ran_out

logger = logging.getLogger(__name__)

# Attributes that `host_vae` sets in the host's VAE.
_SET = (
    *("first_stage_model", "patcher", "device", "vae_dtype", "disable_offload"),
    *("latent_dim", "latent_channels", "memory_used_encode", "memory_used_decode"),
    *("downscale_ratio", "upscale_ratio", "downscale_index_formula", "upscale_index_formula"),
)

Step = Callable[[int, int], None]


class FirstStageModel(nn.Module):
    """The host's `first_stage_model` of a VAE: converts video in [-1, 1] to raw latents and back.

    Raw means not multiplied by the scaling factor, which the host's latent format does. All tensors
    are (b c f h w). Results are float32 on the host's intermediate device, because only a window of
    the clip is processed at a time. The children are those of the network, so the state dict has
    the names of diffusers.
    """

    def __init__(self, video_vae: Any, *, window: int, overlap: int) -> None:
        super().__init__()
        for name, child in video_vae.model.named_children():
            self.add_module(name, child)
        self.video_vae = video_vae
        self.window = window
        self.overlap = overlap

    def encode(self, video: Tensor) -> Tensor:
        """Returns raw latents of a video (b 3 f h w), encoded frame by frame."""
        return torch.stack([self.encode_frame(frame) for frame in video.unbind(2)], dim=2)

    def encode_clip(
        self,
        frames: Iterator[Tensor],
        *,
        noise: Callable[[int, tuple[int, ...]], Tensor] | None = None,
        tile: Tile | None = None,
        on_step: Callable[[int], None],
    ) -> Tensor:
        """Returns latents (1 c f h w) of frames (1 3 h w), which are encoded one at a time.

        noise: called with index and shape (1 c h w), returns the noise of the posterior's sample;
        None for the mean. on_step: called with the number of finished frames.
        """
        latents = []
        for i, frame in enumerate(frames):
            shape = (1, self.video_vae.latent_channels, *self._latent_sides(frame))
            sample = noise(i, shape) if noise else None
            latents.append(self.encode_frame(frame, noise=sample, tile=tile))
            on_step(i + 1)
        return torch.stack(latents, dim=2)

    def _latent_sides(self, frame: Tensor) -> tuple[int, int]:
        height, width = frame.shape[-2:]
        return height // self.video_vae.factor, width // self.video_vae.factor

    def frames_of(self, latents: int) -> int:
        """Returns how many frames of the video so many latents stand for."""
        return latents

    def encode_frame(
        self, frame: Tensor, *, noise: Tensor | None = None, tile: Tile | None = None
    ) -> Tensor:
        """Returns raw latents (b c h w) of a frame (b 3 h w) in [-1, 1]; the host may interrupt.

        noise: noise of the posterior's sample, None for its mean.
        """
        mm.throw_exception_if_processing_interrupted()
        latents = self.video_vae.encode_frame(frame.float(), noise=noise, tile=tile)
        return (latents / self.video_vae.scaling_factor).to(mm.intermediate_device())

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the whole video (b 3 f h w) of raw latents; ValueError if they do not fit."""
        check_latents(latents, self.video_vae)
        b, _, f, h, w = latents.shape
        factor = self.video_vae.factor
        video = torch.empty(b, 3, f, h * factor, w * factor, device=mm.intermediate_device())
        done = 0
        for part in self.decode_windows(latents):
            video[:, :, done : done + part.shape[2]] = part
            done += part.shape[2]
        return video

    def decode_windows(
        self,
        latents: Tensor,
        *,
        window: int | None = None,
        overlap: int | None = None,
        tile: Tile | None = None,
    ) -> Iterator[Tensor]:
        """Yields parts of the video (b 3 f h w) of raw latents; the host may interrupt.

        window, overlap: frames decoded together and shared by neighbours, None for the defaults.
        """
        mm.throw_exception_if_processing_interrupted()
        for part in self.video_vae.decode_windows(
            latents.float() * self.video_vae.scaling_factor,
            window=self.window if window is None else window,
            overlap=self.overlap if overlap is None else overlap,
            tile=tile,
        ):
            yield part
            mm.throw_exception_if_processing_interrupted()

    def encode_memory(self, frames: int, height: int, width: int) -> int:
        """Returns the peak bytes on the device of encoding frames (or tiles) of that many pixels.

        They are those of the code itself on the meta device, and a quarter more for what
        convolution libraries allocate. Frames are encoded one by one.
        """
        return self._peak(encoding, 1, height, width)

    def decode_memory(self, frames: int, height: int, width: int) -> int:
        """Returns the peak bytes on the device of decoding a window of frames (or their tiles)."""
        return self._peak(decoding, frames, height, width)

    def _peak(self, cost: Callable[..., Cost], frames: int, height: int, width: int) -> int:
        geometry, dtype = self.video_vae.geometry, self.video_vae.model.dtype
        sides = geometry.tiles((height, width), None)
        height, width = (geometry.factor * max(map(len, side)) for side in sides)
        return int(1.25 * cost(geometry, dtype, frames, height, width).peak)


class CausalFirstStageModel(FirstStageModel):
    """The first stage of a VAE whose latents hold several frames: works on whole clips.

    Clips that are not 4k+1 frames long are filled up with their last frame. `window` and `overlap`
    have no effect.
    """

    video_vae: CausalVideoVAE

    def encode(self, video: Tensor) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        return self._raw(self.video_vae.encode(self._filled(video)))

    def _filled(self, video: Tensor) -> Tensor:
        frames = video.shape[2]
        missing = filled_to(frames, self.video_vae.latent_frames) - frames
        return torch.cat([video, *[video[:, :, -1:]] * missing], dim=2).float()

    def _raw(self, latents: Tensor) -> Tensor:
        return (latents / self.video_vae.scaling_factor).to(mm.intermediate_device())

    def encode_clip(
        self,
        frames: Iterator[Tensor],
        *,
        noise: Callable[[int, tuple[int, ...]], Tensor] | None = None,
        tile: Tile | None = None,
        on_step: Callable[[int], None],
    ) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        clip = torch.stack(list(frames), dim=2)
        video, sample = self._filled(clip), None
        if noise:
            shape = (1, self.video_vae.latent_channels, *self._latent_sides(video))
            count = (video.shape[2] - 1) // self.video_vae.latent_frames + 1
            sample = torch.stack([noise(i, shape) for i in range(count)], dim=2)
        latents = self._raw(self.video_vae.encode(video, noise=sample, tile=tile))
        on_step(clip.shape[2])
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        check_latents(latents, self.video_vae)
        (video,) = self.decode_windows(latents)
        return video.to(mm.intermediate_device())

    def decode_windows(
        self,
        latents: Tensor,
        *,
        window: int | None = None,
        overlap: int | None = None,
        tile: Tile | None = None,
    ) -> Iterator[Tensor]:
        mm.throw_exception_if_processing_interrupted()
        yield self.video_vae.decode(latents.float() * self.video_vae.scaling_factor, tile=tile)

    def frames_of(self, latents: int) -> int:
        return (latents - 1) * self.video_vae.latent_frames + 1

    def encode_memory(self, frames: int, height: int, width: int) -> int:
        """Returns the peak bytes of encoding a clip in tiles of at most the trained size."""
        frames = filled_to(frames, self.video_vae.latent_frames)
        return self._peak(encoding, frames, height, width)

    def decode_memory(self, frames: int, height: int, width: int) -> int:
        """Returns the peak bytes of decoding; they do not grow after two groups of latents."""
        return self._peak(decoding, 4 * self.video_vae.latent_frames + 1, height, width)


def host_vae(
    video_vae: VideoVAE | CausalVideoVAE, *, window: int = 3, overlap: int = DEFAULT.decode_overlap
) -> VAE:
    """Wraps a VAE of the core as a VAE of the host, which from then on places its weights.

    window, overlap: frames decoded together, and shared by neighbouring windows. The host's tiled
    nodes cut a clip into longer pieces first. ValueError unless 0 <= overlap < window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"window overlap must be in [0, {window}), got {overlap}")
    # The constructor picks a class by the weights and accepts no other. These weights are a single
    # number; whatever is not set below stays as for images.
    vae = VAE(sd={"pixel_space_vae": torch.ones(())})
    check_host(vae, *_SET)
    kind = CausalFirstStageModel if video_vae.latent_frames > 1 else FirstStageModel
    model = kind(video_vae, window=window, overlap=overlap)
    model.eval().requires_grad_(False).to(vae.vae_dtype)
    factor = video_vae.factor

    def memory_used_encode(shape: torch.Size, dtype: torch.dtype) -> int:
        # The host puts the pixels of the whole clip on the device.
        return model.encode_memory(*shape[-3:]) + shape.numel() * dtype.itemsize

    def memory_used_decode(shape: torch.Size, dtype: torch.dtype) -> int:
        height, width = (side * factor for side in shape[-2:])
        return model.decode_memory(min(shape[2], window), height, width)

    each = video_vae.latent_frames

    def latents_of(frames: int) -> int:
        return (frames - 1) // each + 1

    def frames_of(latents: int) -> int:
        return (latents - 1) * each + 1

    vae.first_stage_model = model
    vae.latent_dim = 3
    vae.latent_channels = video_vae.latent_channels
    vae.downscale_ratio = (latents_of, factor, factor)
    vae.upscale_ratio = (frames_of, factor, factor)
    vae.downscale_index_formula = vae.upscale_index_formula = (each, factor, factor)
    vae.memory_used_encode = memory_used_encode
    vae.memory_used_decode = memory_used_decode
    vae.disable_offload = True  # diffusers' layers cannot be loaded in part
    vae.patcher = ModelPatcher(
        model, load_device=vae.device, offload_device=mm.vae_offload_device()
    )
    return vae


def load_host_vae(
    path: str | os.PathLike[str],
    *,
    decoder: str | os.PathLike[str] | None = None,
    scale: float | None = None,
    window: int = 3,
    overlap: int = DEFAULT.decode_overlap,
) -> VAE:
    """Loads a VAE file as a VAE of the host, which can repeat the call, for a second device say.

    decoder: file of a small decoder in place of the VAE's own, None for that. scale: scaling factor
    of the latents, None for that of the file. window, overlap: frames decoded together, and shared
    by neighbouring windows.
    """
    video_vae = load_vae(path, scale=scale)
    if decoder is not None:
        use_decoder(video_vae, decoder)
    vae = host_vae(video_vae, window=window, overlap=overlap)
    vae.patcher.cached_patcher_init = (_load_patcher, (path, decoder, scale, window, overlap))
    return vae


def _load_patcher(
    path: str | os.PathLike[str],
    decoder: str | os.PathLike[str] | None,
    scale: float | None,
    window: int,
    overlap: int,
    disable_dynamic: bool = True,
) -> ModelPatcher:
    """Loads the patcher again when the host asks; `disable_dynamic` has no effect on a VAE."""
    options = {"decoder": decoder, "scale": scale, "window": window, "overlap": overlap}
    return load_host_vae(path, **options).patcher


def star_vae(vae: VAE) -> FirstStageModel:
    """Returns the first stage of a VAE of STAR; ValueError for another VAE."""
    model = vae.first_stage_model
    # By attribute, not class: a second copy of this pack has other classes, but its VAEs work.
    if not hasattr(model, "video_vae"):
        raise ValueError(
            f"the VAE belongs to another model ({type(model).__name__}): connect the VAE of STAR "
            "Load Model"
        )
    return model


def check_latents(latents: Tensor, video_vae: VideoVAE | CausalVideoVAE) -> None:
    """Raises ValueError unless these are latents (b c f h w) with the channels of this VAE."""
    shape = "x".join(map(str, latents.shape))
    if latents.ndim != 5:
        raise ValueError(
            f"the latents ({shape}) are those of images, not of a clip (batch, channels, frames, "
            "height, width): take them from STAR Conditioning or STAR VAE Encode, or encode with "
            "the VAE of STAR Load Model"
        )
    if latents.shape[1] != video_vae.latent_channels:
        raise ValueError(
            f"the latents ({shape}) have {latents.shape[1]} channels and belong to another VAE, "
            f"this one has {video_vae.latent_channels}: decode with the VAE that encoded them"
        )


def encode_video(
    vae: VAE,
    frames: Tensor,
    prepare: Callable[[Tensor], Tensor],
    *,
    noise: FrameNoise | None = None,
    tile: Tile | None = None,
    on_step: Step | None = None,
) -> Tensor:
    """Returns raw latents (1 c f h w) of frames (f c h w) in [0, 1], encoded one at a time.

    prepare: converts a frame (c h w) to (3 h w) in [-1, 1] in a size that the VAE accepts. noise:
    noise of the posterior's sample, None for its mean. on_step: called with the number of finished
    frames and the total. If memory runs out, smaller tiles are tried.
    """
    model = star_vae(vae)
    size = prepare(frames[0]).shape[-2:]

    def encode(tile: Tile | None) -> Tensor:
        _load(vae, model.encode_memory(len(frames), *_largest(size, tile)))
        return model.encode_clip(
            (prepare(frame)[None] for frame in frames),
            noise=noise and noise.posterior,
            tile=tile,
            on_step=lambda done: on_step(done, len(frames)) if on_step else None,
        )

    return _with_smaller_tiles(encode, tile, size, model.video_vae.factor)


def decode_video(
    vae: VAE,
    latents: Tensor,
    *,
    window: int | None = None,
    overlap: int | None = None,
    tile: Tile | None = None,
    padding: Padding | None = None,
    frames: int | None = None,
    on_step: Step | None = None,
) -> Tensor:
    """Returns an IMAGE (b*f h w c) in [0, 1] of raw latents (b c f h w), without `padding`.

    frames: how many to keep of each clip, None for all. window, overlap: of frames, None for the
    VAE's defaults. on_step: called with the number of finished frames and the total. Only the
    result is as large as the clip. If memory runs out, smaller tiles are tried.
    """
    model = star_vae(vae)
    check_latents(latents, model.video_vae)
    b, _, f, *sides = latents.shape
    all_frames = model.frames_of(f)
    keep = min(frames or all_frames, all_frames)
    size = tuple(side * model.video_vae.factor for side in sides)
    left, right, top, bottom = padding or (0, 0, 0, 0)
    shape = (b * keep, size[0] - top - bottom, size[1] - left - right, 3)

    def decode(tile: Tile | None) -> Tensor:
        _load(vae, model.decode_memory(min(window or model.window, f), *_largest(size, tile)))
        images, done = torch.empty(shape, device=mm.intermediate_device()), 0
        for number, clip in enumerate(latents.split(1)):
            for video in model.decode_windows(clip, window=window, overlap=overlap, tile=tile):
                video = video[:, :, : keep * (number + 1) - done]
                video = crop(video[0], Padding(left, right, top, bottom)) / 2 + 0.5
                images[done : done + video.shape[1]] = video.clamp_(0, 1).movedim(0, -1)
                done += video.shape[1]
                if on_step:
                    on_step(done, len(images))
        return images

    return _with_smaller_tiles(decode, tile, size, model.video_vae.factor)


def _load(vae: VAE, memory: int) -> None:
    mm.load_models_gpu([vae.patcher], memory_required=memory, force_full_load=vae.disable_offload)


def _largest(size: Sequence[int], tile: Tile | None) -> list[int]:
    """Returns height and width of the largest tile of a frame of `size` (height, width)."""
    return [min(side, tile.size) if tile else side for side in size]


def _with_smaller_tiles(
    run: Callable[[Tile | None], Tensor], tile: Tile | None, size: Sequence[int], factor: int
) -> Tensor:
    """Returns run(tile); each time the device is out of memory, the tiles are halved."""
    while True:
        smaller = max(_largest(size, tile)) // 2
        try:
            return run(tile)
        except Exception as error:
            if smaller < 8 * factor or not memory_ran_out(error):
                raise
        # Not in the handler, where the exception still holds the tensors that fill the memory.
        mm.soft_empty_cache()
        tile = Tile(size=smaller, overlap=smaller // 4)
        logger.warning("Out of memory: trying again with tiles of %d pixels", smaller)
