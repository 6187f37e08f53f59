"""Training objectives: their interface, STAR's velocity loss plus DF loss, and random batches."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import compress
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
FLOOR = 1e-4  # added to the hint's mean squared error in pixels, so that its inverse is bounded


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run.

    steps: optimizer steps in all. batch: samples of each process in a step.
    trains: what is trained: all of the network; "star", its ControlNet and LIEM, as STAR was; or
    "lora", its LoRA.
    optimizer: "muon" trains large matrices by torch's Muon at the same learning rate, the rest by
    AdamW; from scratch it needs fewer steps.
    warmup: steps until the full learning rate. decay_from: step at which the learning rate starts
    to decay to zero along a cosine; None for no decay.
    noise_level: timesteps from 0 to below it are trained. early: share of samples from the highest
    quarter of them, where sampling starts. start: share of samples at the highest timestep.
    own: at lower timesteps the noisy latents are made from the network's own result at the highest
    one, as in sampling, instead of from the clean clip.
    degraded: share of samples that learn, with the negative prompt, to return the hint unchanged.
    sharp: share of samples that, with the sharp prompt, are also trained by a perceptual metric,
    with weight `perceptual`.
    clip: largest norm of all gradients together. ema: decay of the moving average of the weights.
    bf16: whether the network computes in bfloat16. checkpointing: whether activations are
    recomputed in the backward pass. shift: of the schedule, see `SamplingDefaults`.
    df: DF loss. df_space: whether it compares latents, or pixels of a decoded `crop`.
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
                f"the sum of shares must be from 0 to 1, got {self.degraded} degraded and "
                f"{self.sharp} sharp"
            )


class Sample(NamedTuple):
    """Latents hq and lq (c f h w) of a clean and a degraded clip, and the embedding of its text.

    text: (l d), None if prompts are learned.
    """

    hq: Tensor
    lq: Tensor
    text: Tensor | None = None


class Samples(Protocol):
    """Random samples to train on."""

    def sample(self, generator: torch.Generator) -> Sample:
        """Returns a random sample, the same for the same state of the generator."""
        ...


class Batch(NamedTuple):
    """Samples hq, lq (b c f h w), text (b l d) with random noise (b c f h w) and timesteps t (b,).

    task: RESTORE, DEGRADE or SHARPEN (b,). parts: frames, rows and columns of each sample's latents
    that are decoded for losses in pixels. seeds: of what else an objective draws for each sample.
    """

    hq: Tensor
    lq: Tensor
    noise: Tensor
    t: Tensor
    task: Tensor
    text: Tensor | None
    parts: list[tuple[slice, slice, slice]]
    seeds: list[int]


class Prompts(nn.Module):
    """Learned text embeddings (1 l d) instead of a text encoder, see `LearnedPrompts`."""

    positive: nn.Parameter
    negative: nn.Parameter
    sharp: nn.Parameter | None

    def __init__(self, learned: LearnedPrompts) -> None:
        super().__init__()
        for name, value in learned._asdict().items():
            parameter = None if value is None else nn.Parameter(value.detach().float().clone())
            self.register_parameter(name, parameter)

    def learned(self) -> LearnedPrompts:
        """Returns the embeddings as they are stored in a file."""
        return LearnedPrompts(self.positive, self.negative, self.sharp)

    def of_tasks(self, tasks: Tensor) -> Tensor:
        """Returns the embeddings (b l d) for tasks (b,)."""
        # All embeddings take part in the graph: every process must have the same gradients.
        by_task = self.positive, self.negative, self.sharp
        return torch.cat([prompt for prompt in by_task if prompt is not None])[tasks]


class Objective(nn.Module, ABC):
    """A network and the loss that a trainer minimises, in one module, whose gradients are shared.

    `trainer.train` knows only this class: called with a `Batch`, an objective returns the loss and
    its parts by name as numbers.

    config: its loss options are read here. prompts: learned prompts; None if samples have texts.
    decoder: for losses in pixels. ValueError if `config` asks for one and there is no decoder.
    """

    def __init__(
        self,
        network: Network,
        config: TrainConfig,
        *,
        prompts: Prompts | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        self.network, self.prompts = network, prompts
        self.config, self.decoder = config, decoder
        if config.df_space == "pixels" and decoder is None:
            raise ValueError("a DF loss in pixels needs the VAE's decoder")

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss of a batch, and its parts by name as numbers."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule that the network is trained with."""
        sampling = SamplingDefaults(schedule=self.network.config.schedule, shift=self.config.shift)
        return trained_schedule(sampling)

    def embeddings(self, batch: Batch) -> Tensor:
        """Returns the text embeddings (b l d) of a batch: learned, or those of its samples."""
        y = batch.text if self.prompts is None else self.prompts.of_tasks(batch.task)
        assert y is not None, "neither text nor learned prompts"
        return y

    def autocast(self, x: Tensor) -> torch.autocast:
        """Returns a context that computes in bfloat16, if so configured, on the device of x."""
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.bf16)

    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor, lq: Tensor) -> Tensor:
        """Runs the network, in bfloat16 if so configured, and returns float32 (b c f h w)."""
        with self.autocast(x_t):
            return self.network(x_t, t, y, lq).float()

    def velocity_error(self, v: Tensor, x_t: Tensor, x_0: Tensor, batch: Batch) -> Tensor:
        """Returns the mean squared error (b,) of a velocity v that should lead from x_t to x_0.

        v, x_t, x_0: (b c f h w). With a hint prior it is relative to the uncertainty that the hint
        leaves, so that all noise levels weigh the same.
        """
        uncertainty = torch.ones((), device=v.device)
        if spread := getattr(self.network.config, "hint_prior", 0.0):
            _, uncertainty = hint_prior_velocity(x_t, batch.t, batch.lq, spread)
        target = self.schedule.velocity_between(x_t, x_0, batch.t)
        return velocity_loss(v / uncertainty, target / uncertainty)

    def df_error(self, clean: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Returns the DF loss (b,) of predicted latents (b c f h w), in the configured space."""
        config = self.config
        if not config.df.beta:
            return torch.zeros(len(clean), device=clean.device)
        if config.df_space == "pixels":
            clean, target = (self.decoded(z, batch.parts) for z in (clean, target))
        return df_loss(clean, target, batch.t, config.df)

    def decoded(self, latents: Tensor, parts: list[tuple[slice, slice, slice]]) -> Tensor:
        """Decodes the part of each sample (b c f h w) to pixels (b 3 f h w)."""
        assert self.decoder is not None
        margin = self.config.crop.margin
        pixels = [
            decoded_part(self.decoder.decode, sample, part, self.decoder.factor, margin)
            for sample, part in zip(latents.split(1), parts, strict=True)
        ]
        return torch.cat(pixels)


class TrainingObjective(Objective):
    """STAR's objective, velocity loss plus DF loss, with the additions of the built-in model.

    network, config, prompts, decoder: see `Objective`.
    pixel_kernel: from `linear_decoder`; the error of the clean clip in approximate pixels, relative
    to that of the hint, then takes the place of the velocity loss.
    perceptual: distance (b,) of two batches of pictures (b 3 h w) in [0, 1], for SHARPEN.

    ValueError if `config` asks for a loss whose decoder, metric or prompts are missing.
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
        super().__init__(network, config, prompts=prompts, decoder=decoder)
        self.perceptual = perceptual
        self.register_buffer("pixel_kernel", pixel_kernel, persistent=False)
        if config.sharp and (decoder is None or perceptual is None or prompts is None):
            raise ValueError("sharpening needs learned prompts, the VAE's decoder and a metric")

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss of a batch, and its parts by name as numbers."""
        config, schedule = self.config, self.schedule
        t, lq, noise = batch.t, batch.lq, batch.noise
        degraded = batch.task == DEGRADE
        x_0 = torch.where(degraded[:, None, None, None, None], lq, batch.hq)
        y = self.embeddings(batch)
        x_t = schedule.add_noise(x_0, noise, t)
        if config.own:
            x_t = schedule.add_noise(self._own_x_0(schedule, batch, y), noise, t)
        v = self.velocity(x_t, t, y, lq)
        clean = schedule.x_0(x_t, v, t)
        if self.pixel_kernel is None:
            velocity = self.velocity_error(v, x_t, x_0, batch)
        else:
            velocity = pixel_energy(clean - x_0, self.pixel_kernel)
            velocity = velocity / (pixel_energy(lq - batch.hq, self.pixel_kernel) + FLOOR)
        frequency = self.df_error(clean, x_0, batch)
        loss = velocity + frequency
        restored, sharp = ~degraded, batch.task == SHARPEN
        parts = {
            "velocity": velocity[restored].mean().item() if restored.any() else float("nan"),
            "df": frequency.mean().item(),
        }
        if sharp.any():
            assert self.perceptual is not None
            crops = list(compress(batch.parts, sharp.tolist()))
            both = (self.decoded(z[sharp], crops) for z in (clean, x_0))
            pictures = (rearrange(z, "b c f h w -> (b f) c h w") / 2 + 0.5 for z in both)
            distance = self.perceptual(*pictures).view(len(crops), -1).mean(1)
            parts["perceptual"] = distance.mean().item()
            loss = loss.index_add(0, sharp.nonzero().flatten(), config.perceptual * distance)
        return loss.mean(), parts

    @torch.no_grad()
    def _own_x_0(self, schedule: NoiseSchedule, batch: Batch, y: Tensor) -> Tensor:
        """Returns what sampling adds noise to at each sample's timestep.

        That is the hint at the first timestep, and later the network's own result.
        """
        first, x_0 = self.config.noise_level - 1, batch.lq.clone()
        if (later := batch.t < first).any():
            lq, noise = batch.lq[later], batch.noise[later]
            t = torch.full_like(batch.t[later], first)
            x_t = schedule.add_noise(lq, noise, t)
            x_0[later] = schedule.x_0(x_t, self.velocity(x_t, t, y[later], lq), t)
        return x_0


def pixel_energy(latents: Tensor, pixel_kernel: Tensor) -> Tensor:
    """Returns the mean square in pixels (b,) of a difference of latents (b c f h w).

    pixel_kernel: from `linear_decoder`.
    """
    frames = rearrange(latents, "b c f h w -> (b f) c h w")
    pixels = F.conv2d(frames, pixel_kernel, padding=1)
    return pixels.square().view(len(latents), -1).mean(1)


def number_of(*key: object) -> int:
    """Returns a seed that is a hash of names and numbers."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def sample_generator(seed: int, index: int) -> torch.Generator:
    """Returns the generator of sample number `index` of a run, the same in every process."""
    return torch.Generator().manual_seed(number_of(seed, "sample", index))


def draw_timestep(config: TrainConfig, generator: torch.Generator) -> int:
    """Returns a random timestep below `config.noise_level`."""
    u, early, start = torch.rand(3, generator=generator).tolist()
    if start < config.start:
        return config.noise_level - 1
    if early < config.early:
        u = 0.75 + 0.25 * u
    return int(u * config.noise_level)


def draw_batch(data: Samples, indices: range, config: TrainConfig) -> Batch:
    """Draws the samples of these numbers, with their timesteps, noise, tasks and crops."""
    samples, t, noise, tasks, parts, seeds = [], [], [], [], [], []
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
        frames, height, width = sample.hq.shape[1:]
        parts.append(random_crop((frames, height, width), config.crop, generator))
        seeds.append(int(torch.randint(2**62, (), generator=generator)))
    texts = [sample.text for sample in samples if sample.text is not None]
    return Batch(
        hq=torch.stack([sample.hq for sample in samples]),
        lq=torch.stack([sample.lq for sample in samples]),
        noise=torch.stack(noise),
        t=torch.tensor(t),
        task=torch.tensor(tasks),
        text=torch.stack(texts) if texts else None,
        parts=parts,
        seeds=seeds,
    )
