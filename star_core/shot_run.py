"""How one shot is restored: encoded, denoised in windows, decoded, its colours fixed.

Two ways, because VAEs differ: latents of frames, and latents of windows of frames.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, tee
from typing import Any

import torch
from torch import Tensor

from .color_fix import COLOR_FIXES
from .devices import send, stash
from .diffusion.denoiser import Denoiser
from .diffusion.levels import guidance_of
from .diffusion.noise import FrameNoise, ReferenceNoise
from .diffusion.samplers import SAMPLERS
from .memory import DevicePlacement, MemoryLimits, retry_on_oom
from .progress import Counter
from .resume import Work
from .settings import Execution, Settings
from .star_checkpoint import StarModel
from .transfer import TransferCurve, curve_of
from .windows.canvas import Canvas, FrameSpan, WindowGroup
from .windows.chunking import blend_windows, chunked, decode_in_windows, ramp
from .windows.geometry import shrunk, upsample

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShotJob:
    """A shot or a segment of it, and how it is restored. Shots are independent of each other.

    span: its frames. positive, negative: text embeddings (1 l d). transfer: the characteristics of
    the frames' code values, see `transfer.curve_of`.
    """

    span: FrameSpan
    positive: Tensor
    negative: Tensor
    settings: Settings
    execution: Execution = Execution()
    transfer: str = "bt709"


class Frames:
    """Frames of a clip by their index; none is read before it is asked for."""

    def __init__(self, frames: Iterable[Tensor], start: int, *, held: int = 0) -> None:
        """start: index of the first of `frames`. held: how many can be had once more."""
        self._frames, self._next = frames, start
        self._coming: Iterator[Tensor] | None = None
        self._held: deque[Tensor] = deque(maxlen=held)

    def read(self, span: range) -> Iterator[Tensor]:
        """The frames in `span`, which begins amid those held, where the last one ended or later."""
        if self._coming is None:
            self._coming = iter(self._frames)
        again = max(self._next - span.start, 0)
        yield from list(self._held)[len(self._held) - again :][: len(span)]
        skipped = max(span.start - self._next, 0)
        for index, frame in enumerate(islice(self._coming, max(span.stop - self._next, 0))):
            self._next += 1
            self._held.append(frame)
            if index >= skipped:
                yield frame


def is_finite(x: Tensor) -> bool:
    """Returns whether all values are finite, from their sum, which takes no further memory."""
    return math.isfinite(x.sum(dtype=torch.float32))


@dataclass(frozen=True, kw_only=True, eq=False)
class ShotRestorer(ABC):
    """The restoration of one shot, with all that its steps share."""

    name: str
    shot: ShotJob
    model: StarModel
    vae: Any
    canvas: Canvas
    noise: FrameNoise | ReferenceNoise
    limits: MemoryLimits
    placement: DevicePlacement
    work: Work | None
    count: Counter

    @property
    def settings(self) -> Settings:
        return self.shot.settings

    @property
    def curve(self) -> TransferCurve:
        return curve_of(self.shot.transfer)

    def frames(self, to_encode: Frames, for_colors: Frames) -> Iterator[Tensor]:
        """Restored frames (c h w), code values like those of the source, on the CPU."""
        canvas, strength, wanted = self.canvas, self.settings.strength, self.shot.span.requested
        fix, curve = COLOR_FIXES[self.settings.sampling.color_fix], self.curve

        def limited(frame: Tensor) -> Tensor:
            return frame.clamp(0, 1) if curve.bounded else frame

        def bicubic(frame: Tensor) -> Tensor:
            return canvas.result(canvas.crop(limited(upsample(frame, canvas.size, "bicubic"))))

        def fixed(video: Tensor, source: Tensor) -> Tensor:
            whole = self.settings.behaviour.color_reference == "source"
            reference = (
                curve.to_network(source[:3]) if whole else canvas.crop(self._enlarged(source))
            )
            result = (canvas.unpadded(self._on_device(video)) / 2 + 0.5).clamp(0, 1)
            return curve.to_codes(canvas.result(fix(result, reference)))

        restored = unchanged = iter(())
        if strength == 1:
            restored = self.decode(self.restore_latents(to_encode), "latents")
        elif strength:
            found, given = tee(self.restore_latents(to_encode))
            restored, unchanged = self.decode(found, "latents"), self.decode(given, "hint")
        for source in map(self._on_device, for_colors.read(wanted)):
            if not strength:
                frame = bicubic(source)
            else:
                frame = fixed(next(restored), source)
                if strength < 1:
                    # Whatever the VAE adds or takes must be gone at strength 0.
                    lost = bicubic(source[:3]) - fixed(next(unchanged), source)
                    frame = limited(frame + (1 - strength) * lost)
                if not curve.bounded:  # what the network cannot see stays
                    enlarged = bicubic(source[:3])
                    seen = curve.to_codes(curve.to_network(enlarged))
                    frame = frame + strength * (enlarged - seen)
                if len(source) > 3:
                    frame = torch.cat([frame, bicubic(source[3:])])
            self.count.begin("decode")
            frame = frame.cpu()  # the device needs its memory for the next window
            yield frame
            self.count.add("decode")

    def _on_device(self, x: Tensor) -> Tensor:
        return send(x, self.placement.device)

    def _enlarged(self, frame: Tensor) -> Tensor:
        enlarged = upsample(frame[:3], self.canvas.size, self.settings.sampling.upsample)
        return self.curve.to_network(enlarged)

    def _by_vae(self, work: Callable[[], Tensor]) -> Tensor:
        """Returns what the VAE makes in `work`, in float32 where float16 overflows.

        ValueError if the result is not finite.
        """

        largest = max(self.canvas.view_size)

        def load_and_work() -> Tensor:
            self.placement.load(self.vae.model)
            return work()

        while True:
            result = retry_on_oom(load_and_work, lambda: self.limits.shrink_vae(largest))
            if is_finite(result):
                return result
            if not self.placement.widen(self.vae.model):
                raise ValueError(
                    "the VAE makes infinite values of this clip: choose --dtype float32, or "
                    "another file of the VAE"
                )
            _LOG.warning("the VAE overflows in float16: going on with it in float32")

    @abstractmethod
    def restore_latents(self, sources: Frames) -> Iterator[dict[str, Tensor]]:
        """Yields `latents`, restored, and the `hint` of some frames at a time, in order.

        sources: the decoded frames that are needed. `decode` of the same class takes the items.
        """

    @abstractmethod
    def decode(self, found: Iterable[dict[str, Tensor]], kind: str) -> Iterator[Tensor]:
        """Yields the wanted frames (3 h w) of what `restore_latents` yields.

        kind: "latents" for the restored frames, "hint" for the enlarged ones
        as the VAE decodes them.
        """

    def _vae_input(self, source: Tensor) -> Tensor:
        """Returns a frame as the VAE encodes it: enlarged, on its device, (1 3 h w) in [-1, 1]."""
        source = self._on_device(source[:3])
        enlarged = self._enlarged(shrunk(source, self.settings.shrink))
        return self.canvas.network_input(enlarged * 2 - 1, self.settings.behaviour)[None]

    def _sample(self, frames: range, size: Sequence[int]) -> Tensor | None:
        """Noise (1 c f h w) for a sample of the posterior; None where its mean is taken.

        frames: indices of the latents. size: height and width in pixels.
        """
        if self.settings.behaviour.posterior != "sample":
            return None
        shape = (1, self.vae.latent_channels, *(side // self.vae.factor for side in size))
        return torch.stack([self.noise.posterior(frame, shape) for frame in frames], dim=2)

    def _denoised(
        self,
        name: str,
        group: WindowGroup,
        hint: Tensor,
        given: Tensor | None,
        weight: Tensor,
        handed_on: int,
    ) -> dict[str, Tensor]:
        """Returns the restored latents of a piece, from its hint (1 c f h w).

        given: x_0 of its first latents at every evaluation (e 1 c f h w), as the piece before has
        found them. weight: how much of it counts at each, (f,). handed_on: how many of its last
        latents the next piece shares.
        Returns latents, hint, and in x_0s what is handed on.
        """
        settings, (schedule, sigmas) = self.settings, self.settings.levels
        sampling, network = settings.sampling, self.model.network
        if not settings.evaluations:
            return {"latents": hint.clone(), "hint": hint}
        denoiser = Denoiser(
            network=network,
            schedule=schedule,
            positive=self.shot.positive,
            negative=self.shot.negative,
            hint=hint,
            guidance_scale=guidance_of(sampling),
            guidance_rescale=sampling.cfg_rescale,
            dtype=next(network.parameters()).dtype,
            shortcuts=settings.shortcuts,
            last=sigmas[-2],
        )

        def denoise_window(x_in: Tensor, sigma: Tensor, window: range) -> Tensor:
            def look() -> Tensor:
                self.placement.load(network)
                with network.working(
                    slicing=self.limits.slicing,
                    tile=self.limits.network_tile,
                    attention_window=settings.shortcuts.attention_window,
                ):
                    return denoiser(x_in, sigma, window)

            largest = max(self.canvas.view_size)
            x_0 = retry_on_oom(look, lambda: self.limits.shrink_network(largest))
            if settings.strength < 1:
                lq = send(hint[:, :, window.start : window.stop], x_0.device, x_0.dtype)
                x_0 = torch.lerp(lq, x_0, settings.strength)
            self.count.add("denoise")
            return x_0

        denoise_windows = chunked(denoise_window, group.windows, settings.behaviour.merge)
        # What is reused between evaluations is not kept: such a piece begins anew.
        work = None if settings.shortcuts.remembers else self.work
        last = []

        def denoise(x_in: Tensor, sigma: Tensor) -> Tensor:
            number = len(last)
            kept = work and work.recall(f"{name}-{number:03}")
            if kept:
                x_0 = kept["x_0"].to(x_in)
                self.count.add("denoise", len(group.windows))
            else:
                x_0 = denoise_windows(x_in, sigma)
                if not last and not is_finite(x_0):  # later it would be found after hours
                    raise ValueError(
                        "the network makes infinite values of this clip: choose another --dtype, "
                        "such as bfloat16 or float32"
                    )
                if given is not None:
                    share = send(weight, x_0.device, x_0.dtype)[:, None, None]
                    shared = send(given[number], x_0.device, x_0.dtype)
                    x_0[:, :, : given.shape[3]].lerp_(shared, share)
                if work and number + 1 < settings.evaluations:
                    work.keep(f"{name}-{number:03}", {"x_0": x_0})
            last.append(stash(x_0[:, :, x_0.shape[2] - handed_on :]))
            return x_0

        self.count.begin("denoise")
        offset = self.shot.span.needed.start + group.frames.start
        t = torch.tensor([sampling.noise_level - 1])
        start = schedule.add_noise(hint, self.noise.initial(tuple(hint.shape), offset), t)
        latents = SAMPLERS[sampling.sampler](
            denoise,
            start.to(self.placement.device),
            sigmas,  # on the CPU: solvers branch on them at every step
            noise=self.noise.solver(tuple(hint.shape), sigmas, offset),
        ).cpu()
        return {"latents": latents, "hint": hint, "x_0s": torch.stack(last)}


class PerFrameRestorer(ShotRestorer):
    """Restores a shot by a VAE that encodes single frames: pieces share latents and results."""

    def restore_latents(self, sources: Frames) -> Iterator[dict[str, Tensor]]:
        """Yields restored latents and the hint of each frame needed, (1 c h w), in order."""
        groups, first = self.shot.span.groups, self.shot.span.needed.start
        coming = [after.shared for after in groups[1:]] + [0]
        done: dict[str, Tensor] = {}
        for number, (group, handed_on) in enumerate(zip(groups, coming, strict=True)):
            name = f"{self.name}-{number:05}"
            begin, before = first + group.frames.start, done
            new = range(begin + group.shared, begin + len(group.frames))
            done = (self.work and self.work.recall(name)) or {}
            if done:
                self.count.add("encode", len(new))
                self.count.add("denoise", self.settings.evaluations * len(group.windows))
            else:
                hint = self._encoded(sources, new)
                if group.shared:
                    hint = torch.cat([before["hint"][:, :, -group.shared :], hint], dim=2)
                falling = 1 - ramp(group.shared)
                done = self._denoised(name, group, hint, before.get("x_0s"), falling, handed_on)
                if self.work:
                    self.work.finish(name, done)
            # What the next piece has too, it finishes.
            finished = slice(len(group.frames) - handed_on)
            both = (done[kind][:, :, finished].unbind(2) for kind in ("latents", "hint"))
            for restored, given in zip(*both, strict=True):
                yield {"latents": restored, "hint": given}

    def _encoded(self, sources: Frames, span: range) -> Tensor:
        """Latents (1 c f h w) of some frames, as the network's hint."""
        self.count.begin("encode")
        z_lq = []
        for index, source in zip(span, sources.read(span), strict=True):
            look = self._vae_input(source)
            noise = self._sample(range(index, index + 1), look.shape[-2:])
            sample = None if noise is None else noise[:, :, 0]

            def encode(look: Tensor = look, sample: Tensor | None = sample) -> Tensor:
                return self.vae.encode_frame(look, noise=sample, tile=self.limits.vae_tile)

            z_lq.append(self._by_vae(encode).cpu())
            self.count.add("encode")
        return torch.stack(z_lq, dim=2)

    def decode(self, found: Iterable[dict[str, Tensor]], kind: str) -> Iterator[Tensor]:
        span = self.shot.span

        def decode(latents: Tensor) -> Tensor:
            return self._by_vae(lambda: self.vae.decode_window(latents, tile=self.limits.vae_tile))

        latents = (each[kind] for each in found)
        videos = decode_in_windows(decode, latents, span.decode_windows)
        frames = (frame for video in videos for frame in video[0].unbind(1))
        before = span.requested.start - span.needed.start - span.decode_windows[0].start
        return islice(frames, before, None)


class PerWindowRestorer(ShotRestorer):
    """Restores a shot by a VAE whose latents hold several frames: each piece by itself."""

    def restore_latents(self, sources: Frames) -> Iterator[dict[str, Tensor]]:
        """Yields latents, hint and the restored `video` (1 3 f h w) of each piece."""
        first = self.shot.span.needed.start
        video = torch.empty(0)
        for number, group in enumerate(self.shot.span.groups):
            name = f"{self.name}-{number:05}"
            window = range(first + group.frames.start, first + group.frames.stop)
            new = len(window) - group.shared
            done = (self.work and self.work.recall(name)) or {}
            if done:
                self.count.add("encode", new)
                self.count.add("denoise", self.settings.evaluations)
            else:
                self.count.begin("encode")
                looks = [self._vae_input(s).cpu() for s in sources.read(window)]
                looks = torch.stack(looks, dim=2)
                hint = self._encoded(looks, window.start)
                self.count.add("encode", new)
                held = torch.empty(0)
                if group.shared and self.settings.chunk.hold:
                    whole = (group.shared - 1) // self.vae.latent_frames * self.vae.latent_frames
                    shared = video[:, :, video.shape[2] - group.shared :][:, :, : whole + 1]
                    held = self._encoded(shared.clamp(-1, 1), window.start)
                    held = held.expand(self.settings.evaluations, *held.shape)
                given, weight = (held, torch.ones(held.shape[3])) if len(held) else (None, held)
                done = self._denoised(name, group, hint, given, weight, 0)
                if self.work:
                    self.work.finish(name, done)
            video = self._video(done["latents"])[:, :, : len(window)]
            yield {**done, "video": video}

    def _encoded(self, looks: Tensor, first: int) -> Tensor:
        """Latents (1 c f h w) of a window (1 3 f h w), filled up with its last frame."""
        missing = (1 - looks.shape[2]) % self.vae.latent_frames
        looks = torch.cat([looks, *[looks[:, :, -1:]] * missing], dim=2)
        count = (looks.shape[2] - 1) // self.vae.latent_frames + 1
        noise = self._sample(range(first, first + count), looks.shape[-2:])

        def encode() -> Tensor:
            return self.vae.encode(looks, noise=noise, tile=self.limits.vae_tile)

        return self._by_vae(encode).cpu()

    def _video(self, latents: Tensor) -> Tensor:
        """The frames (1 3 f h w) of a window, in main memory, because they are many."""
        return self._by_vae(lambda: self.vae.decode(latents, tile=self.limits.vae_tile)).cpu()

    def decode(self, found: Iterable[dict[str, Tensor]], kind: str) -> Iterator[Tensor]:
        span = self.shot.span
        windows = [group.frames for group in span.groups]

        def video(found: dict[str, Tensor], window: range) -> Tensor:
            if kind == "latents":
                return found["video"]
            return self._video(found[kind])[:, :, : len(window)]

        videos = blend_windows(map(video, found, windows), windows)
        frames = (frame for video in videos for frame in video[0].unbind(1))
        return islice(frames, span.requested.start - span.needed.start, None)
