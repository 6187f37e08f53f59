"""Distils a guided teacher into a few evaluations without guidance, by phased consistency.

The noise levels of a run are divided into as many phases as the student may take evaluations. From
anywhere in a phase, the student learns to predict the point at which the teacher's path, the
probability flow with guidance, leaves the phase (Wang et al. 2024, arXiv:2405.18407; Heek et al.
2024, arXiv:2403.06807). Guidance is distilled together with the solver (Luo et al. 2023,
arXiv:2310.04378). Teacher and student share all weights: the student is the teacher with a LoRA.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbones import Network
from ..diffusion.denoiser import guided_velocity
from ..diffusion.levels import guidance_of
from ..lora import lora_strength
from ..sampling_defaults import SamplingDefaults
from .objective import Batch, Objective, Prompts, TrainConfig
from .pixels import Decoder


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of a distillation.

    evaluations: of the student, the number of phases. solver_steps: of the teacher from the first
    noise level to the clean clip, a multiple of `evaluations`. pixels: weight of the mean absolute
    difference in pixels of a decoded crop, in the last phase only, where the target is a clean
    clip; 0 for none. adversarial: weight of the loss of `AdversarialObjective`; 0 for none.
    sampler: that the student is meant for: "euler" keeps the noise of the start
    between the phases, "lcm" draws it anew.
    """

    evaluations: int = 4
    solver_steps: int = 16
    pixels: float = 0.0
    adversarial: float = 0.0
    sampler: str = "euler"

    def __post_init__(self) -> None:
        if not 1 <= self.evaluations <= self.solver_steps or self.solver_steps % self.evaluations:
            raise ValueError(
                f"the teacher's steps must be a multiple of the student's evaluations, got "
                f"{self.solver_steps} for {self.evaluations}"
            )
        if not all(0 <= weight < math.inf for weight in (self.pixels, self.adversarial)):
            raise ValueError(
                f"weights of losses must be finite and at least 0, got {self.pixels} and "
                f"{self.adversarial}"
            )

    def sampling(self, teacher: SamplingDefaults) -> dict[str, Any]:
        """Returns the fields of `SamplingDefaults` that the student needs in place of `teacher`'s.

        At these settings the noise levels of a run are the borders of the phases.
        """
        star: dict[str, Any] = {"spacing": "diffusers"} if teacher.schedule != "cosine" else {}
        return {
            "steps": self.evaluations,
            "solver_mode": "normal",
            "sampler": self.sampler,
            "cfg": 1.0,
            "cfg_mode": "constant",
            "noise_level": teacher.noise_level,
            **star,
        }


class Predicted(NamedTuple):
    """A student's prediction for a batch, and its loss.

    x_t: its noisy latents (b c f h w). clean: its x_0 (b c f h w). y: text embeddings (b l d).
    step, border: indices of the teacher's step and of the end of its phase, (b,), on the CPU.
    loss: of the batch, with its parts by name as numbers.
    """

    x_t: Tensor
    clean: Tensor
    y: Tensor
    step: Tensor
    border: Tensor
    loss: Tensor
    parts: dict[str, float]


class DistillationObjective(Objective):
    """Trains the LoRA of a network to do in few evaluations what the network itself does in many.

    teacher: how the network is sampled without its LoRA; its guidance and noise level are used.
    prompts: learned prompts; for samples with texts, `negative` (1 l d) is the embedding that
    guidance leads away from. network, config, decoder: see `Objective`. The DF loss compares with
    the student's target instead of the true clip.

    ValueError if a decoder or the negative embedding is missing.
    """

    negative: Tensor | None

    def __init__(
        self,
        network: Network,
        config: TrainConfig,
        distill: DistillConfig,
        teacher: SamplingDefaults,
        *,
        prompts: Prompts | None = None,
        negative: Tensor | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__(network, config, prompts=prompts, decoder=decoder)
        self.distill, self.guidance = distill, guidance_of(teacher)
        self.rescale = teacher.cfg_rescale
        self.register_buffer("negative", negative, persistent=False)
        if prompts is None and negative is None:
            raise ValueError("the teacher's guidance needs learned prompts or a negative embedding")
        if distill.pixels and decoder is None:
            raise ValueError("a loss in pixels needs the VAE's decoder")
        # The timesteps of the teacher's steps; after the last one the clip is clean.
        count, top = distill.solver_steps, teacher.noise_level
        self.timesteps = torch.tensor([round(top * (1 - i / count)) - 1 for i in range(count)])

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss of a batch, and its parts by name as numbers.

        The timesteps of the batch choose steps of the teacher.
        """
        predicted = self.predict(batch)
        return predicted.loss, predicted.parts

    def predict(self, batch: Batch) -> Predicted:
        """Returns the student's prediction for a batch, and its loss.

        The timesteps of the batch choose steps of the teacher.
        """
        count = self.distill.solver_steps
        step = (self.timesteps >= batch.t.cpu()[:, None]).sum(1).sub(1).clamp(min=0)
        t = self.timesteps[step]
        phase = count // self.distill.evaluations
        border = (step // phase + 1) * phase  # the step at which the phase ends
        # As in sampling, the first level has the low-quality clip under its noise.
        first = (step == 0).to(batch.lq.device)[:, None, None, None, None]
        x_t = self.schedule.add_noise(torch.where(first, batch.lq, batch.hq), batch.noise, t)
        batch = batch._replace(t=t.to(x_t.device))
        y = self.embeddings(batch)
        target = self._target(x_t, step, border, batch, y)
        v = self.velocity(x_t, t, y, batch.lq)
        clean = self.schedule.x_0(x_t, v, t)
        consistency = self.velocity_error(v, x_t, target, batch)
        frequency = self.df_error(clean, target, batch)
        loss = consistency + frequency
        parts = {"consistency": consistency.mean().item(), "df": frequency.mean().item()}
        if self.distill.pixels and (last := border == count).any():
            crops = [
                part for part, is_last in zip(batch.parts, last.tolist(), strict=True) if is_last
            ]
            pixels, truth = (self.decoded(z[last.to(z.device)], crops) for z in (clean, target))
            difference = (pixels - truth).abs().mean()
            parts["pixels"] = difference.item()
            loss = loss + self.distill.pixels * difference * last.float().mean()
        return Predicted(x_t, clean, y, step, border, loss.mean(), parts)

    @torch.no_grad()
    def _target(self, x_t: Tensor, step: Tensor, border: Tensor, batch: Batch, y: Tensor) -> Tensor:
        """Returns the x_0 (b c f h w) with which a step of Euler from x_t ends where it should.

        step, border: indices of the teacher's step and of the end of its phase, (b,).
        """
        with lora_strength(self.network, 0.0):
            x_0 = self._guided_x_0(x_t, self.timesteps[step], batch, y)
        x_next = self._moved(x_t, x_0, step, step + 1)
        inside = (step + 1 < border).nonzero().flatten()
        if len(inside):
            rows = inside.to(x_t.device)
            t = self.timesteps[step[inside] + 1]
            v = self.velocity(x_next[rows], t, y[rows], batch.lq[rows])
            clean = self.schedule.x_0(x_next[rows], v, t)
            x_next[rows] = self._moved(x_next[rows], clean, step[inside] + 1, border[inside])
        alpha, sigma = self._scales(step, x_t)
        alpha_end, sigma_end = self._scales(border, x_t)
        ratio = sigma_end / sigma
        return (x_next - ratio * x_t) / (alpha_end - ratio * alpha)

    def _guided_x_0(self, x_t: Tensor, t: Tensor, batch: Batch, y: Tensor) -> Tensor:
        negative = self.negative if self.prompts is None else self.prompts.negative
        assert negative is not None
        v_c = self.velocity(x_t, t, y, batch.lq)
        scales = [
            self.guidance(each) if callable(self.guidance) else self.guidance for each in t[:, None]
        ]
        if all(scale == 1 for scale in scales):
            return self.schedule.x_0(x_t, v_c, t)
        v_u = self.velocity(x_t, t, negative.expand(len(x_t), -1, -1), batch.lq)
        scale = torch.tensor(scales, device=x_t.device).reshape(-1, 1, 1, 1, 1)
        return self.schedule.x_0(x_t, guided_velocity(v_c, v_u, scale, self.rescale), t)

    def _moved(self, x: Tensor, x_0: Tensor, step: Tensor, end: Tensor) -> Tensor:
        """Returns x after a step of Euler (DDIM) towards x_0, between two indices (b,)."""
        alpha, sigma = self._scales(step, x)
        alpha_end, sigma_end = self._scales(end, x)
        return alpha_end * x_0 + sigma_end / sigma * (x - alpha * x_0)

    def _scales(self, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma (b 1 1 1 1) at indices of the teacher's steps (b,)."""
        t = self.timesteps[step.clamp(max=len(self.timesteps) - 1)]
        clean = (step == len(self.timesteps))[:, None, None, None, None]
        alpha = torch.where(clean, 1.0, self.schedule.alpha(t))
        sigma = torch.where(clean, 0.0, self.schedule.sigma(t))
        return alpha.to(like.device), sigma.to(like.device)
