"""The whole method: enlarge, pad, encode, noise, denoise in windows, decode, crop, fix colours."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from .backbones import SamplingDefaults
from .behaviour import DEFAULT, Behaviour
from .canvas import Canvas, Part
from .checkpoints import StarModel
from .chunking import ChunkConfig, chunked
from .color_fix import COLOR_FIXES
from .diffusion.denoiser import Denoiser
from .diffusion.samplers import SAMPLERS, refuse_crashes
from .diffusion.schedule import sampling_sigmas, star_schedule
from .geometry import shrunk, upsample
from .models.slicing import Slicing
from .noise import FrameNoise, ReferenceNoise
from .offload import on_device
from .shortcuts import Shortcuts
from .tiling import Tile
from .vae import VideoVAE

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user chooses.

    strength: how far each prediction of x_0 goes from the input's latents, 0 to 1; at 0 the result
    is the bicubic input. shrink: from 1, how much smaller the input is made before it is enlarged
    for the model; the result's size stays. seed: 0 to 2^64-1. tile: spatial tiles of the VAE.
    latent_tile: spatial tiles of the network. slicing: its work at a time. shortcuts: work that it
    leaves out. device: where to compute.
    """

    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    strength: float = 1.0
    shrink: float = 1.0
    seed: int = 666
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    tile: Tile | None = None
    latent_tile: Tile | None = None
    slicing: Slicing = field(default_factory=Slicing)
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    behaviour: Behaviour = DEFAULT
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        sampling = self.sampling
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be from 0 to 1, got {self.strength}")
        if not (math.isfinite(self.shrink) and self.shrink >= 1):
            raise ValueError(f"shrink must be a finite number from 1 up, got {self.shrink:g}")
        if not math.isfinite(sampling.cfg):
            raise ValueError(f"cfg must be a finite number, got {sampling.cfg}")
        if not 0 <= sampling.cfg_rescale <= 1:
            raise ValueError(f"cfg rescale must be from 0 to 1, got {sampling.cfg_rescale}")
        for what, value, known in (
            ("sampler", sampling.sampler, SAMPLERS),
            ("color fix", sampling.color_fix, COLOR_FIXES),
        ):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
        if sampling.color_fix == "wavelet" and self.behaviour.color_reference == "source":
            raise ValueError(
                "the wavelet colour fix compares frames of one size, the reference leaves the "
                "input's small: use adain, or leave out reference"
            )
        FrameNoise(self.seed)
        _ = self.sigmas

    @property
    def sigmas(self) -> Tensor:
        """EDM noise levels of the run with a trailing 0, float32; ValueError if there are none."""
        return sampling_sigmas(
            star_schedule(),
            solver_mode=self.sampling.solver_mode,
            steps=self.sampling.steps,
            noise_level=self.sampling.noise_level,
            sampler=self.sampling.sampler,
            exact=self.behaviour.noise != "reference",
        )


@torch.inference_mode()
def restore(
    frames: Iterable[Tensor],
    model: StarModel,
    vae: VideoVAE,
    positive: Tensor,
    negative: Tensor,
    settings: Settings,
    canvas: Canvas,
    part: Part,
    *,
    on_progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Restores a clip; yields the wanted frames (c h w) in [0, 1] on the CPU, one by one.

    frames: those that `part` needs, (c h w) in [0, 1], iterable twice; alpha (c = 4) is enlarged.
    positive, negative: text embeddings (1 l d). on_progress(stage, done, total) is called often,
    from 0 done, in the stages encode, denoise and decode; an exception from it ends the run.
    """
    behaviour, sampling, strength = settings.behaviour, settings.sampling, settings.strength
    report = on_progress or (lambda stage, done, total: None)
    fix = COLOR_FIXES[sampling.color_fix]
    first = part.wanted.start - part.needed.start

    def enlarged(frame: Tensor) -> Tensor:
        return upsample(frame[:3], canvas.size, sampling.upsample).clamp(0, 1)

    def bicubic(frame: Tensor) -> Tensor:
        return canvas.result(canvas.crop(upsample(frame, canvas.size, "bicubic").clamp(0, 1)))

    def fixed(video: Tensor, source: Tensor) -> Tensor:
        whole = behaviour.color_reference == "source"
        reference = source[:3] if whole else canvas.crop(enlarged(source))
        result = (canvas.unpadded(video) / 2 + 0.5).clamp(0, 1)
        return canvas.result(fix(result, reference))

    def wanted() -> Iterator[tuple[int, Tensor]]:
        return enumerate(islice(frames, first, first + len(part.wanted)), start=1)

    if strength == 0:
        report("decode", 0, len(part.wanted))
        for done, source in wanted():
            yield bicubic(source)
            report("decode", done, len(part.wanted))
        return

    _refuse_crashes(settings, len(part.needed))
    noise = _noise(settings, canvas, vae.factor)
    if (tile := settings.latent_tile) is not None:
        tile = tile.in_latents(vae.factor, step=2**model.config.downsamplings)
    z_lq = []
    report("encode", 0, len(part.needed))
    with on_device(vae.model, settings.device):
        for frame_index, source in zip(part.needed, frames, strict=True):
            small = shrunk(source[:3], settings.shrink)
            look = canvas.look(enlarged(small) * 2 - 1, behaviour)[None]
            shape = (1, vae.latent_channels, *(side // vae.factor for side in look.shape[-2:]))
            draw = behaviour.posterior == "sample"
            sample = noise.posterior(frame_index, shape) if draw else None
            z_lq.append(vae.encode_frame(look, noise=sample, tile=settings.tile).cpu())
            report("encode", len(z_lq), len(part.needed))
    hint = torch.stack(z_lq, dim=2)
    with model.network.working(
        slicing=settings.slicing,
        tile=tile,
        attention_window=settings.shortcuts.attention_window,
    ):
        latents = _denoised(hint, model, positive, negative, settings, part, noise, report)

    report("decode", 0, len(part.wanted))
    with on_device(vae.model, settings.device):
        restored = _decoded(latents, vae, settings.tile, part.decode_windows, first)
        unchanged = _decoded(hint, vae, settings.tile, part.decode_windows, first)
        for done, source in wanted():
            frame = fixed(next(restored), source)
            if strength < 1:
                # Whatever the VAE adds or takes must be gone at strength 0.
                lost = bicubic(source)[:3] - fixed(next(unchanged), source)
                frame = (frame + (1 - strength) * lost).clamp(0, 1)
            if len(source) > 3:
                frame = torch.cat([frame, bicubic(source)[3:]])
            yield frame
            report("decode", done, len(part.wanted))


def _refuse_crashes(settings: Settings, frames: int) -> None:
    evaluations = len(settings.sigmas) - 1
    if settings.behaviour.refuses_crashes and evaluations:
        refuse_crashes(
            frames=frames,
            chunk_length=settings.chunk.length,
            sampler=settings.sampling.sampler,
            evaluations=evaluations,
        )


def _noise(settings: Settings, canvas: Canvas, factor: int) -> FrameNoise | ReferenceNoise:
    if settings.behaviour.noise == "reference":
        return ReferenceNoise(settings.seed)
    height, width = (side // factor for side in canvas.padded)
    y, x = (part.start // factor for part in canvas.view)
    return FrameNoise(settings.seed, canvas=(height, width), origin=(y, x))


def _denoised(
    hint: Tensor,
    model: StarModel,
    positive: Tensor,
    negative: Tensor,
    settings: Settings,
    part: Part,
    noise: FrameNoise | ReferenceNoise,
    report: Progress,
) -> Tensor:
    """Latents of the low-quality clip (1 c f h w) -> restored latents."""
    sampling, sigmas, schedule = settings.sampling, settings.sigmas, star_schedule()
    evaluations = len(sigmas) - 1
    if not evaluations:
        return hint
    denoiser = Denoiser(
        network=model.network,
        schedule=schedule,
        positive=positive,
        negative=negative,
        hint=hint,
        guidance_scale=sampling.cfg,
        guidance_rescale=sampling.cfg_rescale,
        dtype=next(model.network.parameters()).dtype,
        shortcuts=settings.shortcuts,
    )
    if sampling.sampler == "heun":  # two a step, but for the last
        evaluations = 2 * evaluations - 1
    done, calls = 0, evaluations * len(part.windows)
    report("denoise", done, calls)

    def denoise_window(x_in: Tensor, sigma: Tensor, window: range) -> Tensor:
        nonlocal done
        x_0 = denoiser(x_in, sigma, window)
        done += 1
        report("denoise", done, calls)
        if settings.strength < 1:
            lq = hint[:, :, window.start : window.stop].to(x_0)
            x_0 = torch.lerp(lq, x_0, settings.strength)
        return x_0

    offset = part.needed.start
    t = torch.tensor([sampling.noise_level - 1])
    start = schedule.add_noise(hint, noise.initial(tuple(hint.shape), offset), t)
    with on_device(model.network, settings.device):
        return SAMPLERS[sampling.sampler](
            chunked(denoise_window, part.windows, settings.behaviour.merge),
            start.to(settings.device),
            sigmas,  # on the CPU: solvers branch on them at every step
            noise=noise.solver(tuple(hint.shape), sigmas, offset),
        ).cpu()


def _decoded(
    latents: Tensor, vae: VideoVAE, tile: Tile | None, windows: list[range], first: int
) -> Iterator[Tensor]:
    """Frames (3 h w) of latents (1 c f h w) from `first` on, on the CPU."""
    frames = (
        frame
        for video in vae.decode_windows(latents, windows=windows, tile=tile)
        for frame in video[0].cpu().unbind(1)
    )
    return islice(frames, first - windows[0].start, None)
