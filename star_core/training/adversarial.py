"""Distillation with an adversarial loss: heads on the teacher's features judge the student.

Heads on the features of the frozen ControlNet learn to tell the student's results from clean clips,
both noised (latent adversarial diffusion distillation: Sauer et al. 2024, arXiv:2403.12015), and
the student learns to deceive them. As a second stage this can add detail that a mean error averages
away. It is added to the consistency loss and judges every phase at its end, as in Wang et al. 2024,
arXiv:2405.18407.

Real are the clean clips of the data, as in Lin et al. 2025 (arXiv:2501.08316), not results of the
teacher: those take tens of evaluations a sample and would bound the student, and what they are for
in latent adversarial diffusion distillation, results that fit the prompt, the hint provides here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..backbones import NetworkConfig
from ..lora import lora_strength
from ..models.unet import ControlledVideoUNet, UNetConfig
from .distillation import DistillationObjective, Predicted
from .objective import Batch

WIDTH = 64  # channels of a head


class Heads(nn.ModuleList):
    """A head for the features of each level; they have no opinion before training.

    channels: of the features of each level.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__(map(_head, channels))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns how real each place of each level is (b·f 1 h w), above 0 for clean clips.

        features: of each level, (b·f c h w).
        """
        return [head(x).float() for head, x in zip(self, features, strict=True)]


def _head(channels: int) -> nn.Module:
    last = nn.Conv2d(WIDTH, 1, 1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(
        nn.GroupNorm(1, channels),
        nn.Conv2d(channels, WIDTH, 1),
        nn.SiLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.SiLU(),
        last,
    )


def heads_of(config: NetworkConfig, **placement: Any) -> Heads:
    """Returns untrained heads for a network. placement: device and dtype.

    ValueError for a network without a ControlNet.
    """
    if not isinstance(config, UNetConfig):
        raise ValueError(
            "an adversarial loss needs a network with a ControlNet, which that of CogVideoX does "
            "not have: leave it out"
        )
    return Heads([config.dim * mult for mult in config.dim_mult]).to(**placement)


class AdversarialObjective(DistillationObjective):
    """Adds `DistillConfig.adversarial` times an adversarial loss to that of a distillation.

    The heads are trained with the LoRA, by the same optimizer and on the same samples, with a hinge
    loss. Arguments are those of `DistillationObjective`. ValueError for a network without a
    ControlNet.
    """

    network: ControlledVideoUNet

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)  # layer initialisation takes no generator
            self.heads = heads_of(self.network.config)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss of a batch, and its parts by name as numbers.

        "adversarial" is 0 for results that look neither real nor false, "heads" is 2 for heads that
        tell nothing apart and 0 for heads that are sure.
        """
        predicted = self.predict(batch)
        false, real, t = self._noised(predicted, batch)
        shown = self._features(false, t, predicted.y, batch.lq)
        with torch.no_grad():
            clean = self._features(real, t, predicted.y, batch.lq)
        with self.autocast(real):
            # Only the student learns from the first, only the heads learn from the others.
            frozen = {name: p.detach() for name, p in self.heads.named_parameters()}
            opinions = functional_call(self.heads, frozen, (shown,))
            of_false, of_real = self.heads([x.detach() for x in shown]), self.heads(clean)
        adversarial = _mean(torch.neg, opinions)
        heads = _mean(lambda x: F.relu(1 + x), of_false) + _mean(lambda x: F.relu(1 - x), of_real)
        loss = predicted.loss + self.distill.adversarial * adversarial + heads
        parts = {"adversarial": adversarial.item(), "heads": heads.item()}
        return loss, predicted.parts | parts

    def _features(self, x: Tensor, t: Tensor, y: Tensor, lq: Tensor) -> list[Tensor]:
        with lora_strength(self.network, 0.0), self.autocast(x):
            return self.network.control_features(x, t, y, lq)

    def _noised(self, predicted: Predicted, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns where the student's phases end, and clean clips, both noised, and timesteps (b,).

        The timesteps are random ones of the phases, mostly low ones, which show the detail.
        """
        step, border, end = predicted.step, predicted.border, predicted.x_t
        phase = self.distill.solver_steps // self.distill.evaluations
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        u = torch.stack([torch.rand((), generator=g) for g in generators])
        noise = torch.stack([torch.randn(end.shape[1:], generator=g) for g in generators]).to(end)
        # After the last border the clip is clean, which is below timestep 0.
        times = torch.cat([self.timesteps, torch.tensor([-1])])
        lowest, highest = times[border] + 1, times[border - phase]
        t = lowest + (u**4 * (highest + 1 - lowest)).long()
        alpha_end, sigma_end = self._scales(border, end)
        alpha, sigma = (each(t).to(end) for each in (self.schedule.alpha, self.schedule.sigma))
        ratio = alpha / alpha_end
        added = (sigma**2 - (ratio * sigma_end) ** 2).clamp(min=0).sqrt()
        false = ratio * self._moved(end, predicted.clean, step, border) + added * noise
        return false, self.schedule.add_noise(batch.hq, noise, t), t.to(end.device)


def _mean(loss: Callable[[Tensor], Tensor], opinions: Sequence[Tensor]) -> Tensor:
    """Returns the mean of a loss over the places of each level, and of that over the levels."""
    return torch.stack([loss(x).mean() for x in opinions]).mean()
