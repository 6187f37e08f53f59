"""The stages in which the built-in model is made: clips, VAE, latent pairs, network."""

from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch

from star_core.degradation import COMPRESSION, MILD
from star_core.star_checkpoint import load_model, save_model
from star_core.training import tiny
from star_core.training.autoencoder import TINY_VAE, start_as_projection, train_vae
from star_core.training.clips import ClipConfig, cut_clips
from star_core.training.pairs import LatentPairs, encode_pairs
from star_core.training.tiny import MODEL_FILE, NETWORK, SAMPLING
from star_core.vae.patch import patch_vae
from star_core.video_io import open_sink
from tests.small_run import Distance


def noise_frames(count=40):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def projecting_vae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = patch_vae(TINY_VAE)
    start_as_projection(vae.model, noise_frames())  # pyright: ignore[reportArgumentType]
    return vae


def test_an_untrained_vae_keeps_what_most_of_its_patches_are():
    vae = projecting_vae()
    smooth = torch.linspace(-0.5, 0.5, 32).expand(1, 3, 1, 32, 32)
    start_as_projection(vae.model, smooth[:, :, 0].repeat(4, 1, 1, 1))  # pyright: ignore
    with torch.inference_mode():
        error = vae.decode(vae.encode(smooth)) - smooth
    assert error.std() < smooth.std() / 100


def test_pairs_hold_the_clean_and_the_degraded_clip(tmp_path):
    vae = projecting_vae()
    clips = (torch.rand(2, 3, 3, 16, 16) * 255).byte()
    encode_pairs(clips, vae, [(1.0, MILD)], 5, tmp_path / "a.safetensors")
    shard = LatentPairs(tmp_path).shards[0]
    assert shard["hq"].shape == shard["lq"].shape == (2, 32, 3, 4, 4)
    clean = vae.encode(clips[:1].float().transpose(1, 2) / 127.5 - 1)[0]
    torch.testing.assert_close(shard["hq"][0].float(), clean, atol=2e-3, rtol=1e-2)
    assert not torch.allclose(shard["lq"].float(), shard["hq"].float(), atol=0.05)


def test_clips_are_cut_from_videos_and_stills_and_repeat_with_the_seed(tmp_path):
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(8, 3, 40, 48, generator=generator)
    for name, count in (("video.mkv", 8), ("still_%d.png", 1)):
        with open_sink(tmp_path / name, width=48, height=40, fps=Fraction(25)) as sink:
            for frame in frames[:count]:
                sink.write(frame)
    config = ClipConfig(size=(3, 16, 16), cut=300)
    clips = cut_clips(tmp_path, 6, 7, config)
    assert clips.shape == (6, 3, 3, 16, 16) and clips.dtype == torch.uint8
    assert torch.equal(clips, cut_clips(tmp_path, 6, 7, config))
    assert not torch.equal(clips, cut_clips(tmp_path, 6, 8, config))


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no videos"):
        cut_clips(tmp_path, 1, 0, ClipConfig())


def test_the_clips_of_a_shard_are_degraded_by_the_shares_of_the_recipes(tmp_path):
    vae = projecting_vae()
    clips = (torch.rand(1, 1, 3, 16, 16) * 255).byte().expand(8, -1, -1, -1, -1)
    encode_pairs(clips, vae, [(0.5, MILD), (0.5, COMPRESSION)], 0, tmp_path / "a.safetensors")
    lq = LatentPairs(tmp_path).shards[0]["lq"].float()
    noisy = (lq - lq.median(0).values).abs().mean((1, 2, 3, 4))
    assert 0 < (noisy > noisy.mean()).sum() < 8


def test_the_built_in_model_is_made_and_then_sharpened_from_a_folder_of_videos(
    tmp_path, monkeypatch
):
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = torch.rand(12, 3, 104, 112, generator=torch.Generator().manual_seed(0))
    with open_sink(folder / "a.mkv", width=112, height=104, fps=Fraction(25)) as sink:
        for frame in frames:
            sink.write(frame)
    monkeypatch.setattr(tiny, "CLIPS", ClipConfig(size=(3, 104, 112), candidates=1, cut=300))
    monkeypatch.setattr(tiny, "CROP", (2, 6, 4))
    monkeypatch.setattr(tiny, "NETWORK", replace(NETWORK, dim_mult=(1,), attn_scales=(1.0,)))
    monkeypatch.setattr(tiny, "train_vae", partial(train_vae, batch=4, crop=16, first=40))
    monkeypatch.setattr(tiny, "load_lpips", lambda *_, **__: Distance())
    small: Any = {"vae_steps": 1, "shards": 1, "per_shard": 2}
    first, second = tmp_path / "first", tmp_path / "second"
    seen: list[tuple[str, int, int]] = []
    tiny.train_tiny(folder, first, steps=1, **small, on_progress=lambda *at: seen.append(at))
    assert seen == [
        ("clips", 1, 2),
        ("clips", 2, 2),
        ("VAE", 1, 1),
        ("pairs", 1, 2),
        ("pairs", 2, 2),
    ]
    made = load_model(first / MODEL_FILE, dtype=torch.float32)
    assert made.prompts is not None and made.prompts.presets == ("faithful",)
    tiny.train_tiny(folder, second, steps=3, start=first, sharp=0.9, **small)
    sharpened = load_model(second / MODEL_FILE, dtype=torch.float32)
    assert sharpened.prompts is not None and sharpened.prompts.presets == ("faithful", "sharp")
    assert sharpened.config == made.config
    with pytest.raises(ValueError, match="--start"):
        tiny.train_tiny(folder, tmp_path / "third", steps=1, sharp=0.5, **small)
    with pytest.raises(ValueError, match="0.05 degraded and 2.0 sharp"):
        tiny.train_tiny(folder, tmp_path / "third", steps=1, start=first, sharp=2.0, **small)
    save_model(first / MODEL_FILE, made.network, sampling=SAMPLING, overwrite=True)
    with pytest.raises(ValueError, match="no learned prompts"):
        tiny.train_tiny(folder, tmp_path / "third", steps=1, start=first, **small)
    assert not (tmp_path / "third" / "clips").exists()
