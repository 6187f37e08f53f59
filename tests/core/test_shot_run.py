"""Restoring with a VAE whose latents hold several frames: windows by themselves, held together."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from star_core.backbones import build_network
from star_core.models.cogvideox_weights import CogVideoXConfig
from star_core.pipeline import Settings, ShotJob, restore
from star_core.resume import Work
from star_core.sampling_defaults import COGVIDEOX_SAMPLING
from star_core.star_checkpoint import StarModel
from star_core.vae.cogvideox import CausalVideoVAE, causal_vae
from star_core.windows.canvas import Canvas, FrameSpan
from star_core.windows.chunking import ChunkConfig
from star_core.windows.geometry import output_size, upsample

CONFIG = CogVideoXConfig(
    in_dim=4, context_dim=12, context_length=5, dim=32, num_heads=2, num_layers=1, time_dim=16,
    grid=(3, 4),
)  # fmt: skip
SAMPLING = replace(COGVIDEOX_SAMPLING, steps=3, color_fix="none")
CHUNK = ChunkConfig(length=9, overlap=5, latent_frames=4)
PROMPT = torch.ones(1, 5, 12)


class LosslessVAE(CausalVideoVAE):
    """Latents are the pixels: of the first frame four times, then of four frames."""

    def __init__(self) -> None:
        self.model: Any = nn.Linear(1, 1)
        self.factor, self.latent_frames, self.latent_channels = 1, 4, 12

    def encode(self, video, *, noise=None, tile=None):
        assert (video.shape[2] - 1) % 4 == 0
        first = video[:, :, :1].expand(-1, -1, 4, -1, -1)
        groups = torch.cat([first, video[:, :, 1:]], dim=2).split(4, dim=2)
        return torch.stack([group.flatten(1, 2) for group in groups], dim=2)

    def decode(self, latents, *, tile=None):
        groups = [z.unflatten(1, (3, 4)) for z in latents.unbind(2)]
        return torch.cat([groups[0][:, :, -1:], *groups[1:]], dim=2)


class Predicts(nn.Module):
    """Predicts x_0 by `guess(hint, call)`; notes the shapes that it sees."""

    def __init__(self, settings: Settings, guess=lambda hint, call: hint) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.schedule, self.guess = settings.levels.schedule, guess
        self.seen: list[tuple[int, ...]] = []

    def working(self, **how):
        return nullcontext()

    def forward(self, x, t, y, hint):
        self.seen.append(tuple(x.shape))
        assert x.shape[-2] % 2 == 0 and x.shape[-1] % 2 == 0
        guess = self.guess(hint, len(self.seen) - 1)
        return self.schedule.velocity_between(x, guess, t)


def settings_of(**changes) -> Settings:
    sampling = replace(SAMPLING, cfg=1.0)
    return Settings(**{"sampling": sampling, "chunk": CHUNK} | changes)


def clip_of(frames: int, height: int = 8, width: int = 10) -> Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(clip, network, settings, *, vae=None, wanted=None, scale=1.0, **options) -> Tensor:
    vae = vae or LosslessVAE()
    span = FrameSpan.of(
        range(len(clip)), wanted, chunk=settings.chunk, decode_window=3,
        behaviour=settings.behaviour,
    )  # fmt: skip
    canvas = Canvas.of(
        output_size(clip.shape[-1], clip.shape[-2], scale), vae_factor=vae.factor,
        levels=CONFIG.downsamplings, behaviour=settings.behaviour,
    )  # fmt: skip
    model = StarModel(network=network, config=CONFIG, sampling=SAMPLING, prompts=None)
    shot = ShotJob(span=span, positive=PROMPT, negative=0 * PROMPT, settings=settings)
    frames = clip[span.needed.start : span.needed.stop]
    return torch.stack(list(restore(frames, model, vae, [shot], canvas, **options)))


@hypothesis_settings(max_examples=30)
@given(
    frames=st.integers(1, 40), height=st.integers(1, 9), width=st.integers(1, 9),
    scale=st.sampled_from([1.0, 2.5]), overlap=st.sampled_from([0, 1, 5]), hold=st.booleans(),
)  # fmt: skip
def test_a_network_that_predicts_its_input_gives_the_enlarged_clip_of_any_length_and_size(
    frames, height, width, scale, overlap, hold
):
    settings = settings_of(chunk=replace(CHUNK, overlap=overlap, hold=hold))
    clip = clip_of(frames, height, width)
    expected = upsample(clip, output_size(width, height, scale), "bicubic").clamp(0, 1)
    restored = run(clip, Predicts(settings), settings, scale=scale)
    torch.testing.assert_close(restored, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("frames", [9, 10, 13, 30])
def test_every_window_has_the_length_of_a_chunk(frames):
    settings = settings_of()
    network = Predicts(settings)
    run(clip_of(frames), network, settings)
    assert {shape[2] for shape in network.seen} == {3}
    windows = 1 + -(-(frames - 9) // 4)
    assert len(network.seen) == 3 * windows


@pytest.mark.parametrize("frames, latents", [(1, 1), (4, 2), (5, 2), (8, 3)])
def test_a_short_clip_is_one_window_filled_up_to_whole_latents(frames, latents):
    settings = settings_of()
    network = Predicts(settings)
    assert len(run(clip_of(frames), network, settings)) == frames
    assert {shape[2] for shape in network.seen} == {latents}


def windows_apart(hint: Tensor, call: int) -> Tensor:
    """Another brightness in every window (of 3 evaluations)."""
    return hint + 0.2 * (call // 3)


@pytest.mark.parametrize("hold", [True, False])
def test_shared_frames_are_held_as_the_window_before_has_restored_them(hold):
    settings = settings_of(chunk=replace(CHUNK, hold=hold))
    clip = clip_of(13) / 2
    restored = run(clip, Predicts(settings, windows_apart), settings)
    step = (restored - clip).mean((1, 2, 3))
    assert step[:4].abs().max() < 1e-3 and (step[9:] - 0.1).abs().max() < 1e-3
    shared = step[4:9]  # frames of the second window that the first has restored
    if hold:
        assert shared.abs().max() < 1e-3
    else:
        assert (shared.diff() > 0).all() and shared[2] == pytest.approx(0.05, abs=1e-3)


def test_the_last_window_is_moved_back_to_end_on_the_last_frame():
    settings = settings_of()
    span = FrameSpan.of(range(15), chunk=CHUNK, decode_window=3, behaviour=settings.behaviour)
    assert [group.frames for group in span.groups] == [range(9), range(4, 13), range(6, 15)]
    assert [group.shared for group in span.groups] == [0, 5, 7]


@pytest.mark.parametrize("chunk", [{"length": 8}, {"length": 32}, {"length": 9, "overlap": 4}])
def test_chunks_that_do_not_fill_latents_are_refused(chunk):
    with pytest.raises(ValueError, match="4k\\+1 frames"):
        ChunkConfig(**{"overlap": 1, "latent_frames": 4} | chunk)


def test_a_part_of_the_clip_needs_only_the_windows_that_hold_it():
    settings = settings_of()
    network = Predicts(settings)
    restored = run(clip_of(40), network, settings, wanted=range(20, 23))
    torch.testing.assert_close(restored, clip_of(40)[20:23], atol=2e-4, rtol=0)
    assert len(network.seen) <= 3 * 3


@pytest.fixture(scope="module")
def small():
    """A random network and VAE of the real classes, and settings with guidance."""
    torch.manual_seed(0)
    network = build_network(CONFIG).requires_grad_(False).eval()
    vae = causal_vae({
        "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
        "latent_channels": 4, "sample_height": 32, "sample_width": 48,
    })  # fmt: skip
    vae.model.eval().requires_grad_(False)
    return network, vae


def test_the_real_classes_restore_a_clip_in_tiles_and_windows(small):
    network, vae = small
    settings = Settings(sampling=SAMPLING, chunk=CHUNK)
    clip = clip_of(9, 12, 16)
    restored = run(clip, network, settings, vae=vae, scale=3.0)
    assert restored.shape == (9, 3, 36, 48)
    assert restored.isfinite().all() and restored.std() > 0
    torch.testing.assert_close(run(clip, network, settings, vae=vae, scale=3.0), restored)


def test_no_strength_gives_the_bicubic_input_and_some_lies_between(small):
    network, vae = small
    clip = clip_of(6, 16, 16)
    none, half, full = (
        run(clip, network, Settings(sampling=SAMPLING, chunk=CHUNK, strength=s), vae=vae, scale=2.0)
        for s in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(none, upsample(clip, (32, 32), "bicubic").clamp(0, 1))
    assert (half - none).abs().mean() < (full - none).abs().mean()


def test_an_interrupted_run_goes_on_to_the_same_result(small, tmp_path):
    network, vae = small
    settings = Settings(sampling=SAMPLING, chunk=CHUNK)
    clip = clip_of(14, 8, 8)
    whole = run(clip, network, settings, vae=vae, scale=2.0)

    def stop_at(count):
        def on_progress(stage, done, total):
            if stage == "denoise" and done == count:
                raise KeyboardInterrupt

        return on_progress

    evaluations = []
    network_counts = network.register_forward_pre_hook(lambda m, args: evaluations.append(1))
    for count in (2, 5):
        with Work(tmp_path / "work", keep=True) as work, pytest.raises(KeyboardInterrupt):
            work.begin("same")
            run(clip, network, settings, vae=vae, scale=2.0, work=work, on_progress=stop_at(count))
    with Work(tmp_path / "work", keep=True) as work:
        work.begin("same")
        done = run(clip, network, settings, vae=vae, scale=2.0, work=work)
    network_counts.remove()
    torch.testing.assert_close(done, whole)
    assert len(evaluations) < 2 * (2 + 5 + 9)
