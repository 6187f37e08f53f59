"""Our networks against those of diffusers, whose names their weights have: the same numbers."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from star_core.causal_vae import causal_vae_from_config
from star_core.models import cogvideox_vae
from star_core.models.cogvideox_dit import CogVideoXDiT
from star_core.models.cogvideox_weights import CogVideoXConfig
from star_core.models.liem import SpatialLIEM, TemporalLIEM
from star_core.vae import vae_from_config


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alike(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Both with the same random weights, those of ours."""
    for seed, (key, tensor) in enumerate(sorted(ours.state_dict().items())):
        tensor.copy_(0.1 * noise(*tensor.shape, seed=seed))
        if tensor.ndim == 1 and "norm" in key and key.endswith("weight"):
            tensor.add_(1)
    left_out = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not left_out.missing_keys
    assert all("_local." in key for key in left_out.unexpected_keys)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("channels", [(32, 64), (32, 32, 64)])
def test_the_vae_of_svd(channels, layers):
    config = {"block_out_channels": channels, "layers_per_block": layers}
    vae = vae_from_config(config)
    blocks: Any = ("DownEncoderBlock2D",) * len(channels)
    _, theirs = alike(vae.model, AutoencoderKLTemporalDecoder(down_block_types=blocks, **config))
    frame = noise(1, 3, 24, 32)
    mean = theirs.encode(frame).latent_dist.mean
    torch.testing.assert_close(vae.encode_frame(frame), mean * vae.scaling_factor)
    latents = noise(6, 4, 6, 8)
    video = theirs.decode(latents, num_frames=3).sample
    torch.testing.assert_close(vae.model.decode(latents, 3), video)


@pytest.mark.parametrize("pixels", [1, 2 * 16 * 24, 5 * 8 * 12, 2**19])
@pytest.mark.parametrize("frames", [1, 5, 13, 17])
def test_the_vae_of_cogvideox_in_whole_windows_and_a_few_frames_at_a_time(
    monkeypatch, frames, pixels
):
    monkeypatch.setattr(cogvideox_vae, "PIXELS", pixels)
    config = {
        "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "norm_eps": 1e-3, "latent_channels": 4, "scaling_factor": 0.7,
    }  # fmt: skip
    vae = causal_vae_from_config(config)
    types = {
        f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")
    }
    _, theirs = alike(vae.model, AutoencoderKLCogVideoX(**types, **config))
    clip = noise(1, 3, frames, 16, 24)
    theirs.num_sample_frames_batch_size = frames
    mean = theirs.encode(clip).latent_dist.mean
    torch.testing.assert_close(vae.encode(clip), mean * 0.7, atol=1e-5, rtol=1e-5)
    z = noise(1, 4, (frames - 1) // 8 * 2 + 1, 2, 3)
    video = theirs.decode(z / 0.7).sample
    torch.testing.assert_close(vae.decode(z), video, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_time_is_halved_as_often_as_the_configuration_says(ratio):
    config = {
        "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "latent_channels": 4, "temporal_compression_ratio": ratio,
    }  # fmt: skip
    vae = causal_vae_from_config(config)
    assert vae.encode(noise(1, 3, 1 + 2 * ratio, 16, 24)).shape[2] == 3


@pytest.mark.parametrize("grid", [(3, 4, 6), (1, 3, 5), (2, 9, 8)])
@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_the_transformer_of_cogvideox_with_open_gates(monkeypatch, positions, grid):
    for gate in (SpatialLIEM, TemporalLIEM):
        monkeypatch.setattr(gate, "forward", lambda self, x: x)
    config = CogVideoXConfig(
        in_dim=4, context_dim=24, context_length=5, dim=64, num_heads=2, num_layers=2, time_dim=16,
        positions=positions, grid=grid[1:],
    )  # fmt: skip
    f, h, w = grid
    ours, theirs = alike(
        CogVideoXDiT(config),
        CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=8, out_channels=4,
            time_embed_dim=16, text_embed_dim=24, num_layers=2, max_text_seq_length=5,
            sample_width=2 * w, sample_height=2 * h, sample_frames=4 * f - 3,
            use_rotary_positional_embeddings=positions == "rotary",
        ),
    )  # fmt: skip
    theirs.norm_out.norm.eps = 1e-6  # as STAR was trained
    rotary = None
    if positions == "rotary":
        rotary = get_3d_rotary_pos_embed(32, ((0, 0), (h, w)), (h, w), f)
    x, hint, text = (noise(2, *shape) for shape in ((4, f, 2 * h, 2 * w),) * 2 + ((5, 24),))
    t = torch.tensor([999, 37])
    (expected,) = theirs(
        torch.cat([x, hint], dim=1).movedim(1, 2), text, t,
        image_rotary_emb=rotary, return_dict=False,
    )  # fmt: skip
    torch.testing.assert_close(ours(x, t, text, hint), expected.movedim(2, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (vae_from_config, {"in_channels": 1}),
        (vae_from_config, {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}),
        (causal_vae_from_config, {"use_quant_conv": True}),
        (causal_vae_from_config, {"latents_mean": [0.1] * 16}),
        (causal_vae_from_config, {"act_fn": "gelu"}),
    ],
)
def test_a_configuration_of_another_network_is_refused_by_name(build, config):
    with torch.device("meta"), pytest.raises(ValueError, match=next(iter(config))):
        build(config)
