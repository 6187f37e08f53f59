"""The whole method on stand-ins: a VAE that loses nothing, networks of a few thousand weights."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from star_core import pipeline, shot_run
from star_core.diffusion.shortcuts import Shortcuts
from star_core.models.slicing import Slicing
from star_core.models.unet import ControlledVideoUNet, UNetConfig, hint_prior_velocity
from star_core.parity import DEFAULT, REFERENCE
from star_core.pipeline import Execution, Settings, ShotJob, restore
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import StarModel
from star_core.vae.frame_vae import VideoVAE
from star_core.windows.canvas import Canvas, FrameSpan, cut
from star_core.windows.chunking import ChunkConfig
from star_core.windows.geometry import output_size, upsample
from star_core.windows.tiling import Tile

FACTOR = 2
CONFIG = UNetConfig(
    in_dim=3 * FACTOR**2,
    out_dim=3 * FACTOR**2,
    dim=16,
    context_dim=8,
    dim_mult=(1, 2),
    num_heads=2,
    head_dim=8,
    num_res_blocks=1,
    attn_scales=(0.5,),
    dropout=0.0,
    hint_prior=0.4,
    norm_groups=4,
)
SAMPLING = SamplingDefaults(
    steps=1, solver_mode="normal", cfg=1.0, upsample="bicubic", color_fix="none"
)
PROMPT = torch.ones(1, 2, 8)


class LosslessVAE(VideoVAE):
    """Latents are the pixels of 2x2 squares.

    mixing: how much of a decode window's mean gets into each of its frames. bias: what is added.
    """

    def __init__(self, mixing: float = 0.0, bias: float = 0.0):
        self.model: Any = nn.Linear(1, 1)
        self.factor, self.latent_channels = FACTOR, 3 * FACTOR**2
        self.mixing, self.bias = mixing, bias

    def encode_frame(self, frame, *, noise=None, tile=None):
        return F.pixel_unshuffle(frame, FACTOR)

    def _decode(self, latents):
        video = torch.stack([F.pixel_shuffle(z, FACTOR) for z in latents.unbind(2)], dim=2)
        return torch.lerp(video, video.mean(2, keepdim=True), self.mixing) + self.bias


class CopiesHint(nn.Module):
    """Predicts that the clean video is the hint."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def working(self, **how):
        return nullcontext()

    def forward(self, x, t, y, hint):
        assert x.shape[-2] % 2 == 0 and x.shape[-1] % 2 == 0
        return hint_prior_velocity(x, t, hint, 1e-3)[0]


def model_of(network) -> StarModel:
    return StarModel(network=network, config=CONFIG, sampling=SAMPLING, prompts=None)


@pytest.fixture(scope="module")
def changing() -> StarModel:
    """Random weights, none of them zero: it changes the video everywhere."""
    network = ControlledVideoUNet(CONFIG).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
            parameter.normal_(std=std, generator=generator)
    return model_of(network)


def clip_of(frames: int, height: int, width: int) -> Tensor:
    """Smooth random video with some detail (f 3 h w) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, frames, 3, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0]
    fine = torch.rand(3, frames, height, width, generator=generator) - 0.5
    return (smooth + 0.1 * fine).clamp(0, 1).transpose(0, 1)


def run(
    clip,
    model,
    *,
    scale=2.0,
    wanted=None,
    region=None,
    margin=32,
    vae=None,
    settings=None,
    execution=None,
    on_progress=None,
    **options,
) -> Tensor:
    """Restored frames (f c h w); a part of them as a preview gets it."""
    settings = settings or Settings(sampling=SAMPLING)
    vae = vae or LosslessVAE()
    span = FrameSpan.of(
        range(len(clip)),
        wanted,
        chunk=settings.chunk,
        decode_window=settings.sampling.decode_window,
        behaviour=settings.behaviour,
    )
    canvas = Canvas.of(
        output_size(clip.shape[-1], clip.shape[-2], scale),
        region,
        vae_factor=vae.factor,
        levels=model.config.downsamplings,
        behaviour=settings.behaviour,
        margin=margin,
    )
    frames = clip[span.needed.start : span.needed.stop]
    shot = ShotJob(
        span=span,
        positive=PROMPT,
        negative=PROMPT,
        settings=settings,
        execution=execution or Execution(),
    )
    return torch.stack(
        list(restore(frames, model, vae, [shot], canvas, on_progress=on_progress, **options))
    )


@hypothesis_settings(max_examples=30)
@given(
    width=st.integers(1, 64),
    height=st.integers(1, 64),
    frames=st.integers(1, 12),
    scale=st.floats(1, 4.5),
    chunk=st.integers(1, 5),
)
def test_copying_the_hint_gives_the_enlarged_input_in_exactly_its_size_and_count(
    width, height, frames, scale, chunk
):
    clip = clip_of(frames, height, width)
    settings = Settings(sampling=SAMPLING, chunk=ChunkConfig(length=chunk, overlap=chunk // 2))
    restored = run(clip, model_of(CopiesHint()), scale=scale, settings=settings)
    size = output_size(width, height, scale)
    assert restored.shape == (frames, 3, *size[::-1])
    # the stand-in is sure of the hint up to 1e-3
    assert torch.allclose(restored, upsample(clip, size, "bicubic").clamp(0, 1), atol=3e-3)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "heun"])
@pytest.mark.parametrize(("mode", "steps"), [("fast", 1), ("normal", 1), ("normal", 4)])
def test_all_samplers_follow_the_network_to_the_hint(sampler, mode, steps):
    sampling = replace(SAMPLING, sampler=sampler, solver_mode=mode, steps=steps)
    clip = clip_of(2, 8, 9)
    restored = run(clip, model_of(CopiesHint()), settings=Settings(sampling=sampling))
    assert torch.allclose(restored, upsample(clip, (18, 16), "bicubic").clamp(0, 1), atol=5e-3)


def test_the_same_seed_gives_the_same_result_and_another_seed_another(changing):
    clip = clip_of(2, 10, 12)
    first, second, other = (
        run(clip, changing, settings=Settings(sampling=SAMPLING, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=1e-3)


def test_guidance_uses_the_negative_prompt(changing):
    clip = clip_of(1, 10, 12)
    span = FrameSpan.of(range(1), chunk=ChunkConfig(), decode_window=3, behaviour=DEFAULT)
    canvas = Canvas.of((24, 20), vae_factor=2, levels=1, behaviour=DEFAULT)
    settings = Settings(sampling=replace(SAMPLING, cfg=4.0))
    shots = [
        ShotJob(span=span, positive=PROMPT, negative=negative, settings=settings)
        for negative in (PROMPT, -PROMPT)
    ]
    one, other = (next(restore(clip, changing, LosslessVAE(), [s], canvas)) for s in shots)
    assert not torch.allclose(one, other, atol=1e-3)


# strength


def test_strength_is_bicubic_at_0_whatever_the_vae_loses_and_changes_more_and_more(changing):
    clip = clip_of(2, 6, 8)
    bicubic = upsample(clip, (16, 12), "bicubic").clamp(0, 1)
    lossy = LosslessVAE(mixing=0.5, bias=0.1)
    sampling = replace(SAMPLING, steps=2, color_fix="adain")
    results = [
        run(clip, changing, vae=lossy, settings=Settings(sampling=sampling, strength=strength))
        for strength in (0, 1e-6, 0.25, 0.5, 0.75, 1)
    ]
    changes = [(result - bicubic).abs().mean().item() for result in results]
    assert changes[0] == 0
    assert changes[1] < 1e-4  # the short way at 0 is where the long way leads
    assert sorted(set(changes)) == changes


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be from 0 to 1"):
        Settings(strength=strength)


# previews


def previewed(clip, model, whole, wanted, **options) -> Tensor:
    preview = run(clip, model, wanted=wanted, **options)
    return preview - whole[wanted.start : wanted.stop]


@pytest.mark.parametrize("wanted", [range(0, 1), range(3, 6), range(8, 9), range(0, 9)])
@pytest.mark.parametrize("overlap", [0, 2])
def test_a_preview_of_frames_shows_what_the_whole_run_shows(changing, wanted, overlap):
    """With one evaluation it is exact: a frame depends on the windows that it lies in."""
    clip = clip_of(9, 8, 10)
    options = {
        "vae": LosslessVAE(mixing=0.5),
        "settings": Settings(sampling=SAMPLING, chunk=ChunkConfig(length=4, overlap=overlap)),
    }
    whole = run(clip, changing, **options)
    assert not torch.allclose(whole, upsample(clip, (20, 16), "bicubic"), atol=0.05)
    assert previewed(clip, changing, whole, wanted, **options).abs().max() < 1e-6


def test_a_preview_of_frames_is_close_where_several_steps_tie_all_windows_together(changing):
    """Frames two windows away act only through frames that windows share.

    That was measured as 0.05 % of what the network changes (0.3 % with 6 steps), and this network
    was never trained to be steady.
    """
    clip = clip_of(10, 8, 10)
    settings = Settings(sampling=replace(SAMPLING, steps=3), chunk=ChunkConfig(length=4, overlap=2))
    whole = run(clip, changing, settings=settings)
    change = (whole - upsample(clip, (20, 16), "bicubic")).abs().mean()
    difference = previewed(clip, changing, whole, range(2), settings=settings)
    assert 0 < difference.abs().mean() < 0.02 * change


@pytest.mark.parametrize("steps", [1, 3])
def test_a_preview_of_a_crop_is_exact_where_its_margin_covers_the_frame(changing, steps):
    clip = clip_of(3, 17, 23)
    settings = Settings(sampling=replace(SAMPLING, steps=steps, color_fix="adain"))
    region = (range(5, 16), range(9, 46))
    whole = run(clip, changing, settings=settings)
    preview = run(clip, changing, settings=settings, region=region)
    assert torch.equal(preview, cut(whole, region))


@pytest.mark.parametrize("color_fix", ["none", "adain", "wavelet"])
def test_a_preview_of_a_crop_is_close_to_the_whole_run(changing, color_fix):
    """Attention, group norms and AdaIN look at the whole frame, all else no further than the
    margin. Measured as shares of what this untrained network changes: 4 to 10 % here, 2 % (AdaIN
    7 %) on a frame of three times the height."""
    clip = clip_of(1, 12, 120)
    region = (range(4, 20), range(90, 110))
    settings = Settings(sampling=replace(SAMPLING, color_fix=color_fix))
    whole = run(clip, changing, settings=settings)
    change = (whole - upsample(clip, (240, 24), "bicubic")).abs().mean()
    preview = run(clip, changing, settings=settings, region=region)
    difference = (preview - cut(whole, region)).abs()
    assert 0 < difference.mean() < 0.2 * change


@pytest.mark.parametrize("scale", [1.0, 2.3])
def test_shrinking_first_keeps_the_size_and_hides_what_the_smaller_input_cannot_show(scale):
    clip = clip_of(2, 17, 23)
    settings = Settings(sampling=SAMPLING, shrink=2.5)
    result = run(clip, model_of(CopiesHint()), scale=scale, settings=settings)
    size = output_size(23, 17, scale)
    small = F.interpolate(clip, size=(7, 9), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(
        result, upsample(small, size, "bicubic").clamp(0, 1), atol=3e-3, rtol=0
    )


def test_a_preview_shows_what_the_whole_run_shows_when_the_input_is_shrunk_first(changing):
    clip = clip_of(9, 17, 23)
    settings = Settings(sampling=SAMPLING, shrink=1.7, chunk=ChunkConfig(length=4, overlap=2))
    whole = run(clip, changing, settings=settings)
    region = (range(5, 16), range(9, 46))
    preview = run(clip, changing, settings=settings, region=region, wanted=range(3, 6))
    assert (preview - cut(whole[3:6], region)).abs().max() < 1e-6


def test_strength_0_is_the_bicubic_input_whether_or_not_it_is_shrunk(changing):
    clip = clip_of(2, 9, 12)
    results = [
        run(clip, changing, settings=Settings(sampling=SAMPLING, strength=0, shrink=shrink))
        for shrink in (1, 3)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("shrink", [0.9, 0, math.inf, math.nan])
def test_shrink_below_1_is_refused(shrink):
    with pytest.raises(ValueError, match="shrink must be a finite number from 1"):
        Settings(shrink=shrink)


# what else comes in and goes out


def test_alpha_is_enlarged_beside_the_colours(changing):
    clip = clip_of(2, 8, 10)
    alpha = torch.rand(2, 1, 8, 10)
    restored = run(torch.cat([clip, alpha], dim=1), changing)
    assert torch.equal(restored[:, :3], run(clip, changing))
    assert torch.equal(restored[:, 3:], upsample(alpha, (20, 16), "bicubic").clamp(0, 1))


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "heun"])
def test_progress_counts_every_stage_to_its_end(changing, sampler):
    calls: dict[str, list[tuple[int, int]]] = {}

    def on_progress(stage, done, total):
        calls.setdefault(stage, []).append((done, total))

    settings = Settings(
        sampling=replace(SAMPLING, steps=2, sampler=sampler),
        chunk=ChunkConfig(length=2, overlap=1),
    )
    run(clip_of(3, 6, 8), changing, settings=settings, on_progress=on_progress)
    assert list(calls) == ["encode", "denoise", "decode"]
    for counted in calls.values():
        total = counted[0][1]
        assert counted == [(done, total) for done in range(total + 1)]


def test_an_exception_from_progress_ends_the_run(changing):
    def stop(stage, done, total):
        if stage == "denoise":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(clip_of(1, 8, 10), changing, on_progress=stop)


def test_reference_pads_with_white_to_720p_and_draws_one_sample_of_each_posterior():
    seen, drawn = [], []

    class Watching(LosslessVAE):
        def encode_frame(self, frame, *, noise=None, tile=None):
            seen.append(frame)
            drawn.append(noise)
            return super().encode_frame(frame)

    settings = Settings(
        sampling=replace(SAMPLING, steps=2, upsample="bilinear", color_fix="none"),
        behaviour=REFERENCE,
    )
    clip = clip_of(2, 8, 10)
    restored = run(clip, model_of(CopiesHint()), vae=Watching(), settings=settings)
    assert seen[0].shape == (1, 3, 720, 1280) and seen[0][0, :, 0, 0].eq(1).all()
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.allclose(restored, upsample(clip, (20, 16), "bilinear"), atol=5e-3)


def test_reference_refuses_at_once_what_the_original_crashes_on():
    settings = Settings(sampling=SAMPLING, behaviour=REFERENCE)
    with pytest.raises(ValueError, match="at least 2 steps"):
        run(clip_of(1, 8, 10), model_of(SimpleNamespace()), settings=settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"noise_level": 1001}, "noise level"),
        ({"sampler": "midpoint"}, "sampler must be one of"),
        ({"color_fix": "lab"}, "color fix must be one of"),
        ({"cfg": float("nan")}, "cfg"),
        ({"cfg_rescale": 2.0}, "cfg rescale"),
        ({"solver_mode": "slow"}, "solver mode"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_made(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(sampling=replace(SAMPLING, **change))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_outside_64_bits_are_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        Settings(seed=seed)


def test_reference_has_no_wavelet_fix_because_its_reference_frame_is_small():
    with pytest.raises(ValueError, match="adain"):
        Settings(sampling=replace(SAMPLING, color_fix="wavelet"), behaviour=REFERENCE)


def test_how_the_network_works_is_as_asked_for_and_as_before_afterwards(changing):
    """Each setting changes the result by itself, but for those that only save memory."""
    clip, sampling = clip_of(2, 12, 16), replace(SAMPLING, steps=3, cfg=3.0)
    network = changing.network

    def restored(execution=None, **asked):
        settings = Settings(sampling=sampling, **asked)
        return run(clip, changing, settings=settings, execution=execution)

    plain = restored()
    small = Execution(slicing=Slicing(spatial_pixels=20, temporal_pixels=20, offload=True))
    assert (restored(small) - plain).abs().max() < 1e-4
    for asked in (
        {"latent_tile": Tile(size=12, overlap=4)},
        {"shortcuts": Shortcuts(attention_window=4)},
        {"shortcuts": Shortcuts(reuse=500)},
    ):
        assert (restored(**asked) - plain).abs().max() > 1e-4
        assert (network.slicing, network.tile, network.attention_window) == (None, None, None)


def test_guidance_in_an_interval_asks_for_fewer_velocities(changing):
    sampling, calls = replace(SAMPLING, steps=3, cfg=3.0), []
    handle = changing.network.register_forward_pre_hook(lambda *_: calls.append(None))
    for shortcuts in (Shortcuts(), Shortcuts(guidance=(0, 500))):
        run(clip_of(1, 6, 8), changing, settings=Settings(sampling=sampling, shortcuts=shortcuts))
    handle.remove()
    assert len(calls) == 6 + 4  # of the levels 899, 674 and 449 the last is guided


def test_a_latent_tile_that_is_too_small_is_refused_before_anything_is_read(changing):
    def unread():
        raise AssertionError("read")
        yield

    settings = Settings(sampling=SAMPLING, latent_tile=Tile(size=7, overlap=2))
    span = FrameSpan.of(range(1), chunk=settings.chunk, decode_window=3, behaviour=DEFAULT)
    canvas = Canvas.of((16, 12), vae_factor=FACTOR, levels=1, behaviour=DEFAULT)
    shot = ShotJob(
        span=span,
        positive=PROMPT,
        negative=PROMPT,
        settings=settings,
    )
    with pytest.raises(ValueError, match="use at least 8 pixels"):
        list(restore(unread(), changing, LosslessVAE(), [shot], canvas))


def test_long_attention_is_warned_of_with_its_remedy(changing, caplog, monkeypatch):
    clip = torch.rand(2, 3, 16, 16)  # latents of 16x16, attention at half of that
    monkeypatch.setattr(pipeline, "MANY_TOKENS", 63)
    run(clip, changing)
    assert "attention over 64 tokens" in caplog.text and "--latent-tile" in caplog.text
    caplog.clear()
    tiled = Settings(sampling=SAMPLING, latent_tile=Tile(size=24, overlap=4))
    run(clip, changing, settings=tiled)
    monkeypatch.setattr(pipeline, "MANY_TOKENS", 64)
    run(clip, changing)
    assert not caplog.text


@pytest.mark.parametrize(
    ("strength", "alpha", "enlarged"), [(1.0, False, []), (0.5, False, [3]), (1.0, True, [1])]
)
def test_the_bicubic_picture_is_made_only_where_it_is_used(
    changing, monkeypatch, strength, alpha, enlarged
):
    channels = []
    monkeypatch.setattr(
        shot_run,
        "upsample",
        lambda x, size, mode: (
            (mode == "bicubic" and channels.append(len(x))) or upsample(x, size, mode)
        ),
    )
    clip = clip_of(1, 12, 16)
    clip = torch.cat([clip, clip[:, :1]], dim=1) if alpha else clip
    sampling = replace(SAMPLING, upsample="bilinear")
    settings = Settings(sampling=sampling, strength=strength)
    assert len(run(clip, changing, settings=settings)[0]) == 3 + alpha
    assert channels == enlarged
