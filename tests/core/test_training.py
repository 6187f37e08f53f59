from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from star_core.checkpoints import load_model
from star_core.degradation import MILD
from star_core.models.unet import ControlledVideoUNet
from star_core.training.autoencoder import TINY_VAE, start_as_resampler
from star_core.training.clips import ClipConfig, cut_clips
from star_core.training.pairs import LatentPairs, encode_pairs
from star_core.training.tiny import NETWORK, SAMPLING
from star_core.training.trainer import (
    MODEL_FILE,
    Prompts,
    TrainConfig,
    draw_timesteps,
    learning_rate,
    start_from_hint,
    train,
    training_loss,
)
from star_core.vae import vae_from_config
from star_core.video_io import open_sink

SMALL = replace(NETWORK, in_dim=4, out_dim=4, dim_mult=(1,), attn_scales=(), hint_prior=0.5)
CONFIG = TrainConfig(steps=4, batch=2, crop=(2, 4, 4), warmup=1, learning_rate=5e-3)


@pytest.fixture
def pairs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lq = torch.randn(6, 4, 2, 4, 4, generator=generator)
    folder = tmp_path / "pairs"
    folder.mkdir()
    save_file({"hq": (0.5 * lq).half(), "lq": lq.half()}, folder / "pairs_000.safetensors")
    return LatentPairs(folder)


def started():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ControlledVideoUNet(SMALL)
    start_from_hint(network)
    return network, Prompts(2, SMALL.context_dim, torch.Generator().manual_seed(0))


def test_training_starts_from_copying_the_hint():
    network, _ = started()
    hint = torch.randn(1, 4, 2, 4, 4)
    pure_noise = torch.randn(1, 4, 2, 4, 4)
    v = network(pure_noise, torch.tensor([999]), torch.zeros(1, 2, SMALL.context_dim), hint)
    torch.testing.assert_close(-v, hint)


def test_loss_reaches_network_controlnet_gates_and_prompts_after_the_first_step(pairs, tmp_path):
    train(pairs, SMALL, CONFIG, SAMPLING, tmp_path, every=4)
    network = load_model(tmp_path / MODEL_FILE, dtype=torch.float32).network.requires_grad_(True)
    prompts = Prompts(2, SMALL.context_dim, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    hq, lq = pairs.draw(4, CONFIG.crop, generator)
    config = replace(CONFIG, degraded=0.5)
    loss, _ = training_loss(network, prompts, hq, lq, config, generator)
    loss.backward()
    parameters = dict(network.named_parameters()) | dict(prompts.named_parameters())
    for part in ("VideoControlNet.input_hint_block", "local1", "out.2", "positive", "negative"):
        gradients = [p.grad for key, p in parameters.items() if part in key]
        assert gradients
        assert any(g is not None and g.any() for g in gradients), part


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(pairs, tmp_path):
    train(pairs, SMALL, CONFIG, SAMPLING, tmp_path / "whole", every=2)

    class Stop(Exception):
        pass

    def stop(step, steps, parts):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(pairs, SMALL, CONFIG, SAMPLING, tmp_path / "cut", every=2, on_step=stop)
    train(pairs, SMALL, CONFIG, SAMPLING, tmp_path / "cut", every=2)
    whole, cut = (
        load_model(tmp_path / name / MODEL_FILE).network.state_dict() for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_training_goes_on_from_a_given_model(pairs, tmp_path):
    train(pairs, SMALL, CONFIG, SAMPLING, tmp_path / "first")
    first = load_model(tmp_path / "first" / MODEL_FILE, dtype=torch.float32)
    still = replace(CONFIG, steps=1, learning_rate=0.0)
    train(pairs, SMALL, still, SAMPLING, tmp_path / "second", init=first)
    second = load_model(tmp_path / "second" / MODEL_FILE, dtype=torch.float32)
    weights = second.network.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in first.network.state_dict().items())
    assert first.prompts and second.prompts
    assert torch.equal(first.prompts.negative, second.prompts.negative)


def test_written_model_describes_itself(pairs, tmp_path):
    train(pairs, SMALL, replace(CONFIG, steps=1), SAMPLING, tmp_path)
    model = load_model(tmp_path / MODEL_FILE)
    assert (model.config, model.sampling) == (SMALL, SAMPLING)
    assert model.prompts is not None
    assert model.prompts.positive.shape == (1, 4, SMALL.context_dim)


def test_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100, warmup=10, decay_from=50, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[-1] < 0.01
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_timesteps_stay_below_the_noise_level_and_prefer_its_last_quarter():
    config = TrainConfig(steps=1, noise_level=600, early=0.5)
    t = draw_timesteps(4000, config, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() < 600
    assert (t >= 450).float().mean().item() == pytest.approx(0.625, abs=0.04)


def test_untrained_vae_averages_and_interpolates():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = vae_from_config(TINY_VAE)
    start_as_resampler(vae.model)
    smooth = torch.linspace(-0.5, 0.5, 32).expand(1, 3, 1, 32, 32)
    with torch.inference_mode():
        error = vae.decode(vae.encode(smooth)) - smooth
    assert error[..., 4:-4, 4:-4].std() < smooth.std() / 2


def test_pairs_hold_the_clean_and_the_degraded_clip(tmp_path):
    vae = vae_from_config(TINY_VAE)
    start_as_resampler(vae.model)
    clips = (torch.rand(2, 3, 3, 16, 16) * 255).byte()
    encode_pairs(clips, vae, MILD, 5, tmp_path / "a.safetensors")
    shard = LatentPairs(tmp_path).shards[0]
    assert shard["hq"].shape == shard["lq"].shape == (2, 16, 3, 4, 4)
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
