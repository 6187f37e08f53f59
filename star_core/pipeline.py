"""The whole method: enlarge and pad, encode, noise, denoise in windows, decode, crop, fix colours."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .backbones import SamplingDefaults
from .behaviour import DEFAULT, Behaviour
from .checkpoints import StarModel
from .chunking import ChunkConfig, chunked, overlapping_windows
from .color_fix import COLOR_FIXES
from .diffusion.denoiser import Denoiser
from .diffusion.samplers import SAMPLERS, refuse_crashes
from .diffusion.schedule import sampling_sigmas, star_schedule
from .geometry import Padding, crop, minimal_padding, pad, reference_padding, upsample
from .noise import FrameNoise, ReferenceNoise
from .offload import on_device
from .tiling import Tile
from .vae import VideoVAE

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user chooses.

    strength: how far each prediction of x_0 goes from the input's latents, 0 to 1; at 0 the result
    is the bicubic input. seed: 0 to 2^64-1. tile: spatial tiles of the VAE. decode_window: frames
    that the VAE decodes together. device: where to compute.
    """

    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    strength: float = 1.0
    seed: int = 666
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    tile: Tile | None = None
    decode_window: int = 3
    behaviour: Behaviour = DEFAULT
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be from 0 to 1, got {self.strength}")
        if self.sampling.sampler not in SAMPLERS:
            raise ValueError(
                f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampling.sampler!r}"
            )
        if self.sampling.color_fix not in COLOR_FIXES:
            raise ValueError(
                f"color fix must be one of {', '.join(COLOR_FIXES)}, got {self.sampling.color_fix!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Part:
    """The frames of a clip to restore, and those that must be looked at for them.

    wanted: frames of the clip that come out. needed: frames that go in, all of every temporal
    window that holds a wanted one, so that a part looks as it will in the whole clip.
    windows: counted from the first frame needed.
    """

    wanted: range
    needed: range
    windows: list[range]

    @classmethod
    def of(cls, total: int, settings: Settings, wanted: range | None = None) -> "Part":
        """ValueError where a part of 0 frames or of frames beyond the clip is asked for."""
        wanted = range(total) if wanted is None else wanted
        if not wanted or wanted.start < 0 or wanted.stop > total:
            raise ValueError(
                f"frames {wanted.start}:{wanted.stop} are not in the clip, which has {total} frames"
            )
        windows = overlapping_windows(
            total,
            settings.chunk.length,
            settings.chunk.overlap,
            mode=settings.behaviour.windows,
        )
        touching = [w for w in windows if w.start < wanted.stop and wanted.start < w.stop]
        needed = range(touching[0].start, touching[-1].stop)
        shift = [range(w.start - needed.start, w.stop - needed.start) for w in touching]
        return cls(wanted=wanted, needed=needed, windows=shift)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Where things lie on the enlarged frame.

    size: (width, height) of the whole result. padding: of the whole result. view: rows and columns
    of the padded frame that are computed. out: rows and columns of the view that come out.
    """

    size: tuple[int, int]
    padding: Padding
    view: tuple[range, range]
    out: tuple[range, range]

    @classmethod
    def of(
        cls,
        size: tuple[int, int],
        model: StarModel,
        vae: VideoVAE,
        settings: Settings,
        region: tuple[range, range] | None = None,
        *,
        margin: int = 32,
    ) -> "Canvas":
        """region: rows and columns of the result to show, with `margin` latents of context."""
        width, height = size
        levels = model.config.downsamplings
        if settings.behaviour.padding == "white":
            padding = reference_padding(height, width)
        else:
            padding = minimal_padding(height, width, vae_factor=vae.factor, levels=levels)
        whole = (height + padding.top + padding.bottom, width + padding.left + padding.right)
        if region is None:
            region = (range(height), range(width))
            view = (range(whole[0]), range(whole[1]))
        else:
            step = vae.factor * 2**levels
            first = (padding.top, padding.left)
            extra = (2 * vae.factor if levels else 0, 0)  # rows are 2 mod 2^n latents
            view = tuple(
                _grow(part, start, limit, step, odd, margin * vae.factor)
                for part, start, limit, odd in zip(region, first, whole, extra, strict=True)
            )
        out = tuple(
            range(part.start + start - seen.start, part.stop + start - seen.start)
            for part, start, seen in zip(region, (padding.top, padding.left), view, strict=True)
        )
        return cls(size=size, padding=padding, view=view, out=out)

    def look(self, frame: Tensor, behaviour: Behaviour) -> Tensor:
        """The computed part of an enlarged frame (c h w)."""
        return _cut(pad(frame, self.padding, behaviour.padding), self.view)

    def result(self, frame: Tensor) -> Tensor:
        """What comes out of a computed (... h w)."""
        return _cut(frame, self.out)

    def region(self, frame: Tensor) -> Tensor:
        """The same place on an enlarged frame (c h w) without padding."""
        rows, columns = (
            range(out.start + seen.start - first, out.stop + seen.start - first)
            for out, seen, first in zip(
                self.out, self.view, (self.padding.top, self.padding.left), strict=True
            )
        )
        return _cut(frame, (rows, columns))


def _grow(part: range, start: int, limit: int, step: int, extra: int, margin: int) -> range:
    """A range around `part` that begins on the network's grid and has a size that it takes."""
    begin = max(0, (part.start + start - margin) // step * step)
    end = min(limit, part.stop + start + margin)
    end = begin + -(-(end - begin - extra) // step) * step + extra
    return range(begin, min(end, limit))


def _cut(frame: Tensor, view: tuple[range, range]) -> Tensor:
    rows, columns = view
    return frame[..., rows.start : rows.stop, columns.start : columns.stop]


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

    frames: the frames that `part` needs, (3 h w) in [0, 1], iterable twice. positive, negative:
    text embeddings (1 l d). on_progress(stage, done, total) is called often with the stages
    encode, denoise and decode; an exception from it ends the run.
    """
    behaviour, sampling, strength = settings.behaviour, settings.sampling, settings.strength
    report = on_progress or (lambda stage, done, total: None)
    factor, count = vae.factor, len(part.needed)

    def noise_source() -> FrameNoise | ReferenceNoise:
        if behaviour.noise == "reference":
            return ReferenceNoise(settings.seed)
        pad_h, pad_w = (canvas.padding.top + canvas.padding.bottom), sum(canvas.padding[:2])
        whole = ((canvas.size[1] + pad_h) // factor, (canvas.size[0] + pad_w) // factor)
        origin = (canvas.view[0].start // factor, canvas.view[1].start // factor)
        return FrameNoise(settings.seed, canvas=whole, origin=origin)

    def enlarged(frame: Tensor) -> Tensor:
        return upsample(frame, canvas.size, sampling.upsample)

    if strength == 0:
        for index, frame in enumerate(frames):
            if part.needed[index] in part.wanted:
                yield canvas.region(upsample(frame, canvas.size, "bicubic")).clamp(0, 1)
        return

    noise = noise_source()
    z_lq = []
    with on_device(vae.model, settings.device):
        for index, frame in enumerate(frames):
            look = canvas.look(enlarged(frame) * 2 - 1, behaviour)[None]
            shape = (1, vae.latent_channels, look.shape[-2] // factor, look.shape[-1] // factor)
            sample = None
            if behaviour.posterior == "sample":
                sample = noise.posterior(part.needed[index], shape)
            z_lq.append(vae.encode_frame(look, noise=sample, tile=settings.tile).cpu())
            report("encode", index + 1, count)
    hint = torch.stack(z_lq, dim=2)
    latents = _denoise(hint, model, positive, negative, settings, part, noise, report)

    windows = {"window": settings.decode_window, "overlap": behaviour.decode_overlap}
    with on_device(vae.model, settings.device):
        decoded = _frames(vae.decode_windows(latents, tile=settings.tile, **windows))
        unchanged = _frames(vae.decode_windows(hint, tile=settings.tile, **windows))
        for index, (source, video) in enumerate(zip(frames, decoded, strict=True)):
            if behaviour.color_reference == "source":
                reference = source
            else:
                reference = canvas.region(enlarged(source)).clamp(0, 1)
            fix = COLOR_FIXES[sampling.color_fix]
            frame = fix(canvas.result(video) / 2 + 0.5, reference)
            if strength < 1:
                # Whatever the VAE adds or takes must be gone at strength 0.
                bicubic = canvas.region(upsample(source, canvas.size, "bicubic")).clamp(0, 1)
                as_is = fix(canvas.result(next(unchanged)) / 2 + 0.5, reference)
                frame = (frame + (1 - strength) * (bicubic - as_is)).clamp(0, 1)
            if part.needed[index] in part.wanted:
                yield frame
            report("decode", index + 1, count)


def _denoise(
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
    behaviour, sampling, strength = settings.behaviour, settings.sampling, settings.strength
    schedule = star_schedule()
    sigmas = sampling_sigmas(
        schedule,
        solver_mode=sampling.solver_mode,
        steps=sampling.steps,
        noise_level=sampling.noise_level,
        sampler=sampling.sampler,
        exact=behaviour.noise != "reference",
    )
    if len(sigmas) == 1:
        return hint
    if behaviour.refuses_crashes:
        refuse_crashes(
            frames=hint.shape[2],
            chunk_length=settings.chunk.length,
            sampler=sampling.sampler,
            evaluations=len(sigmas) - 1,
        )
    denoiser = Denoiser(
        network=model.network,
        schedule=schedule,
        positive=positive,
        negative=negative,
        hint=hint,
        guidance_scale=sampling.cfg,
        guidance_rescale=sampling.cfg_rescale,
        dtype=next(model.network.parameters()).dtype,
    )
    calls = 0
    evaluations = len(part.windows) * (len(sigmas) - 1) * (2 if sampling.sampler == "heun" else 1)

    def denoise_window(x_in: Tensor, sigma: Tensor, window: range) -> Tensor:
        nonlocal calls
        x_0 = denoiser(x_in, sigma, window)
        calls += 1
        report("denoise", min(calls, evaluations), evaluations)
        if strength < 1:
            lq = hint[:, :, window.start : window.stop].to(x_0)
            x_0 = torch.lerp(lq, x_0, strength)
        return x_0

    offset = part.needed.start
    t = torch.tensor([sampling.noise_level - 1])
    start = schedule.add_noise(hint, noise.initial(tuple(hint.shape), offset), t)
    with on_device(model.network, settings.device):
        return SAMPLERS[sampling.sampler](
            chunked(denoise_window, part.windows, behaviour.merge),
            start.to(settings.device),
            sigmas.to(settings.device),
            noise=noise.solver(tuple(hint.shape), sigmas, offset),
        ).cpu()


def _frames(windows: Iterable[Tensor]) -> Iterator[Tensor]:
    for window in windows:
        yield from window[0].cpu().unbind(1)
