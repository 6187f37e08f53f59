"""Trains STAR's network on latent pairs: velocity loss plus DF loss, resumable."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbones import SD_LATENTS, LatentFormat, SamplingDefaults
from ..checkpoints import LearnedPrompts, StarModel, save_model
from ..diffusion.schedule import star_schedule
from ..losses import DFLossConfig, df_loss, velocity_loss
from ..models.encoder import UNetConfig
from ..models.unet import ControlledVideoUNet, hint_prior_velocity
from .pairs import LatentPairs

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, dict[str, float]], None]

MODEL_FILE = "tiny.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """steps: optimiser steps in all. crop: frames, height, width of a sample in latents.

    noise_level: no timestep at or above it is trained. early: share of samples drawn from the
    last quarter below it, where sampling starts and most is decided.
    degraded: share of samples that learn, under the negative prompt, to leave the hint as it is.
    decay_from: step at which the learning rate starts to fall to zero along a cosine.
    """

    steps: int
    batch: int = 3
    crop: tuple[int, int, int] = (5, 26, 28)
    learning_rate: float = 1.5e-3
    decay_from: int | None = None
    warmup: int = 100
    noise_level: int = 900
    early: float = 0.85
    degraded: float = 0.1
    ema: float = 0.995
    seed: int = 0
    df: DFLossConfig = field(default_factory=DFLossConfig)


class Prompts(nn.Module):
    """Two learned text embeddings (1 l d) in place of a text encoder: restored and degraded."""

    def __init__(self, tokens: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.randn(1, tokens, dim, generator=generator))
        self.negative = nn.Parameter(torch.randn(1, tokens, dim, generator=generator))


class Trained(nn.Module):
    """All that has gradients."""

    def __init__(self, network: ControlledVideoUNet, prompts: Prompts) -> None:
        super().__init__()
        self.network, self.prompts = network, prompts


def start_from_hint(network: ControlledVideoUNet) -> None:
    """The untrained network predicts its hint prior, and its ControlNet sees the hint alone.

    Most samples are nearly pure noise; a ControlNet that starts from noise and hint mixed spends
    its first thousands of samples on telling them apart.
    """
    noise_input = network.VideoControlNet.input_blocks[0]
    assert isinstance(noise_input, nn.ModuleList)
    for layer in (network.out[-1], noise_input[0]):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def draw_timesteps(count: int, config: TrainConfig, generator: torch.Generator) -> Tensor:
    u = torch.rand(count, generator=generator)
    early = torch.rand(count, generator=generator) < config.early
    u = torch.where(early, 0.75 + 0.25 * u, u)
    return (u * config.noise_level).long()


def training_loss(
    network: ControlledVideoUNet,
    prompts: Prompts,
    hq: Tensor,
    lq: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """One batch: hq and lq latents (b c f h w) -> (loss, its parts)."""
    schedule = star_schedule()
    t = draw_timesteps(len(hq), config, generator)
    degraded = torch.rand(len(hq), generator=generator) < config.degraded
    choose = degraded[:, None, None, None, None]
    x_0 = torch.where(choose, lq, hq)
    y = torch.where(degraded[:, None, None], prompts.negative, prompts.positive)
    noise = torch.randn(x_0.shape, generator=generator)
    x_t = schedule.add_noise(x_0, noise, t)
    v = network(x_t, t, y, lq)
    # In units of what the hint leaves open, all noise levels count alike.
    _, uncertainty = hint_prior_velocity(x_t, t, lq, network.config.hint_prior)
    velocity = velocity_loss(v / uncertainty, schedule.velocity(x_0, noise, t) / uncertainty)
    frequency = df_loss(schedule.x_0(x_t, v, t), x_0, t, config.df)
    kept = ~degraded
    parts = {
        "velocity": velocity[kept].mean().item() if kept.any() else float("nan"),
        "df": frequency.mean().item(),
    }
    return (velocity + frequency).mean(), parts


def learning_rate(step: int, config: TrainConfig) -> float:
    rate = config.learning_rate * min(1.0, (step + 1) / config.warmup)
    start = config.steps if config.decay_from is None else config.decay_from
    if step >= start:
        fraction = torch.tensor((step - start) / max(1, config.steps - start))
        rate *= 0.5 * (1 + torch.cos(torch.pi * fraction).item())
    return rate


def train(
    data: LatentPairs,
    network_config: UNetConfig,
    config: TrainConfig,
    sampling: SamplingDefaults,
    out: Path,
    *,
    latents: LatentFormat = SD_LATENTS,
    init: StarModel | None = None,
    on_step: OnStep | None = None,
    every: int = 500,
) -> None:
    """Trains, or goes on where `out`/state.pt stopped; writes `out`/tiny.safetensors (float16).

    The written weights are an exponential moving average. init: a trained model of the same
    geometry to start from, with its prompts; None starts from the hint.
    on_step(step, steps, parts) is called after each step; an exception from it ends training with
    nothing lost but the steps since the last checkpoint (`every` steps).
    """
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # layer initialisation takes no generator
        network = ControlledVideoUNet(network_config)
    start_from_hint(network)
    prompts = Prompts(4, network_config.context_dim, generator)
    if init is not None:
        assert init.prompts is not None
        network.load_state_dict(init.network.state_dict())
        prompts.load_state_dict(init.prompts._asdict())
    trained = Trained(network, prompts)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    average = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema)
    )
    first = 0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        trained.load_state_dict(state["trained"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
        logger.info("resuming at step %d", first)

    def save(step: int) -> None:
        state = {
            "trained": trained.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "step": step,
        }
        temporary = state_file.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(state_file)
        averaged = average.module
        assert isinstance(averaged, Trained)
        save_model(
            out / MODEL_FILE,
            averaged.network,
            sampling=sampling,
            latents=latents,
            prompts=LearnedPrompts(averaged.prompts.positive, averaged.prompts.negative),
            dtype=torch.float16,
            metadata={"steps": str(step)},
            overwrite=True,
        )

    for step in range(first, config.steps):
        if step % every == 0:
            data.refresh()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        hq, lq = data.draw(config.batch, config.crop, generator)
        loss, parts = training_loss(network, prompts, hq, lq, config, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(trained)
        if on_step is not None:
            on_step(step + 1, config.steps, parts)
        if (step + 1) % every == 0 or step + 1 == config.steps:
            save(step + 1)
