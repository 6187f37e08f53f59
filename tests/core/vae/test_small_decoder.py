"""Small decoders: what a file holds is loaded, and takes the place of the VAE's own decoder."""

from dataclasses import asdict

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from safetensors.torch import save_file
from torch import nn

from star_core.checkpoints.find import find_vae, first_of
from star_core.checkpoints.kinds import VAE_PATCH
from star_core.model import BUILT_IN
from star_core.vae.cogvideox import causal_vae
from star_core.vae.load import geometry_of, load_frame_vae
from star_core.vae.patch import PatchGeometry
from star_core.vae.small_decoder import (
    SmallDecodedGeometry,
    SmallDecoder,
    SmallDecoderConfig,
    TaesdDecoder,
    load_decoder,
    save_decoder,
    save_with_decoder,
    use_decoder,
)
from star_core.vae.svd import svd_vae
from tests.cogvideox_files import VAE

CONFIG = SmallDecoderConfig(latent_channels=32, factor=4, width=8, blocks=2)


def random(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def test_frames_of_a_window_influence_their_neighbours_alone():
    decoder = random(SmallDecoder(SmallDecoderConfig(latent_channels=4, factor=2, blocks=1)))
    z = torch.randn(5, 4, 6, 6)
    changed = z.clone()
    changed[1] += 1
    with torch.no_grad():
        difference = (decoder(changed, 5) - decoder(z, 5)).abs().mean((1, 2, 3))
        apart = (decoder(changed, 1) - decoder(z, 1)).abs().mean((1, 2, 3))
    assert (difference > 0).tolist() == [True, True, True, False, False]
    assert (apart > 0).tolist() == [False, True, False, False, False]


def test_an_untrained_decoder_is_linear_and_a_trained_one_adds_to_that():
    decoder, z = SmallDecoder(CONFIG), torch.randn(3, CONFIG.latent_channels, 6, 5)
    with torch.no_grad():
        linear = nn.functional.pixel_shuffle(decoder.linear(z), CONFIG.factor)
        assert linear.std() > 0 and torch.equal(decoder(z, 3), linear)
        decoder.conv_out.bias.fill_(0.5)  # pyright: ignore[reportOptionalMemberAccess]
        torch.testing.assert_close(decoder(z, 3), linear + 0.5)


def test_a_saved_decoder_decodes_for_its_vae(tmp_path):
    decoder, path = random(SmallDecoder(CONFIG)), tmp_path / "decoder.safetensors"
    save_decoder(path, decoder)
    vae = PatchGeometry().build()
    encoded = vae.encode_frame(torch.zeros(1, 3, 16, 8))
    use_decoder(vae, path)
    assert torch.equal(vae.encode_frame(torch.zeros(1, 3, 16, 8)), encoded)
    latents = torch.randn(1, 32, 3, 4, 2)
    with torch.no_grad():
        expected = decoder(latents[0].transpose(0, 1), 3)
    video = vae.decode(latents, window=3, overlap=0)
    torch.testing.assert_close(video[0].transpose(0, 1), expected, rtol=0.02, atol=0.02)
    own = sum(p.numel() for p in PatchGeometry().build().model.decoder.parameters())
    kept = sum(p.numel() for p in vae.model.parameters())
    whole = sum(p.numel() for p in PatchGeometry().build().model.parameters())
    assert kept == whole - own + sum(p.numel() for p in decoder.parameters())


def test_the_scaling_factor_stays_outside_of_a_small_decoder(tmp_path):
    config = SmallDecoderConfig(latent_channels=4, factor=2, width=4, blocks=1)
    decoder, path = random(SmallDecoder(config)), tmp_path / "decoder.safetensors"
    save_decoder(path, decoder)
    vae = svd_vae({"block_out_channels": (32, 32), "scaling_factor": 0.18215})
    use_decoder(vae, path)
    latents = torch.randn(1, 4, 1, 4, 4)
    with torch.no_grad():
        expected = decoder(latents[:, :, 0], 1)
    torch.testing.assert_close(vae.decode(latents)[:, :, 0], expected, rtol=0.02, atol=0.02)


def test_the_file_of_a_vae_may_hold_its_decoder(tmp_path):
    decoder, path = random(SmallDecoder(CONFIG)), tmp_path / "vae.safetensors"
    tiny = BUILT_IN["tiny"][1]
    save_with_decoder(path, tiny, decoder)
    geometry = SmallDecodedGeometry(vae=PatchGeometry(), decoder=CONFIG)
    assert geometry_of(path) == geometry_of(tiny, path) == geometry_of(path, path) == geometry
    vae, own = load_frame_vae(path), load_frame_vae(tiny)
    picture, z = torch.rand(1, 3, 8, 8) * 2 - 1, torch.randn(1, 32, 2, 4, 4)
    assert torch.equal(vae.encode_frame(picture), own.encode_frame(picture))
    apart = load_frame_vae(tiny)
    use_decoder(apart, path)
    again = load_frame_vae(path)
    use_decoder(again, path)
    video = vae.decode_window(z)
    assert vae.geometry == apart.geometry == again.geometry == geometry
    assert torch.equal(video, apart.decode_window(z)) and torch.equal(video, again.decode_window(z))
    assert not torch.allclose(video, own.decode_window(z))
    assert find_vae(path) == path and first_of([path], (VAE_PATCH,)) == path


def test_taesd_is_read_in_both_namings(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = AutoencoderTiny()
    diffusers = {f"decoder.{key}": value for key, value in theirs.decoder.state_dict().items()}
    original = {
        f"{int(number) + 1}.{rest}": value
        for key, value in diffusers.items()
        for number, _, rest in [key.removeprefix("decoder.layers.").partition(".")]
    }
    z = 3 * torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = theirs.decoder(z)
        for name, tensors in (("diffusers", diffusers), ("original", original)):
            save_file(tensors, tmp_path / f"{name}.safetensors")
            decoder = load_decoder(tmp_path / f"{name}.safetensors")
            assert isinstance(decoder, TaesdDecoder)
            torch.testing.assert_close(decoder(z), expected)


def test_decoders_that_do_not_fit_are_refused(tmp_path):
    path, other = tmp_path / "decoder.safetensors", tmp_path / "other.safetensors"
    save_decoder(path, SmallDecoder(CONFIG))
    with pytest.raises(ValueError, match="32 channels, 4 pixels wide; the VAE's have 4 and 2"):
        use_decoder(svd_vae({"block_out_channels": (32, 32)}), path)
    with pytest.raises(ValueError, match="CogVideoX.*leave it out"):
        use_decoder(causal_vae(VAE), path)
    save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="holds no small decoder"):
        load_decoder(other)
    with pytest.raises(ValueError, match="must be at least 1"):
        SmallDecoderConfig(**asdict(CONFIG) | {"width": 0})
