"""What is minimised: velocity loss plus DF loss of a batch, and how a batch is drawn."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backbones import Network
from ..diffusion.levels import trained_schedule
from ..diffusion.schedule import NoiseSchedule
from ..losses import DFLossConfig, df_loss, velocity_loss
from ..models.unet import hint_prior_velocity
from ..sampling_defaults import SamplingDefaults
from ..star_checkpoint import LearnedPrompts
from .pixels import Decoder, PixelCrop, decoded_part, random_crop

Trains = Literal["all", "star", "lora"]
RESTORE, DEGRADE, SHARPEN = range(3)
FLOOR = 1e-4  # squared error, in pixels, below which no clip is left to be restored


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """steps: optimiser steps in all. batch: samples of each process in a step.

    trains: all of the network; "star", its ControlNet and LIEM, as STAR was trained; or "lora".
    optimizer: "muon" trains the large matrices by torch's Muon, at this learning rate too, the
    rest by AdamW; from scratch it learns in fewer steps.
    decay_from: step at which the learning rate starts to fall to zero along a cosine.
    noise_level: no timestep at or above it is trained. early: share of samples drawn from the
    last quarter below it, where sampling starts and most is decided. start: share of samples at
    the very noise level that sampling starts from.
    own: latents at all other levels are those that sampling meets there: noise on what the network
    itself makes of the hint, in place of noise on the clean clip.
    degraded: share of samples that learn, under the negative prompt, to leave the hint as it is.
    sharp: share that learn, under the sharp prompt, to please a perceptual metric too, whose
    weight beside the velocity loss is `perceptual`.
    clip: largest norm of all gradients together. ema: decay of the average that is written.
    bf16: whether the network computes in bfloat16. checkpointing: activations are computed again
    on the way back instead of kept.
    shift: of the schedule, see `SamplingDefaults`.
    df_space: where spectra are compared, in latents, or in pixels of a decoded `crop`.
    """

    steps: int
    batch: int = 3
    trains: Trains = "all"
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-4
    decay_from: int | None = None
    warmup: int = 100
    noise_level: int = 900
    early: float = 0.85
    start: float = 0.0
    own: bool = False
    degraded: float = 0.1
    sharp: float = 0.0
    perceptual: float = 2.0
    clip: float = 1.0
    ema: float = 0.995
    seed: int = 0
    bf16: bool = False
    checkpointing: bool = False
    shift: float = 1.0
    df: DFLossConfig = field(default_factory=DFLossConfig)
    df_space: Literal["latents", "pixels"] = "latents"
    crop: PixelCrop = field(default_factory=PixelCrop)

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps}, {self.batch}")
        if min(self.degraded, self.sharp) < 0 or self.degraded + self.sharp > 1:
            raise ValueError(
                f"shares of samples must be from 0 to 1 together, got {self.degraded} degraded and "
                f"{self.sharp} sharp"
            )


class Sample(NamedTuple):
    """hq, lq: latents (c f h w). text: its embedding (l d), None where prompts are learned."""

    hq: Tensor
    lq: Tensor
    text: Tensor | None = None


class Samples(Protocol):
    """Something to train on."""

    def sample(self, generator: torch.Generator) -> Sample: ...


class Batch(NamedTuple):
    """Samples with their draws. hq, lq, noise (b c f h w), t (b,).

    task: RESTORE, DEGRADE or SHARPEN (b,). parts: what of each sample's latents is decoded for
    losses in pixels.
    """

    hq: Tensor
    lq: Tensor
    noise: Tensor
    t: Tensor
    task: Tensor
    text: Tensor | None
    parts: list[tuple[slice, slice, slice]]


class Prompts(nn.Module):
    """Learned text embeddings (1 l d) in place of a text encoder, see `LearnedPrompts`."""

    positive: nn.Parameter
    negative: nn.Parameter
    sharp: nn.Parameter | None

    def __init__(self, learned: LearnedPrompts) -> None:
        super().__init__()
        for name, value in learned._asdict().items():
            parameter = None if value is None else nn.Parameter(value.detach().float().clone())
            self.register_parameter(name, parameter)

    def learned(self) -> LearnedPrompts:
        return LearnedPrompts(self.positive, self.negative, self.sharp)

    def of_tasks(self, tasks: Tensor) -> Tensor:
        """(b,) -> (b l d)."""
        # All of them take part, or processes would wait for gradients that others do not have.
        by_task = self.positive, self.negative, self.sharp
        return torch.cat([prompt for prompt in by_task if prompt is not None])[tasks]


class TrainingObjective(nn.Module):
    """Network, prompts and loss in one module, so that its gradients are shared by processes.

    shown: kernel of `linear_decoder`. Then errors of the clean clip count in place of those of the
    velocity, as pixels show them, and in shares of the hint's.
    perceptual: distance (b,) of two batches of pictures (b 3 h w) in [0, 1], of what is sharpened.
    """

    pixel_kernel: Tensor | None

    def __init__(
        self,
        network: Network,
        config: TrainConfig,
        *,
        prompts: Prompts | None = None,
        decoder: Decoder | None = None,
        pixel_kernel: Tensor | None = None,
        perceptual: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network, self.prompts = network, prompts
        self.config, self.decoder, self.perceptual = config, decoder, perceptual
        self.register_buffer("shown", pixel_kernel, persistent=False)
        if config.df_space == "pixels" and decoder is None:
            raise ValueError("a DF loss in pixels needs the VAE's decoder")
        if config.sharp and (decoder is None or perceptual is None or prompts is None):
            raise ValueError("sharpening needs learned prompts, the VAE's decoder and a metric")

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(loss, its parts)."""
        config, network = self.config, self.network
        schedule = trained_schedule(
            SamplingDefaults(schedule=network.config.schedule, shift=config.shift)
        )
        t, lq, noise = batch.t, batch.lq, batch.noise
        degraded = batch.task == DEGRADE
        x_0 = torch.where(degraded[:, None, None, None, None], lq, batch.hq)
        y = batch.text
        if self.prompts is not None:
            y = self.prompts.of_tasks(batch.task)
        assert y is not None, "neither text nor learned prompts"
        x_t = schedule.add_noise(x_0, noise, t)
        if config.own:
            x_t = schedule.add_noise(self._met(schedule, batch, y), noise, t)
        v = self._velocity(x_t, t, y, lq)
        clean = schedule.x_0(x_t, v, t)
        if self.pixel_kernel is None:
            uncertainty = torch.ones((), device=v.device)
            if spread := network.config.hint_prior:
                # In units of what the hint leaves open, all noise levels count alike.
                _, uncertainty = hint_prior_velocity(x_t, t, lq, spread)
            target = schedule.velocity(x_0, noise, t)
            velocity = velocity_loss(v / uncertainty, target / uncertainty)
        else:
            velocity = seen_energy(clean - x_0, self.pixel_kernel)
            velocity = velocity / (seen_energy(lq - batch.hq, self.pixel_kernel) + FLOOR)
        frequency = torch.zeros_like(velocity)
        if config.df.beta:
            ours, theirs = clean, x_0
            if config.df_space == "pixels":
                ours, theirs = (self._decoded(z, batch.parts) for z in (ours, theirs))
            frequency = df_loss(ours, theirs, t, config.df)
        loss = velocity + frequency
        kept, sharp = ~degraded, batch.task == SHARPEN
        parts = {
            "velocity": velocity[kept].mean().item() if kept.any() else float("nan"),
            "df": frequency.mean().item(),
        }
        if sharp.any():
            assert self.perceptual is not None
            of = [part for part, chosen in zip(batch.parts, sharp.tolist(), strict=True) if chosen]
            both = (self._decoded(z[sharp], of) for z in (clean, x_0))
            pictures = (rearrange(z, "b c f h w -> (b f) c h w") / 2 + 0.5 for z in both)
            distance = self.perceptual(*pictures).view(len(of), -1).mean(1)
            parts["perceptual"] = distance.mean().item()
            loss = loss.index_add(0, sharp.nonzero().flatten(), config.perceptual * distance)
        return loss.mean(), parts

    def _velocity(self, x_t: Tensor, t: Tensor, y: Tensor, lq: Tensor) -> Tensor:
        mixed = torch.autocast(x_t.device.type, torch.bfloat16)
        with mixed if self.config.bf16 else nullcontext():
            return self.network(x_t, t, y, lq).float()

    @torch.no_grad()
    def _met(self, schedule: NoiseSchedule, batch: Batch, y: Tensor) -> Tensor:
        """What is under the noise when sampling comes to each sample's level: at the first the
        hint, later what the network has made of it."""
        first, met = self.config.noise_level - 1, batch.lq.clone()
        if (later := batch.t < first).any():
            lq, noise = batch.lq[later], batch.noise[later]
            t = torch.full_like(batch.t[later], first)
            x_t = schedule.add_noise(lq, noise, t)
            met[later] = schedule.x_0(x_t, self._velocity(x_t, t, y[later], lq), t)
        return met

    def _decoded(self, latents: Tensor, parts: list[tuple[slice, slice, slice]]) -> Tensor:
        assert self.decoder is not None
        margin = self.config.crop.margin
        pixels = [
            decoded_part(self.decoder.decode, sample, part, self.decoder.factor, margin)
            for sample, part in zip(latents.split(1), parts, strict=True)
        ]
        return torch.cat(pixels)


def seen_energy(latents: Tensor, pixel_kernel: Tensor) -> Tensor:
    """Mean square (b,) of what a difference of latents (b c f h w) is in pixels."""
    frames = rearrange(latents, "b c f h w -> (b f) c h w")
    pixels = F.conv2d(frames, pixel_kernel, padding=1)
    return pixels.square().view(len(latents), -1).mean(1)


def number_of(*what: object) -> int:
    """A seed that belongs to the names and numbers given."""
    digest = hashlib.blake2b(" ".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def sample_generator(seed: int, index: int) -> torch.Generator:
    """Of sample number `index` of a run, whichever process draws it."""
    return torch.Generator().manual_seed(number_of(seed, "sample", index))


def draw_timestep(config: TrainConfig, generator: torch.Generator) -> int:
    u, early, start = torch.rand(3, generator=generator).tolist()
    if start < config.start:
        return config.noise_level - 1
    if early < config.early:
        u = 0.75 + 0.25 * u
    return int(u * config.noise_level)


def draw_batch(data: Samples, indices: range, config: TrainConfig) -> Batch:
    """Samples of these numbers with timesteps, noise and all else that is drawn."""
    samples, t, noise, tasks, parts = [], [], [], [], []
    for index in indices:
        generator = sample_generator(config.seed, index)
        sample = data.sample(generator)
        samples.append(sample)
        t.append(draw_timestep(config, generator))
        noise.append(torch.randn(sample.hq.shape, generator=generator))
        chance = torch.rand((), generator=generator).item()
        degraded = sample.text is None and chance < config.degraded
        sharp = config.degraded <= chance < config.degraded + config.sharp
        tasks.append(DEGRADE if degraded else SHARPEN if sharp else RESTORE)
        if config.df_space == "pixels" or config.sharp:
            frames, height, width = sample.hq.shape[1:]
            parts.append(random_crop((frames, height, width), config.crop, generator))
    texts = [sample.text for sample in samples if sample.text is not None]
    return Batch(
        hq=torch.stack([sample.hq for sample in samples]),
        lq=torch.stack([sample.lq for sample in samples]),
        noise=torch.stack(noise),
        t=torch.tensor(t),
        task=torch.tensor(tasks),
        text=torch.stack(texts) if texts else None,
        parts=parts,
    )
