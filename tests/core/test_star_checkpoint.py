"""Model files: what they say about themselves, loading, conversion."""

import argparse
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from star_core.backbones import build_network, infer_unet
from star_core.checkpoints.kinds import STAR_COGVIDEOX, STAR_I2VGENXL, identify
from star_core.conversion import convert
from star_core.file_info import describe
from star_core.models.cogvideox_weights import CogVideoXConfig, in_sat_naming
from star_core.models.unet import ControlledVideoUNet, UNetConfig
from star_core.sampling_defaults import COGVIDEOX_LATENTS, COGVIDEOX_SAMPLING, SamplingDefaults
from star_core.star_checkpoint import LearnedPrompts, load_model, save_model

SMALL = UNetConfig(
    dim=32, context_dim=16, dim_mult=(1, 2), num_heads=1, head_dim=32, num_res_blocks=1,
    attn_scales=(1.0,), norm_groups=16, hint_prior=0.5,
)  # fmt: skip
SAMPLING = SamplingDefaults(steps=3, solver_mode="normal", cfg=2.0, noise_level=600)


@pytest.fixture(scope="module")
def network():
    return ControlledVideoUNet(SMALL)


@pytest.fixture(scope="module")
def prompts():
    return LearnedPrompts(*torch.randn(3, 1, 2, 16))


@pytest.fixture
def model_file(tmp_path, network, prompts):
    path = tmp_path / "small.safetensors"
    save_model(path, network, sampling=SAMPLING, prompts=prompts, metadata={"note": "for tests"})
    return path


def test_a_self_describing_file_brings_everything_back(model_file, network, prompts):
    model = load_model(model_file)
    assert (model.config, model.sampling) == (SMALL, SAMPLING)
    assert model.prompts is not None
    torch.testing.assert_close(tuple(model.prompts), tuple(prompts), rtol=0, atol=0)
    weights = network.state_dict()
    for key, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, weights[key])


def test_a_loaded_network_is_ready_for_inference(model_file):
    network = load_model(model_file, dtype=torch.bfloat16).network
    assert not network.training
    assert {(p.device.type, p.dtype, p.requires_grad) for p in network.parameters()} == {
        ("cpu", torch.bfloat16, False)
    }


def test_prompts_take_the_type_of_the_network(model_file):
    loaded = load_model(model_file, dtype=torch.float16).prompts
    assert loaded is not None and loaded.positive.dtype == loaded.negative.dtype == torch.float16


# With STAR's width of a head and its groups, which shapes do not tell.
NARROW = UNetConfig(
    dim=64, context_dim=32, dim_mult=(1, 2), num_heads=1, num_res_blocks=1, attn_scales=(0.5,)
)


@pytest.mark.parametrize("wrapped, dtype", [(False, torch.float16), (True, torch.float64)])
def test_pt_files_without_metadata_load_by_their_shapes(tmp_path, wrapped, dtype):
    weights = ControlledVideoUNet(NARROW, dtype=dtype).state_dict()
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "x.pt")
    model = load_model(tmp_path / "x.pt", dtype=torch.float32)
    assert (model.config, model.sampling, model.prompts) == (NARROW, SamplingDefaults(), None)
    for key, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, weights[key].float())


@pytest.fixture(scope="module")
def full_size():
    """STAR's published network without its memory."""
    return ControlledVideoUNet(UNetConfig(), device="meta").state_dict()


def test_the_published_network_is_recognised_by_its_shapes(full_size):
    assert infer_unet(full_size) == UNetConfig()
    assert identify(full_size) is STAR_I2VGENXL


@pytest.mark.parametrize(
    "key, shape",
    [
        ("input_blocks.1.0.out_layers.3.weight", (96, 320, 3, 3)),
        ("input_blocks.0.1.proj_in.weight", (30, 320, 1)),
    ],
)
def test_shapes_that_no_network_has_count_as_the_published_size(full_size, key, shape):
    assert infer_unet(full_size | {key: torch.empty(shape)}) == UNetConfig()


def test_a_file_of_another_kind_says_what_it_seems_to_be(tmp_path):
    save_file({"decoder.time_conv_out.weight": torch.ones(3)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "vae.safetensors")
    message = str(error.value)
    assert "seems to be a video VAE" in message
    assert "'time_embed.0.weight' is missing (and 2246 more)" in message
    assert "'decoder.time_conv_out.weight' is unexpected" in message


@pytest.mark.parametrize(
    "key",
    ["input_blocks.0.0.weight", "out.2.bias", "VideoControlNet.input_hint_block.weight",
     "middle_block.1.transformer_blocks.0.local1.conv1.weight", "prompts.negative"],
)  # fmt: skip
def test_each_missing_key_is_an_error_that_names_it(tmp_path, model_file, key):
    with safe_open(model_file, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(model_file)
    del tensors[key]
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        load_model(tmp_path / "x.safetensors")


def test_a_description_from_the_future_is_refused(tmp_path):
    star = {"config": asdict(SMALL) | {"wings": 2}, "sampling": asdict(SAMPLING)}
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"star": json.dumps(star)})
    with pytest.raises(ValueError, match="wings.*update this package"):
        load_model(tmp_path / "x.safetensors")


def test_describe_tells_a_model_without_loading_it(model_file):
    info = describe(model_file)
    assert (info.kind, info.format, info.problems) == ("star-i2vgenxl", "safetensors", "")
    assert info.config == asdict(SMALL) and info.sampling == asdict(SAMPLING)
    assert info.presets == ("faithful", "sharp") and set(info.dtypes) == {"float32"}
    text = str(info)
    assert "STAR network on I2VGen-XL" in text and "steps 3" in text and "for tests" in text
    json.dumps(asdict(info))


def test_describe_names_what_a_broken_model_lacks(tmp_path, network):
    tensors = network.state_dict()
    del tensors["out.2.bias"]
    star = {"config": asdict(SMALL), "sampling": asdict(SAMPLING)}
    save_file(tensors, tmp_path / "x.safetensors", {"star": json.dumps(star)})
    assert describe(tmp_path / "x.safetensors").problems == "'out.2.bias' is missing"


def test_describe_says_what_a_relative_of_star_lacks(tmp_path):
    weights = ControlledVideoUNet(NARROW, dtype=torch.float16).state_dict()
    tensors = {key: tensor for key, tensor in weights.items() if ".local" not in key}
    save_file(tensors, tmp_path / "x.safetensors")
    info = describe(tmp_path / "x.safetensors")
    assert (info.kind, info.config) == ("venhancer", None)
    assert ".local1.conv1.weight' is missing" in info.problems and "light_deg.pt" in info.problems


def test_describe_names_other_files_without_a_configuration(tmp_path):
    save_file({"decoder.time_conv_out.weight": torch.ones(3)}, tmp_path / "vae.safetensors")
    info = describe(tmp_path / "vae.safetensors")
    assert (info.kind, info.config, info.problems) == ("vae-temporal-diffusers", None, "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_convert_turns_pt_into_safetensors_of_the_type_asked_for(tmp_path, network, dtype):
    weights = {**network.state_dict(), "step": torch.tensor(5)}
    torch.save({"state_dict": weights}, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "y.safetensors", dtype)
    found = load_file(tmp_path / "y.safetensors")
    assert set(found) == set(weights)
    for key, tensor in weights.items():
        assert torch.equal(found[key], tensor.to(dtype) if key != "step" else tensor)


def test_convert_keeps_what_a_model_says_about_itself(tmp_path, model_file):
    convert(model_file, tmp_path / "half.safetensors", torch.float16)
    model = load_model(tmp_path / "half.safetensors")
    assert (model.config, model.sampling) == (SMALL, SAMPLING)
    assert describe(tmp_path / "half.safetensors").metadata["note"] == "for tests"


def test_convert_overwrites_only_on_demand_and_never_its_source(tmp_path, model_file):
    target = tmp_path / "y.safetensors"
    target.write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        convert(model_file, target, torch.float16)
    convert(model_file, target, torch.float16, overwrite=True)
    assert describe(target).dtypes.keys() == {"float16"}
    with pytest.raises(ValueError, match="is the source itself"):
        convert(target, target, torch.float32, overwrite=True)


def test_convert_refuses_integer_types(tmp_path, model_file):
    with pytest.raises(ValueError, match="choose float16, bfloat16 or float32"):
        convert(model_file, tmp_path / "y.safetensors", torch.int8)


# --- The second backbone ---

COGVIDEOX = CogVideoXConfig(
    in_dim=4, context_dim=12, dim=64, num_heads=2, num_layers=2, time_dim=16
)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return build_network(COGVIDEOX)


def deepspeed_file(path, network, prefix="model.diffusion_model."):
    """As DeepSpeed writes it: with un-merged LoRA, unused tables, and objects of its own."""
    theirs = {
        key.replace("model.diffusion_model.", prefix): tensor
        for key, tensor in in_sat_naming(network.state_dict()).items()
    }
    stem = f"{prefix}transformer.layers.0.attention.dense"
    for end in ("weight", "bias"):
        theirs[f"{stem}.original.{end}"] = theirs.pop(f"{stem}.{end}")
    theirs[f"{stem}.matrix_A.0"] = torch.ones(2, 64)
    theirs[f"{stem}.matrix_B.0"] = torch.ones(64, 2)
    theirs[f"{prefix}mixins.pos_embed.freqs_cos"] = torch.zeros(4, 32)
    state = {"module": theirs, "rng": np.random.get_state(), "args": argparse.Namespace(lr=1)}
    torch.save(state, path)
    return path


def test_the_published_file_of_deepspeed_converts_and_loads(tmp_path, transformer):
    source = deepspeed_file(tmp_path / "mp_rank_00_model_states.pt", transformer)
    convert(source, tmp_path / "star.safetensors", torch.bfloat16)
    converted, original = (
        load_model(path, dtype=torch.float32) for path in (tmp_path / "star.safetensors", source)
    )
    assert converted.config == original.config == COGVIDEOX
    assert converted.sampling == original.sampling == COGVIDEOX_SAMPLING
    assert converted.latents == original.latents == COGVIDEOX_LATENTS
    merged = "transformer_blocks.0.attn1.to_out.0.weight"
    for key, tensor in transformer.state_dict().items():
        expected = tensor + 1 if key == merged else tensor  # ones times ones by a rank of 2
        assert torch.equal(original.network.state_dict()[key], expected)
        rounded = expected.bfloat16().float()
        assert torch.equal(converted.network.state_dict()[key], rounded)


def test_a_file_of_deepspeed_is_described(tmp_path, transformer):
    info = describe(deepspeed_file(tmp_path / "x.pt", transformer, prefix=""))
    assert (info.kind, info.format, info.problems) == ("star-cogvideox", "torch (DeepSpeed)", "")
    assert info.config and info.config["num_layers"] == 2


def test_converting_is_strict(tmp_path, transformer):
    weights = in_sat_naming(transformer.state_dict())
    lost = weights.pop("model.diffusion_model.transformer.layers.1.spa_local.conv1.weight")
    torch.save({"module": weights}, tmp_path / "lacks.pt")
    with pytest.raises(ValueError, match="spa_local.*is missing"):
        convert(tmp_path / "lacks.pt", tmp_path / "out.safetensors")
    weights["model.diffusion_model.transformer.layers.1.spa_local.conv1.weight"] = lost
    weights["model.diffusion_model.transformer.more"] = lost
    torch.save({"module": weights}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="transformer.more.*is unexpected"):
        convert(tmp_path / "more.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_a_network_on_cogvideox_was_trained_with_can_be_stated(tmp_path, transformer, caplog):
    source = tmp_path / "x.pt"
    weights = in_sat_naming(transformer.state_dict())
    weights["model.diffusion_model.mixins.pos_embed.pos_embedding"] = torch.zeros(1, 2, 64)
    torch.save({"module": weights}, source)
    assert load_model(source).sampling.shift == 3
    assert "--latent-scale" in caplog.text
    convert(source, tmp_path / "y.safetensors", shift=1.0, latent_scale=0.7)
    model = load_model(tmp_path / "y.safetensors")
    assert (model.sampling.shift, model.latents.scale) == (1.0, 0.7)
    assert model.config == replace(COGVIDEOX, positions="sincos")


def test_a_network_on_cogvideox_that_is_saved_describes_itself(tmp_path, transformer):
    save_model(
        tmp_path / "x.safetensors", transformer, sampling=SAMPLING, latents=COGVIDEOX_LATENTS
    )
    model = load_model(tmp_path / "x.safetensors")
    assert (model.config, model.sampling, model.latents) == (
        COGVIDEOX, SAMPLING, COGVIDEOX_LATENTS,
    )  # fmt: skip
    assert identify(load_file(tmp_path / "x.safetensors")) is STAR_COGVIDEOX


def test_shift_and_latent_scale_are_refused_for_other_files(tmp_path, model_file):
    with pytest.raises(ValueError, match="leave out shift"):
        convert(model_file, tmp_path / "x.safetensors", shift=1.0)
