"""Tests what the built-in weights reach on a part of the demo's clip, which is new to them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from star_core.demo import DATA, GROUND_TRUTH
from star_core.model import Model, Prompts, find_model, load
from star_core.parity import DEFAULT
from star_core.pipeline import Settings, ShotJob, restore
from star_core.sampling_defaults import SamplingDefaults
from star_core.video_io import open_video
from star_core.windows.canvas import Canvas, FrameSpan
from star_core.windows.geometry import upsample

FRAMES, SIDE = 4, 128
PERIOD = 4  # of the latents, in pixels
PRESETS = "faithful", "sharp"


@cache
def tiny() -> Model:
    prompts = [Prompts(preset=preset) for preset in PRESETS]
    return load(find_model("tiny"), prompts, behaviour=DEFAULT, device="cpu", dtype=torch.float32)


@cache
def truth() -> Tensor:
    clip = open_video(DATA / GROUND_TRUTH, frames=(0, FRAMES))
    return torch.stack([frame[:3, 120 : 120 + SIDE, 280 : 280 + SIDE] for frame in clip])


def degraded(scale: int, noise: float) -> Tensor:
    small = torch.nn.functional.avg_pool2d(truth(), scale)
    generator = torch.Generator().manual_seed(0)
    return (small + noise / 255 * torch.randn(small.shape, generator=generator)).clamp(0, 1)


def enlarged(frames: Tensor) -> Tensor:
    return upsample(frames, (SIDE, SIDE), "bicubic").clamp(0, 1)


@cache
def restored(scale: int, noise: float, preset: str = "faithful", steps: int = 1) -> Tensor:
    model, frames = tiny(), degraded(scale, noise)
    sampling: SamplingDefaults = replace(model.star.sampling, steps=steps)
    settings = Settings(sampling=sampling, strength=sampling.usual_strength(scale))
    positive, negative = model.embeddings[Prompts(preset=preset)]
    whole = range(FRAMES)
    span = FrameSpan.of(
        whole,
        chunk=settings.chunk,
        decode_window=sampling.decode_window,
        behaviour=DEFAULT,
    )
    shot = ShotJob(span=span, positive=positive, negative=negative, settings=settings)
    levels = model.star.config.downsamplings
    canvas = Canvas.of((SIDE, SIDE), vae_factor=model.vae.factor, levels=levels, behaviour=DEFAULT)
    return torch.stack(list(restore(frames, model.star, model.vae, [shot], canvas)))


def psnr(frames: Tensor) -> float:
    return -10 * (frames - truth()).square().mean().log10().item()


def flicker(frames: Tensor) -> float:
    return frames.diff(dim=0).abs().mean().item()


def peak(frames: Tensor, period: int = PERIOD) -> float:
    """Returns how much stronger frames vary with a period than with those about it.

    frames: (f 3 h w). period: in pixels, along rows or columns.
    """
    around: Sequence[int] = (-3, -2, 2, 3)
    strongest = 0.0
    for lines in (frames, frames.transpose(-1, -2)):
        waves = (lines - lines.mean(-1, keepdim=True)) * torch.hann_window(lines.shape[-1])
        power = torch.fft.rfft(waves).abs().square().mean((0, 1, 2))
        at = lines.shape[-1] // period
        beside = torch.stack([power[at + step] for step in around]).mean()
        strongest = max(strongest, (power[at] / beside).item())
    return strongest


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("noise", [4, 12])
def test_the_latents_leave_no_grid(noise, preset):
    frames = restored(4, noise, preset)
    assert peak(frames) < 1.2
    grid = 1.5 / 255 * torch.cos(2 * torch.pi / PERIOD * torch.arange(SIDE))
    assert peak(frames + grid) > 1.2


@pytest.mark.parametrize(("scale", "least"), [(1, 0.0), (2, 0.1), (4, 0.3)])
def test_noisy_clips_get_better_than_their_enlargement(scale, least):
    before, after = psnr(enlarged(degraded(scale, 8))), psnr(restored(scale, 8))
    assert after > before + least


def test_an_intact_clip_comes_back():
    assert psnr(restored(1, 0)) > 40


@pytest.mark.parametrize("steps", [4, 8])
def test_more_evaluations_find_what_one_does(steps):
    one, more = restored(4, 12), restored(4, 12, steps=steps)
    assert abs(psnr(one) - psnr(more)) < 0.3
    assert flicker(more) < 1.3 * flicker(one)
