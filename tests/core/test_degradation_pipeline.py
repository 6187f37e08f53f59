import json

import pytest
import torch

from star_core.degradation import COMPRESSION, HEAVY, MILD, TRAINING, degrade_video
from star_core.degradation.ops import gaussian_blur
from star_core.degradation.pipeline import Blur, ClipDraws, Noise, Recipe


def clip(frames: int = 5, h: int = 36, w: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return gaussian_blur(torch.rand(frames, 3, h, w, generator=generator), 1.0)


@pytest.mark.parametrize("recipe", [MILD, HEAVY, COMPRESSION, TRAINING], ids=lambda r: r.name)
def test_lq_is_a_quarter_in_8_bit_levels_and_the_record_is_json(recipe):
    lq, record = degrade_video(clip(), recipe, seed=3)
    assert lq.shape == (5, 3, 9, 12)
    assert torch.equal((lq * 255).round() / 255, lq)
    assert json.loads(json.dumps(record)) == record and record["seed"] == 3


@pytest.mark.parametrize("recipe", [HEAVY, TRAINING], ids=lambda r: r.name)
def test_a_seed_gives_the_same_video_whatever_the_global_generator(recipe):
    first, _ = degrade_video(clip(), recipe, seed=2**64 - 1)
    torch.rand(7)
    second, _ = degrade_video(clip(), recipe, seed=2**64 - 1)
    other, _ = degrade_video(clip(), recipe, seed=1)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_heavy_is_worse_than_mild():
    video = gaussian_blur(clip(h=64, w=64), 6.0)  # nothing that a blur of 1.6 could lose
    clean = torch.nn.functional.avg_pool2d(video, 4)
    mild, heavy = (
        degrade_video(video, r, seed=0)[0].sub(clean).square().mean() for r in (MILD, HEAVY)
    )
    assert heavy > 2 * mild


def test_parameters_do_not_depend_on_resolution():
    records = [degrade_video(clip(h=h), TRAINING, seed=5)[1] for h in (36, 64)]
    assert records[0] == records[1]


def test_parameters_drift_slowly_within_their_range():
    draws = ClipDraws(torch.Generator().manual_seed(0), frames=100, drift=0.1)
    values = torch.tensor([draws.drifting((20.0, 95.0)) for _ in range(50)])
    assert values.min() >= 20 and values.max() <= 95
    assert 0 < values.diff(dim=1).abs().max() < 0.03 * 75
    assert values[:, 0].std() > 10


def test_training_covers_mild_to_heavy_and_every_codec():
    records = [
        [stage for step in TRAINING.stages for _, stage in step.draw(ClipDraws(g, 2, 0.1))]
        for g in (torch.Generator().manual_seed(seed) for seed in range(400))
    ]
    stages = [stage for record in records for stage in record]
    sigma = torch.tensor([s["sigma"] for s in stages if s["op"] == "blur"])
    noise = torch.tensor([s["sigma"] for s in stages if s["op"] == "gaussian_noise"]) * 255
    assert sigma.min() < 1.0 and sigma.max() > 1.6
    assert noise.min() < 4 and noise.max() > 12
    codecs = [s["codec"] for s in stages if s["op"] == "codec"]
    assert set(codecs) == {"libx264", "mpeg4"} and 60 < len(codecs) < 140


def test_anisotropic_blur_runs_and_is_recorded():
    recipe = Recipe(name="x", stages=(Blur(sigma=(0.5, 2), anisotropic=1.0),), drift=0.1)
    out, record = degrade_video(clip(), recipe, seed=0)
    assert len(record["stages"][0]["theta"]) == 5 and not torch.equal(out, clip())


def test_noise_differs_from_frame_to_frame():
    still = torch.full((2, 3, 16, 16), 0.5)
    out, _ = degrade_video(still, Recipe(name="n", stages=(Noise(sigma=(0.05, 0.05)),)), seed=0)
    assert not torch.equal(out[0], out[1])


def test_what_is_not_rgb_video_or_a_seed_is_refused():
    with pytest.raises(ValueError, match="RGB"):
        degrade_video(torch.rand(2, 4, 16, 16), MILD, seed=0)
    with pytest.raises(ValueError, match="seed"):
        degrade_video(clip(), MILD, seed=-1)
    with pytest.raises(ValueError, match="larger"):
        degrade_video(clip(h=3), MILD, seed=0)
