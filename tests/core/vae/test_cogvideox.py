"""The VAE of the second backbone: windows of 4k+1 frames, files in either naming."""

import json

import pytest
import torch
from safetensors.torch import save_file

from star_core.vae import cogvideox_frames
from star_core.vae.cogvideox import causal_vae, decode_groups, in_diffusers_naming
from star_core.vae.load import load_vae
from star_core.windows.tiling import Tile

CONFIG = {
    "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "latent_channels": 4, "scaling_factor": 0.7,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = causal_vae(CONFIG)
    vae.model.eval()
    return vae


def video(frames, height=16, width=24):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
def test_a_window_of_4k_plus_1_frames_comes_back_as_long(vae, frames):
    latents = vae.encode(video(frames))
    assert latents.shape == (1, 4, 1 + (frames - 1) // 4, 2, 3)
    assert vae.decode(latents).shape == (1, 3, frames, 16, 24)


@pytest.mark.parametrize("shape", [(4, 16, 16), (5, 20, 16), (5, 16, 12)])
def test_other_sizes_are_refused(vae, shape):
    with pytest.raises(ValueError, match="4k\\+1 frames"):
        vae.encode(video(*shape))


def test_a_sample_of_the_posterior_is_its_mean_with_noise(vae):
    clip = video(5)
    mean = vae.encode(clip)
    noise = torch.randn(mean.shape)
    torch.testing.assert_close(vae.encode(clip, noise=0 * noise), mean)
    more = vae.encode(clip, noise=2 * noise) - mean
    torch.testing.assert_close(more, 2 * (vae.encode(clip, noise=noise) - mean))


def test_the_norms_of_the_encoder_see_the_whole_window(vae):
    clip = video(17)
    whole = vae.encode(clip)
    changed = clip.clone()
    changed[:, :, -1] = 1
    assert not torch.equal(vae.encode(changed)[:, :, 0], whole[:, :, 0])


@pytest.mark.parametrize("frames", [1, 5, 13, 17])
@pytest.mark.parametrize("pixels", [1, 2 * 16 * 24, 5 * 8 * 12])
def test_few_frames_at_a_time_give_the_numbers_of_diffusers_whole_windows(
    vae, monkeypatch, frames, pixels
):
    monkeypatch.setattr(cogvideox_frames, "PIXELS", pixels)
    clip = video(frames)
    latents = vae.encode(clip)
    vae.model.num_sample_frames_batch_size = frames
    whole = vae.model.encode(clip).latent_dist.mean
    torch.testing.assert_close(latents, whole * vae.scaling_factor, atol=1e-5, rtol=1e-5)
    z = torch.randn(1, 4, (frames - 1) // 8 * 2 + 1, 2, 3)
    plain = vae.model.decode(z / vae.scaling_factor).sample
    torch.testing.assert_close(vae.decode(z), plain, atol=1e-5, rtol=1e-5)


def test_where_gradients_are_on_they_reach_what_is_encoded_and_decoded(vae):
    clip = video(5).requires_grad_()
    with torch.enable_grad():
        latents = vae.encode(clip)
        vae.decode(latents).square().mean().backward()
    assert clip.grad is not None and clip.grad.abs().sum() > 0
    torch.testing.assert_close(latents.detach(), vae.encode(video(5)), atol=1e-5, rtol=1e-5)


def test_an_even_number_of_latent_frames_decodes_as_the_odd_number_before_it_begins(vae):
    latents = torch.randn(1, 4, 6, 2, 2)
    torch.testing.assert_close(vae.decode(latents)[:, :, :17], vae.decode(latents[:, :, :5]))


def test_groups_of_the_decoder_cover_odd_numbers_of_latent_frames():
    for frames in (1, 3, 5, 13):
        assert [i for group in decode_groups(frames) for i in group] == list(range(frames))


def test_tiles_are_blended(vae):
    clip, tile = video(5, 32, 32), Tile(size=24, overlap=16)
    latents = vae.encode(clip, tile=tile)
    assert latents.shape[-2:] == (4, 4)
    assert not torch.equal(latents, vae.encode(clip))
    assert vae.decode(latents, tile=tile).shape == clip.shape


def in_sat_naming(key: str) -> str:
    for ours, theirs in (
        ("mid_block.resnets.0.", "mid.block_1."),
        ("mid_block.resnets.1.", "mid.block_2."),
        ("down_blocks.", "down."),
        (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."),
        (".resnets.", ".block."),
        (".conv_shortcut.", ".nin_shortcut."),
    ):
        key = key.replace(ours, theirs)
    if key.startswith("decoder.up_blocks."):
        _, _, level, rest = key.split(".", 3)
        key = f"decoder.up.{3 - int(level)}.{rest}"
    return key


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_file_of_sats_loads_and_its_discriminator_is_left_out(tmp_path, vae, prefix):
    weights = vae.model.state_dict()
    theirs = {prefix + in_sat_naming(key): tensor for key, tensor in weights.items()}
    assert in_diffusers_naming(theirs).keys() == weights.keys()
    theirs[prefix + "loss.discriminator.weight"] = torch.zeros(2)
    torch.save({"state_dict": theirs}, tmp_path / "3d-vae.pt")
    stated = CONFIG | {"_class_name": "AutoencoderKLCogVideoX"}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    loaded = load_vae(tmp_path / "3d-vae.pt")
    clip = video(5)
    torch.testing.assert_close(loaded.encode(clip), vae.encode(clip))


def test_a_file_says_its_configuration_or_it_follows_from_the_shapes(tmp_path, vae):
    weights = {key: tensor.contiguous() for key, tensor in vae.model.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors", metadata={"star_vae": json.dumps(CONFIG)})
    loaded = load_vae(tmp_path / "a.safetensors")
    torch.testing.assert_close(loaded.encode(video(5)), vae.encode(video(5)))

    torch.manual_seed(0)
    published = causal_vae({"block_out_channels": (32, 32, 64, 64)})
    save_file(published.model.state_dict(), tmp_path / "b.safetensors")
    loaded = load_vae(tmp_path / "b.safetensors")
    assert loaded.model.config["block_out_channels"] == [32, 32, 64, 64]
    assert (loaded.scaling_factor, loaded.latent_channels) == (0.7, 16)
