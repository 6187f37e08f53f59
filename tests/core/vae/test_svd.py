import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import GroupNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from star_core.vae.frame_vae import VideoVAE
from star_core.vae.load import load_frame_vae, load_vae
from star_core.vae.svd import svd_vae
from star_core.windows.chunking import decode_in_windows
from star_core.windows.tiling import Tile
from tests.paths import GOLDEN

I2VGENXL = GOLDEN / "i2vgenxl"


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def golden():
    return load_file(I2VGENXL / "vae_chunking.safetensors")


@pytest.fixture(scope="module")
def golden_vae(golden, tmp_path_factory) -> VideoVAE:
    weights = {k.removeprefix("w."): v for k, v in golden.items() if k.startswith("w.")}
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(weights, path)
    return load_frame_vae(path)


def random_vae(**config) -> VideoVAE:
    """A VAE of factor 4 with every weight random, the mixers of space and time too."""
    vae = svd_vae({"block_out_channels": [32, 32, 64], "layers_per_block": 2} | config)
    generator = torch.Generator().manual_seed(0)
    for tensor in vae.model.state_dict().values():
        tensor.normal_(std=0.1, generator=generator)
    vae.model.eval()
    return vae


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return random_vae()


# --- The reference ---


def test_windows_of_three_without_overlap_are_the_references(golden, golden_vae):
    video = golden_vae.decode(golden["z"], window=3, overlap=0)
    # Tolerance of the vector.
    torch.testing.assert_close(video[0].movedim(1, 0), golden["decoded"], rtol=0, atol=1e-4)


def test_posterior_sample_with_given_noise_is_the_references(golden, golden_vae):
    latents = golden_vae.encode(
        golden["pixels"].movedim(2, 1), noise=lambda i: golden["encode_noise"][i, None]
    )
    torch.testing.assert_close(latents, golden["latents"], rtol=0, atol=1e-4)


def test_without_noise_latents_are_the_posterior_mean(golden, golden_vae):
    latents = golden_vae.encode(golden["pixels"].movedim(2, 1))
    mean = golden["encode_moments"][None, :, :4].movedim(2, 1) * golden_vae.scaling_factor
    torch.testing.assert_close(latents, mean, rtol=0, atol=1e-4)


# --- Windows and tiles ---


def test_one_window_and_one_tile_are_the_plain_result_bit_for_bit(vae):
    latents = torch.randn(1, 4, 3, 6, 5)
    frames = latents[0].movedim(1, 0) / vae.scaling_factor
    plain = vae.model.decode(frames, num_frames=3).sample.movedim(0, 1)[None]
    assert torch.equal(vae.decode(latents, window=3), plain)
    assert torch.equal(vae.decode(latents, window=8, tile=Tile(size=24, overlap=8)), plain)
    frame = torch.randn(1, 3, 24, 20)
    mean = vae.model.encode(frame).latent_dist.mean * vae.scaling_factor
    assert torch.equal(vae.encode_frame(frame, tile=Tile(size=24, overlap=8)), mean)


@settings(max_examples=30)
@given(frames=st.integers(1, 40), window=st.integers(1, 9), data=st.data())
def test_windows_come_in_order_and_finish_every_frame_once(frames, window, data):
    overlap = data.draw(st.integers(0, window - 1))

    class Mean(VideoVAE):
        def _decode(self, latents):
            assert latents.shape[2] <= window
            return latents.mean(1, keepdim=True)

    steps = []
    small = svd_vae({"block_out_channels": [32]})
    vae = Mean(small.model, small.geometry)
    latents = torch.rand(1, 4, frames, 1, 1)
    parts = list(
        vae.decode_windows(
            latents, window=window, overlap=overlap, on_step=lambda *step: steps.append(step)
        )
    )
    assert all(0 < span.shape[2] <= window for span in parts)
    assert torch.allclose(torch.cat(parts, 2), latents.mean(1, keepdim=True))
    finished = torch.tensor([span.shape[2] for span in parts]).cumsum(0).tolist()
    assert steps == [(done, frames) for done in finished]


def test_frames_of_one_window_only_are_its_own_and_shared_ones_a_blend(vae):
    latents = torch.randn(1, 4, 5, 2, 2)
    video = vae.decode(latents, window=3, overlap=1)
    first, last = vae.decode(latents[:, :, :3], window=3), vae.decode(latents[:, :, 2:], window=3)
    assert torch.equal(video[:, :, :2], first[:, :, :2])
    assert torch.equal(video[:, :, 3:], last[:, :, 1:])
    torch.testing.assert_close(video[:, :, 2], (first[:, :, 2] + last[:, :, 0]) / 2)


def test_stated_windows_decode_their_part_of_a_longer_clip_and_read_no_further_than_they_need(vae):
    latents = torch.randn(1, 4, 9, 2, 2)
    windows = [range(i, i + 3) for i in (0, 2, 4, 6)]
    whole = vae.decode(latents, window=3, overlap=1)
    coming = iter(latents.unbind(2))
    parts = list(decode_in_windows(vae.decode_window, coming, windows[1:3]))
    assert [span.shape[2] for span in parts] == [2, 3]
    assert len(list(coming)) == 2
    # Frames 2 and 6 are blended with windows that are left out here.
    assert torch.equal(torch.cat(parts, 2)[:, :, 1:4], whole[:, :, 3:6])


def test_tiles_of_a_vae_give_every_size_of_frame(vae):
    tile = Tile(size=16, overlap=4)
    frame = torch.randn(1, 3, 20, 36)
    latents = vae.encode_frame(frame, tile=tile)
    assert latents.shape == (1, 4, 5, 9)
    assert vae.decode(latents[:, :, None], tile=tile).shape == (1, 3, 1, 20, 36)


def test_attention_never_builds_the_matrix_of_scores():
    vae = svd_vae({"block_out_channels": [32, 32], "layers_per_block": 2})
    pixels = 40 * 40
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            largest = max([largest, *sizes])
            return out

    with Sizes():
        vae.decode(vae.encode(torch.zeros(1, 3, 1, 80, 80)))
    # The largest feature map has 32 channels at four times as many pixels.
    assert 32 * 4 * pixels <= largest < pixels**2


def test_gradients_reach_the_latents(vae):
    latents = torch.randn(1, 4, 4, 2, 2)
    with torch.enable_grad():
        latents.requires_grad_()
        vae.decode(latents).square().sum().backward()
    assert latents.grad is not None and (latents.grad != 0).all()


def test_sizes_off_the_grid_are_refused(vae):
    with pytest.raises(ValueError, match="multiples of 4, got 10x8"):
        vae.encode_frame(torch.zeros(1, 3, 8, 10))


@pytest.mark.parametrize(("window", "overlap"), [(0, 0), (3, 3), (3, -1)])
def test_windows_that_cannot_be_are_refused(vae, window, overlap):
    with pytest.raises(ValueError, match="must be"):
        next(vae.decode_windows(torch.zeros(1, 4, 5, 2, 2), window=window, overlap=overlap))


# --- Files ---


def svd_naming(state_dict: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """diffusers' names turned into those of Stability's generative-models, word by word."""
    words = {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "down_blocks": "down",
        "resnets": "block",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "conv_norm_out": "norm_out",
        "time_conv_out": "conv_out.time_mix_conv",
        "conv_shortcut": "nin_shortcut",
        "spatial_res_block.": "",
        "temporal_res_block.norm1": "time_stack.in_layers.0",
        "temporal_res_block.conv1": "time_stack.in_layers.2",
        "temporal_res_block.norm2": "time_stack.out_layers.0",
        "temporal_res_block.conv2": "time_stack.out_layers.3",
        "time_mixer.": "",
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "to_": "",
    } | {f"up_blocks.{i}": f"up.{levels - 1 - i}" for i in range(levels)}
    renamed = {}
    for key, tensor in state_dict.items():
        if ".attentions." in key and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        for word, other in words.items():
            key = key.replace(word, other)
        renamed[key] = tensor
    return renamed


def with_folded_quant_conv(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(state_dict)
    weight, bias = tensors.pop("quant_conv.weight")[..., 0, 0], tensors.pop("quant_conv.bias")
    tensors["encoder.conv_out.weight"] = torch.einsum(
        "oc,cihw->oihw", weight, tensors["encoder.conv_out.weight"]
    )
    tensors["encoder.conv_out.bias"] = weight @ tensors["encoder.conv_out.bias"] + bias
    return tensors


def assert_same(one: VideoVAE, other: VideoVAE, video: torch.Tensor) -> None:
    latents = one.encode(video)
    # Folding a convolution re-orders sums, everything else is the same computation.
    torch.testing.assert_close(other.encode(video), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.decode(latents), one.decode(latents), rtol=1e-4, atol=1e-5)


def test_svd_names_load_as_the_same_vae(vae, tmp_path):
    tensors = svd_naming(with_folded_quant_conv(vae.model.state_dict()), levels=3)
    assert "decoder.up.2.block.0.time_stack.out_layers.3.weight" in tensors
    assert "decoder.mid.attn_1.q.weight" in tensors and "encoder.norm_out.bias" in tensors
    save_file(tensors, tmp_path / "svd_vae.safetensors")
    assert_same(vae, load_frame_vae(tmp_path / "svd_vae.safetensors"), torch.rand(1, 3, 2, 8, 12))


def test_vae_is_found_inside_a_full_svd_checkpoint(vae, tmp_path, caplog):
    tensors = svd_naming(vae.model.state_dict(), levels=3)
    tensors = {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "svd.safetensors")
    assert_same(vae, load_frame_vae(tmp_path / "svd.safetensors"), torch.rand(1, 3, 2, 8, 12))
    assert not caplog.records


@pytest.mark.parametrize("inside", [".", "vae"])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_diffusers_folder_brings_its_configuration(vae, tmp_path, inside, variant):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    config = dict(vae.model.config) | {"scaling_factor": 0.5}
    config["_class_name"] = "AutoencoderKLTemporalDecoder"
    (folder / "config.json").write_text(json.dumps(config))
    save_file(vae.model.state_dict(), folder / f"diffusion_pytorch_model{variant}.safetensors")
    loaded = load_frame_vae(tmp_path)
    assert loaded.scaling_factor == 0.5
    latents = torch.rand(1, 4, 2, 2, 2)
    torch.testing.assert_close(loaded.decode(latents / 0.18215 * 0.5), vae.decode(latents))


def test_metadata_brings_the_configuration(tmp_path):
    config = {
        "block_out_channels": [32, 32, 64],
        "layers_per_block": 1,
        "latent_channels": 16,
        "scaling_factor": 1.0,
        "norm_num_groups": 4,
        "norm_eps": 0.01,
    }
    tiny = random_vae(**config)
    path = tmp_path / "tiny.safetensors"
    save_file(tiny.model.state_dict(), path, metadata={"star_vae": json.dumps(config)})
    loaded = load_frame_vae(path)
    assert (loaded.factor, loaded.latent_channels, loaded.scaling_factor) == (4, 16, 1.0)
    norms = {(m.num_groups, m.eps) for m in loaded.model.modules() if isinstance(m, GroupNorm)}
    assert norms == {(4, 0.01)}
    latents = torch.randn(1, 16, 2, 2, 2)
    assert torch.equal(loaded.decode(latents), tiny.decode(latents))


def test_without_configuration_the_vae_is_that_of_svd():
    with torch.device("meta"):
        vae = svd_vae({})
    assert (vae.factor, vae.latent_channels, vae.scaling_factor) == (8, 4, 0.18215)
    assert tuple(vae.model.config["block_out_channels"]) == (128, 256, 512, 512)
    assert vae.model.config["layers_per_block"] == 2


def test_weights_take_the_type_asked_for_and_results_are_float32(vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(vae.model.state_dict(), path)
    loaded = load_vae(path, dtype=torch.bfloat16)
    latents = loaded.encode(torch.rand(1, 3, 1, 8, 8))
    assert loaded.model.dtype == torch.bfloat16 and latents.dtype == torch.float32
    assert loaded.decode(latents).dtype == torch.float32


def test_another_model_is_refused_by_what_it_seems_to_be(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"decoder.mid.block_1.conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="image VAE.*use the VAE of Stable Video Diffusion"):
        load_frame_vae(path)


def test_missing_weight_is_refused(vae, tmp_path):
    tensors = dict(vae.model.state_dict())
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias"):
        load_frame_vae(tmp_path / "vae.safetensors")


def test_folder_without_a_vae_is_refused_with_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_frame_vae(tmp_path)


def test_folder_of_another_vae_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(ValueError, match="AutoencoderKLTemporalDecoder"):
        load_frame_vae(tmp_path)
