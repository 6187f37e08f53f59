import json

import pytest
import torch
from safetensors.torch import save_file

from star_core.checkpoints.kinds import VAE_PATCH, identify
from star_core.vae.load import geometry_of, load_frame_vae
from star_core.vae.patch import PatchGeometry, patch_vae

CONFIG = {
    "patch": 2,
    "latent_channels": 5,
    "width": 8,
    "encoder_blocks": 1,
    "decoder_blocks": 2,
    "scaling_factor": 0.5,
}


@pytest.fixture(scope="module")
def vae():
    vae = patch_vae(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for tensor in vae.model.state_dict().values():
        tensor.normal_(std=0.2, generator=generator)
    vae.model.requires_grad_(False)
    return vae


def test_a_file_brings_its_size_and_is_known_by_its_names(vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(vae.model.state_dict(), path, metadata={"star_vae": json.dumps(CONFIG)})
    loaded = load_frame_vae(path)
    video = torch.rand(1, 3, 2, 8, 12)
    assert torch.equal(loaded.encode(video), vae.encode(video))
    size = {name: value for name, value in CONFIG.items() if name != "scaling_factor"}
    assert geometry_of(path) == loaded.geometry == PatchGeometry(**size)
    assert identify(vae.model.state_dict()) is VAE_PATCH
    save_file(vae.model.state_dict(), path)
    with pytest.raises(ValueError, match="built-in model"):
        load_frame_vae(path)


def test_latents_are_of_patches_and_scaled(vae):
    video = torch.rand(2, 3, 2, 8, 12)
    latents = vae.encode(video)
    assert latents.shape == (2, 5, 2, 4, 6)
    patches = torch.nn.functional.pixel_unshuffle(video[:, :, 0], 2)
    torch.testing.assert_close(latents[:, :, 0], 0.5 * vae.model.encoder(patches))
    assert vae.decode(latents, window=2, overlap=0).shape == video.shape


def test_frames_do_not_see_each_other(vae):
    latents = torch.randn(1, 5, 3, 4, 6)
    together = vae.decode(latents, window=3, overlap=0)
    torch.testing.assert_close(together, vae.decode(latents, window=1, overlap=0))


def test_an_edge_is_no_step_into_darkness(vae):
    flat = vae.decode(torch.ones(1, 5, 1, 8, 8), window=1, overlap=0)
    patch = flat[..., :2, :2]
    torch.testing.assert_close(flat, patch.repeat(1, 1, 1, 8, 8))
