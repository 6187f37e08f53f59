import json
from dataclasses import replace

import pytest
import torch

from star_core.degradation import (
    HEAVY,
    MILD,
    PRESETS,
    STAR_HEAVY,
    STAR_LIGHT,
    STAR_REFERENCE,
    TRAINING,
    Degradation,
    clean_target,
    degrade_video,
)
from star_core.degradation.ops import gaussian_blur
from star_core.degradation.pipeline import Blur, ClipRandom, Codec, Kernels, Noise, Recipe, part_of
from star_core.metrics import flicker


def clip(frames: int = 5, h: int = 36, w: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return gaussian_blur(torch.rand(frames, 3, h, w, generator=generator), 1.0)


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=list(PRESETS))
def test_lq_is_a_quarter_in_8_bit_levels_and_the_record_is_json(recipe):
    lq, record = degrade_video(clip(), recipe, seed=3)
    assert lq.shape == (5, 3, 9, 12)
    assert torch.equal((lq * 255).round() / 255, lq)
    assert json.loads(json.dumps(record)) == record and record["seed"] == 3


@pytest.mark.parametrize("recipe", [STAR_HEAVY, STAR_LIGHT, HEAVY, TRAINING], ids=lambda r: r.name)
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
    draws = ClipRandom(torch.Generator().manual_seed(0), frames=100, drift=0.1)
    values = torch.tensor([draws.drifting((20.0, 95.0)) for _ in range(50)])
    assert values.min() >= 20 and values.max() <= 95
    assert 0 < values.diff(dim=1).abs().max() < 0.03 * 75
    assert values[:, 0].std() > 10


def test_training_covers_mild_to_heavy_and_every_codec():
    records = [
        [stage for step in TRAINING.stages for _, stage in step.draw(ClipRandom(g, 2, 0.1))]
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


def drawn_by(recipe, seeds):
    records = [Degradation(recipe, 3, seed).record for seed in seeds]
    return [record["stages"] for record in records]


def test_star_heavy_draws_every_operation_of_the_specification_in_its_ranges():
    drawn = drawn_by(STAR_HEAVY, range(300))
    stages = [stage for record in drawn for stage in record]
    assert {stage["op"] for stage in stages} == {
        "kernel",
        "sinc",
        "resize",
        "gaussian_noise",
        "poisson_noise",
        "jpeg",
        "codec",
    }
    assert {s["kind"] for s in stages if s["op"] == "kernel"} == {
        "gaussian",
        "generalized",
        "plateau",
    }
    assert {s["size"] for s in stages if "size" in s} == set(range(7, 22, 2))
    codecs = [s for s in stages if s["op"] == "codec"]
    assert {s["codec"] for s in codecs} == {"libx264", "libx265", "mpeg4"}
    assert all(10_000 <= s["bitrate"] <= 100_000 for s in codecs)
    assert all(len([s for s in r if s["op"] == "codec"]) == 2 for r in drawn)
    first = torch.tensor([next(s for s in r if s["op"] == "resize")["scale"] for r in drawn])
    assert first.min() > 0.14 and first.max() < 1.5
    assert (first > 1).float().mean().item() == pytest.approx(0.2, abs=0.07)
    assert (first == 1).float().mean().item() == pytest.approx(0.1, abs=0.06)


@pytest.mark.parametrize(
    ("op", "name", "which", "low", "high"),
    [
        ("kernel", "sigma", 0, 0.2, 3),
        ("kernel", "sigma", 1, 0.2, 1.5),
        ("gaussian_noise", "sigma", 0, 1 / 255, 30 / 255),
        ("gaussian_noise", "sigma", 1, 1 / 255, 25 / 255),
        ("poisson_noise", "scale", 0, 0.05, 3),
        ("poisson_noise", "scale", 1, 0.05, 2.5),
        ("jpeg", "quality", 0, 30, 95),
        ("jpeg", "quality", 1, 30, 95),
    ],
)
def test_star_heavy_draws_from_the_whole_of_each_range_of_the_specification(
    op, name, which, low, high
):
    """which: of the recipe's two rounds."""
    family = {"kernel", "sinc"}, {"gaussian_noise", "poisson_noise"}, {"jpeg"}
    names = next(f for f in family if op in f)
    rounds = [[s for s in r if s["op"] in names] for r in drawn_by(STAR_HEAVY, range(300))]
    # The second blur may be left out.
    drawn = [r[which] for r in rounds if len(r) == 2 and r[which]["op"] == op]
    values = torch.tensor([s[name] for s in drawn])
    assert values.min() >= low and values.max() <= high
    assert values.min() < low + 0.05 * (high - low) and values.max() > high - 0.05 * (high - low)


def test_light_is_lighter_than_heavy():
    video = clip(3, 64, 64)
    clean = torch.nn.functional.avg_pool2d(video, 4)
    light, heavy = (
        torch.stack(
            [degrade_video(video, r, seed)[0].sub(clean).square().mean() for seed in (1, 2)]
        )
        for r in (STAR_LIGHT, STAR_HEAVY)
    )
    assert light.mean() < heavy.mean()


def still_flicker(recipe, seeds):
    """Flicker of a still degraded without noise, in levels."""
    still = clip(1, 48, 48).expand(4, -1, -1, -1)
    silent = replace(recipe, stages=tuple(s for s in recipe.stages if not isinstance(s, Noise)))
    results = [degrade_video(still, silent, seed)[0] for seed in seeds]
    return sum(
        flicker(torch.stack(pair), torch.zeros(2, *pair[0].shape))
        for lq in results
        for pair in zip(lq[:-1], lq[1:], strict=True)
    )


def test_a_clip_is_degraded_alike_in_all_its_frames_and_the_released_recipe_is_not():
    assert still_flicker(STAR_HEAVY, (1,)) < 0.3 * still_flicker(STAR_REFERENCE, (1,))


def test_the_reference_draws_each_frame_anew():
    record = Degradation(STAR_REFERENCE, 4, seed=0).record
    assert len(record["frames"]) == 4
    assert record["frames"][0] != record["frames"][1]


def test_the_references_second_resize_forgets_the_width():
    video = clip(1, 64, 80)
    resize = STAR_REFERENCE.stages[6]
    out = resize.apply(video, {"scale": 0.15, "mode": "area"}, torch.Generator(), (64, 80))
    assert out.shape[-2:] == (9, 48)


def test_the_target_of_a_sharpened_recipe_is_sharpened_too():
    video = clip(1, 40, 40)
    assert torch.equal(clean_target(video, MILD), video)
    assert clean_target(video, STAR_HEAVY).std() > video.std()


def test_long_clips_are_degraded_in_parts_with_parameters_that_go_on():
    parameters = {"sigma": list(range(100)), "size": 7}
    assert part_of(parameters, range(64, 70), 100) == {"sigma": [64, 65, 66, 67, 68, 69], "size": 7}
    ramp = Recipe(name="r", stages=(Blur(sigma=(0.3, 3)),), drift=0.5)
    video = clip(1, 16, 16).expand(70, -1, -1, -1)
    lq, record = degrade_video(video, ramp, 0)
    sigmas = record["stages"][0]["sigma"]
    alone = gaussian_blur(video[:1], sigmas[66])
    assert (lq[66] - alone[0]).abs().max() < 1.5 / 255


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_fewer_bits_make_a_worse_clip(codec):
    def error(bits):
        recipe = Recipe(name="c", stages=(Codec(codec=codec, frame_bits=(bits, bits)),))
        video = clip(4, 64, 64)
        return (degrade_video(video, recipe, 0)[0] - video).square().mean()

    assert error(2_000) > 1.5 * error(40_000)


@pytest.mark.parametrize("sinc", [0.0, 1.0])
def test_random_kernels_keep_the_brightness_of_a_flat_clip(sinc):
    flat = torch.full((3, 3, 24, 24), 0.4)
    recipe = Recipe(name="k", stages=(Kernels(sigma=(0.2, 3), sinc=sinc),), drift=0.1)
    for seed in range(5):
        lq, _ = degrade_video(flat, recipe, seed)
        assert (lq - 0.4).abs().max() < 1.01 / 255
