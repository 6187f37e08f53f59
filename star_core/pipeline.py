"""The whole method: enlarge, pad, encode, noise, denoise in windows, decode, crop, fix colours."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, tee

import torch
from torch import Tensor

from .backbones import SamplingDefaults
from .behaviour import DEFAULT, Behaviour
from .canvas import Canvas, Part, Piece
from .checkpoints import StarModel
from .chunking import ChunkConfig, chunked, ramp
from .color_fix import COLOR_FIXES
from .diffusion.denoiser import Denoiser
from .diffusion.samplers import SAMPLERS, refuse_crashes
from .diffusion.schedule import sampling_sigmas, star_schedule
from .geometry import shrunk, upsample
from .models.slicing import Slicing
from .noise import FrameNoise, ReferenceNoise
from .offload import Seat
from .out_of_memory import Room, surviving
from .progress import Counter, Progress
from .resume import Work
from .shortcuts import Shortcuts
from .tiling import Tile
from .vae import VideoVAE, joined


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

    @property
    def evaluations(self) -> int:
        """How often the network looks at each window, once for both prompts."""
        steps = len(self.sigmas) - 1
        # two a step, but for the last
        return 2 * steps - 1 if steps and self.sampling.sampler == "heun" else steps


@dataclass(frozen=True, kw_only=True, eq=False)
class Shot:
    """Frames between two cuts and how they are to be restored; they see no others.

    positive, negative: text embeddings (1 l d).
    """

    part: Part
    positive: Tensor
    negative: Tensor
    settings: Settings


@torch.inference_mode()
def restore(
    frames: Iterable[Tensor],
    model: StarModel,
    vae: VideoVAE,
    shots: Sequence[Shot],
    canvas: Canvas,
    *,
    work: Work | None = None,
    seat: Seat | None = None,
    on_progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Restores a clip; yields the wanted frames (c h w) in [0, 1] on the CPU, one by one.

    frames: those that the shots need, (c h w) in [0, 1], iterable twice; alpha (c = 4) is enlarged.
    shots: in order, of one behaviour and device. work: what it has is not done again, and what is
    done is kept in it. seat: where modules work, one of the shots' device if none is given.
    on_progress(stage, done, total) is called often, from 0 done, in the stages encode, denoise and
    decode, which take turns in a long clip; an exception from it ends the run.
    """
    for shot in shots:
        _refuse_crashes(shot)
    count = Counter(_totals(shots), on_progress)
    shared = max((a.part.needed.stop - b.part.needed.start for a, b in pairwise(shots)), default=0)
    start = shots[0].part.needed.start
    to_encode = Frames(frames, start, held=shared)
    for_colors = Frames(frames, start)
    with seat or _seat(shots[0].settings) as seat:
        for number, shot in enumerate(shots):
            run = _run(number, shot, model, vae, canvas, work, seat, count)
            yield from run.frames(to_encode, for_colors)


@torch.inference_mode()
def find_latents(
    frames: Iterable[Tensor],
    model: StarModel,
    vae: VideoVAE,
    shots: Sequence[Shot],
    number: int,
    canvas: Canvas,
    *,
    work: Work,
    on_progress: Progress | None = None,
) -> None:
    """Does of one shot what `restore` then finds in `work`: everything but decoding.

    frames: those that this shot needs. Others as in `restore`.
    """
    shot = shots[number]
    _refuse_crashes(shot)
    count = Counter(_totals([shot]), on_progress)
    to_encode = Frames(frames, shot.part.needed.start)
    with _seat(shot.settings) as seat:
        run = _run(number, shot, model, vae, canvas, work, seat, count)
        for _ in run.latents(to_encode) if shot.settings.strength else ():
            pass


def _seat(settings: Settings) -> Seat:
    return Seat(settings.device, one_at_a_time=settings.slicing.offload)


def _run(
    number: int,
    shot: Shot,
    model: StarModel,
    vae: VideoVAE,
    canvas: Canvas,
    work: Work | None,
    seat: Seat,
    count: Counter,
) -> "_Run":
    def in_latents(tile: Tile) -> Tile:
        return tile.in_latents(vae.factor, step=2**model.config.downsamplings)

    return _Run(
        name=f"{number:04}",
        shot=shot,
        model=model,
        vae=vae,
        canvas=canvas,
        noise=_noise(shot.settings, canvas, vae.factor),
        room=Room(
            vae_tile=shot.settings.tile,
            latent_tile=shot.settings.latent_tile,
            slicing=shot.settings.slicing,
            view=canvas.view_size,
            in_latents=in_latents,
            seat=seat,
        ),
        seat=seat,
        work=work,
        count=count,
    )


class Frames:
    """Frames of a clip by their index; none is read before it is asked for."""

    def __init__(self, frames: Iterable[Tensor], start: int, *, held: int = 0) -> None:
        """start: index of the first of `frames`. held: how many can be had once more."""
        self._frames, self._next = frames, start
        self._coming: Iterator[Tensor] | None = None
        self._held: deque[Tensor] = deque(maxlen=held)

    def read(self, part: range) -> Iterator[Tensor]:
        """The frames in `part`, which begins amid those held, where the last one ended or later."""
        if self._coming is None:
            self._coming = iter(self._frames)
        again = max(self._next - part.start, 0)
        yield from list(self._held)[len(self._held) - again :][: len(part)]
        skipped = max(part.start - self._next, 0)
        for index, frame in enumerate(islice(self._coming, max(part.stop - self._next, 0))):
            self._next += 1
            self._held.append(frame)
            if index >= skipped:
                yield frame


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """The restoration of one shot, with all that its steps share."""

    name: str
    shot: Shot
    model: StarModel
    vae: VideoVAE
    canvas: Canvas
    noise: FrameNoise | ReferenceNoise
    room: Room
    seat: Seat
    work: Work | None
    count: Counter

    @property
    def settings(self) -> Settings:
        return self.shot.settings

    def frames(self, to_encode: Frames, for_colors: Frames) -> Iterator[Tensor]:
        """Restored frames (c h w) in [0, 1]."""
        canvas, strength, wanted = self.canvas, self.settings.strength, self.shot.part.wanted
        fix = COLOR_FIXES[self.settings.sampling.color_fix]

        def bicubic(frame: Tensor) -> Tensor:
            return canvas.result(canvas.crop(upsample(frame, canvas.size, "bicubic").clamp(0, 1)))

        def fixed(video: Tensor, source: Tensor) -> Tensor:
            whole = self.settings.behaviour.color_reference == "source"
            reference = source[:3] if whole else canvas.crop(self._enlarged(source))
            result = (canvas.unpadded(video) / 2 + 0.5).clamp(0, 1)
            return canvas.result(fix(result, reference))

        restored = unchanged = iter(())
        if strength == 1:
            restored = self._decoded(latents for latents, _ in self.latents(to_encode))
        elif strength:
            found, given = tee(self.latents(to_encode))
            restored = self._decoded(latents for latents, _ in found)
            unchanged = self._decoded(hint for _, hint in given)
        for source in for_colors.read(wanted):
            frame = bicubic(source)
            if strength:
                result = fixed(next(restored), source)
                if strength < 1:
                    # Whatever the VAE adds or takes must be gone at strength 0.
                    lost = frame[:3] - fixed(next(unchanged), source)
                    result = (result + (1 - strength) * lost).clamp(0, 1)
                frame = torch.cat([result, frame[3:]])
            self.count.begin("decode")
            yield frame
            self.count.add("decode")

    def _enlarged(self, frame: Tensor) -> Tensor:
        return upsample(frame[:3], self.canvas.size, self.settings.sampling.upsample).clamp(0, 1)

    def latents(self, sources: Frames) -> Iterator[tuple[Tensor, Tensor]]:
        """Restored latents and the hint of each frame needed, (1 c h w), in order."""
        pieces, first = self.shot.part.pieces, self.shot.part.needed.start
        coming = [after.shared for after in pieces[1:]] + [0]
        done: dict[str, Tensor] = {}
        for number, (piece, handed_on) in enumerate(zip(pieces, coming, strict=True)):
            name = f"{self.name}-{number:05}"
            begin, before = first + piece.frames.start, done
            new = range(begin + piece.shared, begin + len(piece.frames))
            done = (self.work and self.work.recall(name)) or {}
            if done:
                self.count.add("encode", len(new))
                self.count.add("denoise", self.settings.evaluations * len(piece.windows))
            else:
                hint = self._encoded(sources, new)
                if piece.shared:
                    hint = torch.cat([before["hint"][:, :, -piece.shared :], hint], dim=2)
                done = self._denoised(name, piece, hint, before.get("x_0s"), handed_on)
                if self.work:
                    self.work.keep(name, done)
                    self.work.forget(f"{name}-*")
            # What the next piece has too, it finishes.
            finished = slice(len(piece.frames) - handed_on)
            both = (done[kind][:, :, finished].unbind(2) for kind in ("latents", "hint"))
            yield from zip(*both, strict=True)

    def _encoded(self, sources: Frames, part: range) -> Tensor:
        """Latents (1 c f h w) of some frames, as the network's hint."""
        vae, behaviour = self.vae, self.settings.behaviour
        self.count.begin("encode")
        z_lq = []
        for index, source in zip(part, sources.read(part), strict=True):
            small = shrunk(source[:3], self.settings.shrink)
            look = self.canvas.look(self._enlarged(small) * 2 - 1, behaviour)[None]
            shape = (1, vae.latent_channels, *(side // vae.factor for side in look.shape[-2:]))
            draw = behaviour.posterior == "sample"
            sample = self.noise.posterior(index, shape) if draw else None

            def encode(look: Tensor = look, sample: Tensor | None = sample) -> Tensor:
                self.seat.take(vae.model)
                return vae.encode_frame(look, noise=sample, tile=self.room.vae_tile)

            z_lq.append(surviving(encode, self.room.less_for_vae).cpu())
            self.count.add("encode")
        return torch.stack(z_lq, dim=2)

    def _denoised(
        self, name: str, piece: Piece, hint: Tensor, given: Tensor | None, handed_on: int
    ) -> dict[str, Tensor]:
        """From the hint of a piece (1 c f h w) to its restored latents.

        given: x_0 of its first frames at every evaluation (e 1 c f h w), as the piece before has
        found them. handed_on: how many of its last frames the next piece shares.
        Returns latents, hint, and in x_0s what is handed on.
        """
        settings, schedule = self.settings, star_schedule()
        sampling, sigmas, network = settings.sampling, settings.sigmas, self.model.network
        if not settings.evaluations:
            return {"latents": hint.clone(), "hint": hint}
        denoiser = Denoiser(
            network=network,
            schedule=schedule,
            positive=self.shot.positive,
            negative=self.shot.negative,
            hint=hint,
            guidance_scale=sampling.cfg,
            guidance_rescale=sampling.cfg_rescale,
            dtype=next(network.parameters()).dtype,
            shortcuts=settings.shortcuts,
        )

        def denoise_window(x_in: Tensor, sigma: Tensor, window: range) -> Tensor:
            def look() -> Tensor:
                self.seat.take(network)
                with network.working(
                    slicing=self.room.slicing,
                    tile=self.room.network_tile,
                    attention_window=settings.shortcuts.attention_window,
                ):
                    return denoiser(x_in, sigma, window)

            x_0 = surviving(look, self.room.less_for_network)
            if settings.strength < 1:
                lq = hint[:, :, window.start : window.stop].to(x_0)
                x_0 = torch.lerp(lq, x_0, settings.strength)
            self.count.add("denoise")
            return x_0

        denoise_windows = chunked(denoise_window, piece.windows, settings.behaviour.merge)
        # Features that are reused between evaluations are not kept: such a piece begins anew.
        work = None if settings.shortcuts.reuse else self.work
        last = []

        def denoise(x_in: Tensor, sigma: Tensor) -> Tensor:
            number = len(last)
            kept = work and work.recall(f"{name}-{number:03}")
            if kept:
                x_0 = kept["x_0"].to(x_in)
                self.count.add("denoise", len(piece.windows))
            else:
                x_0 = denoise_windows(x_in, sigma)
                if given is not None:
                    rising = ramp(piece.shared).to(x_0)[:, None, None]
                    x_0[:, :, : piece.shared].lerp_(given[number].to(x_0), 1 - rising)
                if work and number + 1 < settings.evaluations:
                    work.keep(f"{name}-{number:03}", {"x_0": x_0})
            last.append(x_0[:, :, len(piece.frames) - handed_on :].cpu())
            return x_0

        self.count.begin("denoise")
        offset = self.shot.part.needed.start + piece.frames.start
        t = torch.tensor([sampling.noise_level - 1])
        start = schedule.add_noise(hint, self.noise.initial(tuple(hint.shape), offset), t)
        latents = SAMPLERS[sampling.sampler](
            denoise,
            start.to(self.seat.device),
            sigmas,  # on the CPU: solvers branch on them at every step
            noise=self.noise.solver(tuple(hint.shape), sigmas, offset),
        ).cpu()
        return {"latents": latents, "hint": hint, "x_0s": torch.stack(last)}

    def _decoded(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Wanted frames (3 h w) of latents (1 c h w), on the CPU."""
        part = self.shot.part

        def decode(latents: Tensor) -> Tensor:
            def look() -> Tensor:
                self.seat.take(self.vae.model)
                return self.vae.decode_window(latents, tile=self.room.vae_tile)

            return surviving(look, self.room.less_for_vae).cpu()

        videos = joined(decode, latents, part.decode_windows)
        frames = (frame for video in videos for frame in video[0].unbind(1))
        before = part.wanted.start - part.needed.start - part.decode_windows[0].start
        return islice(frames, before, None)


def _totals(shots: Sequence[Shot]) -> dict[str, int]:
    """How much each stage has to do, in frames, windows and frames."""
    looked_at = [shot for shot in shots if shot.settings.strength]
    windows = [sum(len(piece.windows) for piece in shot.part.pieces) for shot in looked_at]
    return {
        "encode": sum(len(shot.part.needed) for shot in looked_at),
        "denoise": sum(
            shot.settings.evaluations * n for shot, n in zip(looked_at, windows, strict=True)
        ),
        "decode": sum(len(shot.part.wanted) for shot in shots),
    }


def _refuse_crashes(shot: Shot) -> None:
    settings = shot.settings
    if settings.behaviour.refuses_crashes and settings.strength and settings.evaluations:
        refuse_crashes(
            frames=len(shot.part.needed),
            chunk_length=settings.chunk.length,
            sampler=settings.sampling.sampler,
            evaluations=len(settings.sigmas) - 1,
        )


def _noise(settings: Settings, canvas: Canvas, factor: int) -> FrameNoise | ReferenceNoise:
    if settings.behaviour.noise == "reference":
        return ReferenceNoise(settings.seed)
    height, width = (side // factor for side in canvas.padded)
    y, x = (part.start // factor for part in canvas.view)
    return FrameNoise(settings.seed, canvas=(height, width), origin=(y, x))
