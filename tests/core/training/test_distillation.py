from dataclasses import replace
from typing import Any

import pytest
import torch

from star_core.diffusion.denoiser import guided_velocity
from star_core.diffusion.levels import levels_of
from star_core.diffusion.schedule import star_schedule
from star_core.lora import add_lora, lora_strength
from star_core.losses import DFLossConfig
from star_core.models.unet import hint_prior_velocity
from star_core.sampling_defaults import COGVIDEOX_SAMPLING, SamplingDefaults
from star_core.star_checkpoint import LearnedPrompts
from star_core.training.distillation import DistillationObjective, DistillConfig
from star_core.training.objective import Prompts, TrainConfig, draw_batch
from star_core.training.pixels import Decoder, PixelCrop
from star_core.training.tiny import NETWORK, new_network
from star_core.training.trainer import choose_trained, train
from tests.small_run import latent_pairs

SMALL = replace(
    NETWORK, in_dim=4, out_dim=4, dim_mult=(1,), attn_scales=(1.0,), hint_prior=0.5, dropout=0.1
)
CONFIG = TrainConfig(
    steps=4, batch=4, trains="lora", early=0.0, degraded=0.0, df=DFLossConfig(beta=0.0)
)
TEACHER = SamplingDefaults(cfg=3.0, cfg_rescale=0.2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return latent_pairs(tmp_path_factory.mktemp("pairs"))


FOUR = DistillConfig()


def student(distill=FOUR, config=CONFIG, teacher=TEACHER, strength=0.3, **options):
    """An objective on a network whose LoRA does something already."""
    network, prompts = new_network(SMALL, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.out[-1].parameters():
        parameter.data.normal_(generator=generator)
    add_lora(network, 4, layers="all")
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            parameter.data.normal_(std=strength, generator=generator)
    choose_trained(network, "lora")
    prompts.requires_grad_(False)
    return DistillationObjective(network, config, distill, teacher, prompts=prompts, **options)


def batch_at(pairs, objective, *steps):
    """Samples at steps of the teacher."""
    batch = draw_batch(pairs, range(len(steps)), objective.config)
    return batch._replace(t=objective.timesteps[list(steps)])


@torch.no_grad()
def x_0_of(objective, x_t, t, batch, strength):
    """Returns the clean clip as the student (strength 1) or the guided teacher (0) predicts it."""
    network, prompts = objective.network, objective.prompts
    with lora_strength(network, strength):
        v = network(x_t, t, prompts.positive.expand(len(x_t), -1, -1), batch.lq)
        if not strength:
            v_u = network(x_t, t, prompts.negative.expand(len(x_t), -1, -1), batch.lq)
            v = guided_velocity(v, v_u, TEACHER.cfg, TEACHER.cfg_rescale)
    return objective.schedule.x_0(x_t, v, t)


def moved(objective, x, x_0, t, t_end):
    """A step of Euler; t_end None: to the clean clip."""
    if t_end is None:
        return x_0
    noise = (x - objective.schedule.alpha(t) * x_0) / objective.schedule.sigma(t)
    return objective.schedule.add_noise(x_0, noise, t_end)


def seen_target(monkeypatch, objective, batch):
    """The x_t and the x_0 that the student is trained to predict from it."""
    seen = {}
    error = objective.velocity_error

    def record(v, x_t, x_0, batch):
        seen.update(x_t=x_t, x_0=x_0)
        return error(v, x_t, x_0, batch)

    monkeypatch.setattr(objective, "velocity_error", record)
    objective(batch)
    return seen["x_t"], seen["x_0"]


@pytest.mark.parametrize("evaluations", [1, 3, 4])
@pytest.mark.parametrize(
    "teacher", [TEACHER, replace(TEACHER, noise_level=640), COGVIDEOX_SAMPLING]
)
def test_phases_end_where_the_evaluations_of_the_student_begin(evaluations, teacher):
    distill = DistillConfig(evaluations=evaluations, solver_steps=12)
    objective = student(distill, teacher=teacher)
    levels = levels_of(replace(teacher, **distill.sampling(teacher)))
    begins = objective.timesteps[:: 12 // evaluations]
    assert levels.schedule.model_timestep(levels.sigmas[:-1]).tolist() == begins.tolist()


def test_a_phase_of_one_step_teaches_what_guidance_finds(pairs, monkeypatch):
    objective = student(DistillConfig(evaluations=4, solver_steps=4))
    batch = batch_at(pairs, objective, 0, 1, 2, 3)
    x_t, target = seen_target(monkeypatch, objective, batch)
    torch.testing.assert_close(
        target, x_0_of(objective, x_t, batch.t, batch, 0.0), atol=1e-4, rtol=1e-4
    )


def test_a_longer_phase_ends_where_the_student_gets_after_one_step_of_the_teacher(
    pairs, monkeypatch
):
    objective = student(DistillConfig(evaluations=2, solver_steps=8))
    batch = batch_at(pairs, objective, 0, 1, 4, 6)
    ends = [objective.timesteps[4:5]] * 2 + [None] * 2
    x_t, target = seen_target(monkeypatch, objective, batch)
    t_next = objective.timesteps[torch.tensor([1, 2, 5, 7])]
    x_next = moved(objective, x_t, x_0_of(objective, x_t, batch.t, batch, 0.0), batch.t, t_next)
    x_0 = x_0_of(objective, x_next, t_next, batch, 1.0)
    for i, end in enumerate(ends):
        one = slice(i, i + 1)
        torch.testing.assert_close(
            moved(objective, x_t[one], target[one], batch.t[one], end),
            moved(objective, x_next[one], x_0[one], t_next[one], end),
            atol=1e-3,
            rtol=1e-3,
        )


def test_the_first_level_is_the_noised_input_and_others_the_noised_truth(pairs, monkeypatch):
    objective = student(DistillConfig(evaluations=2, solver_steps=4))
    batch = batch_at(pairs, objective, 0, 3)
    x_t, _ = seen_target(monkeypatch, objective, batch)
    for i, clip in enumerate((batch.lq, batch.hq)):
        noised = objective.schedule.add_noise(clip, batch.noise, batch.t)
        torch.testing.assert_close(x_t[i], noised[i])


def test_every_step_of_the_teacher_is_taught(pairs, monkeypatch):
    objective = student(DistillConfig(evaluations=2, solver_steps=8))
    config = replace(CONFIG, noise_level=1000)  # more than the teacher's
    t = draw_batch(pairs, range(200), config).t
    seen = set()

    def target(x_t, step, *_):
        seen.update(step.tolist())
        return x_t

    monkeypatch.setattr(objective, "_target", target)
    for part in t.split(4):
        batch = draw_batch(pairs, range(len(part)), config)
        objective(batch._replace(t=part))
    assert seen == set(range(8))


def test_only_the_lora_is_trained_and_only_through_the_student(pairs):
    objective = student()
    loss, parts = objective(batch_at(pairs, objective, 0, 5, 10, 15))
    loss.backward()
    with_gradient = {n for n, p in objective.named_parameters() if p.grad is not None}
    assert with_gradient and all(".lora_" in name for name in with_gradient)
    assert set(parts) == {"consistency", "df"}
    assert any("VideoControlNet" in name for name in with_gradient)


def test_the_options_add_df_loss_and_pixels_of_the_last_phase(pairs):
    decoder = Decoder(lambda z: z[:, :3], 1)
    config = replace(CONFIG, df=DFLossConfig(beta=2.0), crop=PixelCrop(frames=1, height=2, width=2))
    options = {"config": config, "decoder": decoder}
    plain, both = (
        student(DistillConfig(evaluations=2, solver_steps=4, pixels=p), **options)
        for p in (0.0, 3.0)
    )
    early, late = batch_at(pairs, plain, 0, 1), batch_at(pairs, plain, 2, 3)
    torch.testing.assert_close(plain(early)[0], both(early)[0])
    loss, parts = both(late)
    torch.testing.assert_close(plain(late)[0] + 3.0 * parts["pixels"], loss)
    assert parts["df"] > 0 and parts["pixels"] > 0
    with pytest.raises(ValueError, match="decoder"):
        student(DistillConfig(pixels=1.0))


def test_texts_need_a_negative_embedding(pairs):
    objective = student()
    with pytest.raises(ValueError, match="negative"):
        DistillationObjective(objective.network, CONFIG, DistillConfig(), TEACHER)
    with pytest.raises(ValueError, match="multiple"):
        DistillConfig(evaluations=3)
    with pytest.raises(ValueError, match="multiple"):
        DistillConfig(solver_steps=0)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and at least 0"):
            DistillConfig(pixels=weight)
        with pytest.raises(ValueError, match="finite and at least 0"):
            DistillConfig(adversarial=weight)


class Gaussian(torch.nn.Module):
    """Knows clips that scatter around the hint, or with the negative prompt around half of it.

    A convolution without effect takes the LoRA.
    """

    config = SMALL

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(24, 4, 1, bias=False)
        torch.nn.init.zeros_(self.conv.weight)

    def forward(self, x, t, y, hint):
        exact, _ = hint_prior_velocity(x, t, hint * y.mean((1, 2))[:, None, None, None, None], 0.5)
        both = torch.cat([x, hint], dim=1)
        alpha, sigma = star_schedule().alpha(t), star_schedule().sigma(t)
        return exact + self.conv(torch.cat([both, both * alpha, both * sigma], dim=1))


def test_distilled_evaluations_come_close_to_the_guided_teacher(pairs, tmp_path):
    """One evaluation, before and after: both compared with four guided ones of the teacher."""
    network: Any = Gaussian()
    add_lora(network, 4, layers="all")
    prompts = Prompts(LearnedPrompts(torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5)))
    config = replace(CONFIG, steps=150, learning_rate=2e-2, warmup=1, ema=0.5, decay_from=50)
    distill = DistillConfig(evaluations=1, solver_steps=4)
    objective = DistillationObjective(network, config, distill, TEACHER, prompts=prompts)
    batch = draw_batch(pairs, range(50, 58), config)._replace(t=torch.full((8,), 899))

    def path(strength, *indices):
        """The clip after Euler's steps from these of the teacher's timesteps."""
        times = [objective.timesteps[[i]].expand(8) for i in indices]
        x = objective.schedule.add_noise(batch.lq, batch.noise, batch.t)
        for t, t_end in zip(times, [*times[1:], None], strict=True):
            x = moved(objective, x, x_0_of(objective, x, t, batch, strength), t, t_end)
        return x

    wanted, before = path(0.0, 0, 1, 2, 3), path(1.0, 0)
    train(pairs, objective, tmp_path, write=lambda *_: None)
    error = (path(1.0, 0) - wanted).square().mean() / (before - wanted).square().mean()
    assert error < 0.3
