"""Quantised weights: read as ComfyUI's files hold them, written so that it reads them."""

import json
import re
from dataclasses import asdict, replace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from star_core.backbones import build_network
from star_core.checkpoints.quantization import (
    E4M3,
    FORMATS,
    INT8,
    NVFP4,
    WRITTEN,
    PackedTensor,
    hadamard,
    quantized,
    stored,
)
from star_core.checkpoints.tensors import load_into, open_tensors, write_tensors
from star_core.cli import main
from star_core.conversion import convert
from star_core.file_info import describe
from star_core.model import BUILT_IN
from star_core.models.cogvideox_weights import CogVideoXConfig, in_sat_naming
from star_core.models.unet import ControlledVideoUNet, UNetConfig
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import (
    LearnedPrompts,
    load_model,
    open_model,
    save_model,
)

SMALL = UNetConfig(
    dim=32, context_dim=16, dim_mult=(1,), num_heads=1, head_dim=32, num_res_blocks=1,
    attn_scales=(1.0,), norm_groups=16,
)  # fmt: skip
DIT = CogVideoXConfig(in_dim=4, context_dim=12, dim=64, num_heads=2, num_layers=2, time_dim=16)


def comfy_quant(**config) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def uneven(rows=48, columns=64, seed=0) -> torch.Tensor:
    """Rows and groups of very different size: a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * 10 ** (3 * torch.rand(rows, 1, generator=generator) - 3)


def read(tmp_path, tensors, metadata=None):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata)
    return open_tensors(path)


def layer(weight, format, name="block.to_q"):
    return {f"{name}.{end}": tensor for end, tensor in quantized(weight, format).items()}


def values(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, PackedTensor)
    return tensor.unpacked()


# --- Formats ---


def test_fp8_has_one_scale_and_half_a_step_of_error(tmp_path):
    weight = uneven()
    file = read(tmp_path, layer(weight, E4M3))
    scale = weight.abs().max() / 448
    off = (values(file["block.to_q.weight"]) - weight).abs()
    assert (off <= torch.maximum(weight.abs() / 16, scale / 1024) * 1.001).all()


def test_int8_has_a_scale_for_each_row_and_half_a_step_of_error(tmp_path):
    weight = uneven()
    file = read(tmp_path, layer(weight, INT8))
    off = (values(file["block.to_q.weight"]) - weight).abs()
    assert (off <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()


def test_nvfp4_has_a_scale_for_each_group_and_half_a_step_of_error(tmp_path):
    weight = uneven(rows=160, columns=96)
    file = read(tmp_path, layer(weight, NVFP4))
    largest = weight.unflatten(1, (-1, 16)).abs().amax(-1, keepdim=True).expand(-1, -1, 16)
    # Half of the widest step, 2 of 6; the scale is off by up to a sixteenth, or half its least.
    bound = largest.flatten(1) * (1 / 6 + 1 / 16) + weight.abs().max() / 448 / 1024
    assert ((values(file["block.to_q.weight"]) - weight).abs() <= bound).all()


@pytest.mark.parametrize("format", WRITTEN.values(), ids=WRITTEN)
def test_zeros_and_the_largest_value_stay(tmp_path, format):
    weight = torch.zeros(16, 32)
    weight[3, 5], weight[4, 6] = 6, -6
    found = values(read(tmp_path, layer(weight, format))["block.to_q.weight"])
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)
    nothing = read(tmp_path, layer(torch.zeros(16, 32), format))["block.to_q.weight"]
    assert torch.equal(values(nothing), torch.zeros(16, 32))


def test_int8_with_one_scale_for_all_is_read(tmp_path):
    tensors = layer(uneven(), INT8) | {"block.to_q.weight_scale": torch.tensor(0.5)}
    found = values(read(tmp_path, tensors)["block.to_q.weight"])
    assert torch.equal(found, tensors["block.to_q.weight"] / 2)


@pytest.mark.parametrize(
    "stated", [{"convrot": True, "convrot_groupsize": 16},
               {"params": {"convrot": True, "convrot_groupsize": 16}}],
)  # fmt: skip
def test_rotated_int8_is_turned_back(tmp_path, stated):
    quarter = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2.0
    rotation = torch.kron(quarter, quarter)
    weight = uneven()
    turned = (weight.unflatten(1, (4, 16)) @ rotation.T).flatten(1)
    tensors = layer(turned, INT8)
    tensors["block.to_q.comfy_quant"] = comfy_quant(format="int8_tensorwise", **stated)
    off = values(read(tmp_path, tensors)["block.to_q.weight"]) - weight
    # Turning mixes the errors of 16 values, whose sizes add up to at most four times one of them.
    assert (off.abs() <= 4 * turned.abs().amax(1, keepdim=True) / 254).all()
    torch.testing.assert_close(hadamard(16), rotation)
    torch.testing.assert_close(hadamard(256) @ hadamard(256), torch.eye(256), atol=1e-5, rtol=0)


def place(row: int, group: int, groups: int) -> int:
    """Where NVIDIA's products look for the scale of a group: tiles of 128 rows and 4 groups."""
    tile = row // 128 * -(-groups // 4) + group // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4


def test_nvfp4_is_laid_out_as_matrix_products_read_it(tmp_path):
    rows, columns = 144, 112  # groups that fill neither tile
    scales = 2.0 ** torch.randint(-3, 3, (rows, columns // 16))
    codes = torch.randint(0, 16, (rows, columns))
    codes[:, ::16] = 7  # the largest, so that whoever writes it finds the same scales
    blocked = torch.zeros(256 * 8)
    for row in range(rows):
        for group in range(columns // 16):
            blocked[place(row, group, columns // 16)] = scales[row, group]
    tensors = {
        "l.weight": (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8),
        "l.weight_scale": blocked.reshape(256, 8).to(torch.float8_e4m3fn),
        "l.weight_scale_2": torch.tensor(3.0),
        "l.comfy_quant": comfy_quant(format="nvfp4"),
    }
    known = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    known = torch.tensor(known + [-value for value in known])
    wanted = known[codes] * scales.repeat_interleave(16, 1) * 3
    packed = read(tmp_path, tensors)["l.weight"]
    assert packed.shape == (rows, columns) and torch.equal(values(packed), wanted)
    # And the same is written: what came out goes in again.
    again = values(read(tmp_path, layer(wanted, NVFP4, "l"))["l.weight"])
    torch.testing.assert_close(again, wanted, rtol=1e-6, atol=0)
    # Old writers put the scales into bytes of no type.
    tensors["l.weight_scale"] = tensors["l.weight_scale"].view(torch.uint8)
    assert torch.equal(values(read(tmp_path, tensors)["l.weight"]), wanted)


def test_mxfp8_is_read(tmp_path):
    rows, columns = 40, 96
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (rows, 3))
    blocked = torch.zeros(128 * 4, dtype=torch.uint8)
    for row in range(rows):
        for group in range(3):
            blocked[place(row, group, 3)] = exponents[row, group]
    tensors = {
        "l.weight": weight,
        "l.weight_scale": blocked.reshape(128, 4),
        "l.comfy_quant": comfy_quant(format="mxfp8"),
    }
    wanted = weight.float() * (2.0 ** (exponents - 127)).repeat_interleave(32, 1)
    assert torch.equal(values(read(tmp_path, tensors)["l.weight"]), wanted)


# --- Files ---


@pytest.mark.parametrize("style", ["mark", "mark of a part", "metadata"])
@pytest.mark.parametrize("e5m2", [False, True])
def test_older_files_are_read(tmp_path, style, e5m2):
    type = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    stem = "model.block.to_q" if style == "mark of a part" else "block.to_q"
    tensors = {f"{stem}.weight": torch.randn(16, 32).to(type), f"{stem}.bias": torch.ones(16)}
    wanted, metadata = tensors[f"{stem}.weight"].float() * 0.25, None
    if style == "metadata":
        name = str(type).removeprefix("torch.")
        metadata = {"_quantization_metadata": json.dumps({"layers": {stem: {"format": name}}})}
        tensors[f"{stem}.weight_scale"] = torch.tensor(0.25)
    else:
        tensors[f"{stem}.scale_weight"] = torch.tensor([0.25])
        tensors[f"{stem}.scale_input"] = torch.tensor([2.0])
        tensors["model.scaled_fp8" if "part" in style else "scaled_fp8"] = torch.empty(0).to(type)
    file = read(tmp_path, tensors, metadata)
    assert set(file) == {f"{stem}.weight", f"{stem}.bias"} and not file.metadata
    assert torch.equal(values(file[f"{stem}.weight"]), wanted)
    write_tensors(tmp_path / "today.safetensors", stored(file))
    today = load_file(tmp_path / "today.safetensors")
    assert json.loads(bytes(today[f"{stem}.comfy_quant"].tolist())) == {
        "format": str(type).removeprefix("torch.")
    }
    assert today[f"{stem}.weight_scale"].item() == 0.25
    again = open_tensors(tmp_path / "today.safetensors")[f"{stem}.weight"]
    assert torch.equal(values(again), wanted)


def test_an_old_mark_of_two_values_asks_for_products_of_full_precision(tmp_path):
    tensors = {
        "l.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "l.scale_weight": torch.ones(1),
        "scaled_fp8": torch.empty(2).to(torch.float8_e4m3fn),
    }
    packed = read(tmp_path, tensors)["l.weight"]
    assert isinstance(packed, PackedTensor) and packed.config["full_precision_matrix_mult"]


class Damage(NamedTuple):
    """Damage to the layer `block.to_q` of a file.

    changes: tensors by name, None to remove one. says: part of the error message.
    """

    format: str
    changes: dict[str, torch.Tensor | None]
    says: str


DAMAGES = {
    "no scale": Damage("int8_tensorwise", {"weight_scale": None}, "weight_scale is missing"),
    "no second scale": Damage("nvfp4", {"weight_scale_2": None}, "weight_scale_2 is missing"),
    "no weight": Damage("nvfp4", {"weight": None}, "'block.to_q.weight' is missing"),
    "no configuration": Damage("float8_e4m3fn", {"comfy_quant": None}, "comfy_quant' is missing"),
    "scales of other rows": Damage(
        "int8_tensorwise", {"weight_scale": torch.ones(31, 1)}, "weight_scale has 31 values"
    ),
    "scales of other groups": Damage(
        "nvfp4", {"weight_scale": torch.ones(128, 8).to(torch.float8_e4m3fn)},
        "weight_scale has 1024 values",
    ),
    "wide scales of groups": Damage(
        "nvfp4", {"weight_scale": torch.ones(128, 4)}, "weight_scale is torch.float32"
    ),
    "another type": Damage(
        "int8_tensorwise", {"weight": torch.ones(32, 64)}, "weight is torch.float32"
    ),
    "no groups": Damage(
        "nvfp4", {"weight": torch.ones(32, 20, dtype=torch.uint8)}, "not rows of groups of 16"
    ),
    "no JSON": Damage(
        "int8_tensorwise", {"comfy_quant": torch.ones(3, dtype=torch.uint8)}, "comfy_quant' is no"
    ),
    "no object": Damage(
        "int8_tensorwise", {"comfy_quant": torch.tensor([91, 93]).byte()}, "the format None"
    ),
    "another format": Damage(
        "int8_tensorwise", {"comfy_quant": comfy_quant(format="w2a2")}, "the format 'w2a2'"
    ),
    "rotation": Damage(
        "int8_tensorwise",
        {"comfy_quant": comfy_quant(format="int8_tensorwise", convrot=True, convrot_groupsize=8)},
        "convrot_groupsize 8",
    ),
    "rotation of other columns": Damage(
        "int8_tensorwise",
        {"comfy_quant": comfy_quant(format="int8_tensorwise", convrot=True)},
        "convrot_groupsize 256",
    ),
    "smoothing": Damage("nvfp4", {"pre_quant_scale": torch.ones(64)}, "pre_quant_scale"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_with_a_layer_is_named(tmp_path, damage):
    tensors = layer(uneven(32, 64), FORMATS[damage.format])
    for end, tensor in damage.changes.items():
        tensors.pop(f"block.to_q.{end}", None)
        if tensor is not None:
            tensors[f"block.to_q.{end}"] = tensor
    with pytest.raises(ValueError, match=re.escape(damage.says)) as error:
        read(tmp_path, tensors)
    assert "x.safetensors" in str(error.value) and "block.to_q" in str(error.value)


def test_unreadable_metadata_is_named(tmp_path):
    with pytest.raises(ValueError, match="x.safetensors.*_quantization_metadata"):
        read(tmp_path, {"a": torch.ones(1)}, {"_quantization_metadata": '{"layers": 3}'})


def test_a_packed_weight_is_ordinary_to_whoever_computes_with_it(tmp_path):
    bias = torch.ones(48, dtype=torch.float16)
    file = read(tmp_path, {**layer(uneven(), INT8), "block.to_q.bias": bias})
    packed = file["block.to_q.weight"]
    assert (packed.shape, packed.dtype, packed.numel()) == ((48, 64), torch.float16, 48 * 64)
    unpacked = values(packed)
    for found in (packed.to(torch.float32), packed.clone(), packed.chunk(2)[0]):
        assert type(found) is torch.Tensor
    assert torch.equal(packed.clone(), unpacked.half())
    assert torch.equal(packed.chunk(3)[2], unpacked.half()[32:])


def test_loading_unpacks_one_layer_at_a_time(tmp_path, monkeypatch):
    """At no time are more float32 values of the file in memory than those of one layer."""
    source = nn.Sequential(*(nn.Linear(64, 64, dtype=torch.float16) for _ in range(8)))
    tensors = source.state_dict()
    for i in range(8):
        tensors |= layer(tensors.pop(f"{i}.weight"), INT8, f"{i}")
    file, alive, most = read(tmp_path, tensors), [0], [0]
    unpacked = PackedTensor.unpacked

    class Counted(torch.Tensor):
        def __del__(self):
            alive[0] -= 1

    def counted(self):
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return unpacked(self).as_subclass(Counted)

    monkeypatch.setattr(PackedTensor, "unpacked", counted)
    module = nn.Sequential(*(nn.Linear(64, 64, device="meta") for _ in range(8)))
    load_into(module, file, dtype=torch.float16)
    assert 1 <= most[0] <= 2
    weight = module.state_dict()["3.weight"]
    assert weight.dtype == torch.float16
    torch.testing.assert_close(weight, source.state_dict()["3.weight"], atol=1e-3, rtol=0)


# --- Networks ---


def lively(config):
    """A network in which nothing begins as zero, so that every weight tells in the output."""
    torch.manual_seed(0)
    network = build_network(config)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    path = tmp_path_factory.mktemp("unet") / "small.safetensors"
    network = lively(SMALL)
    prompts = LearnedPrompts(*torch.randn(2, 1, 2, 16))
    save_model(path, network, sampling=SamplingDefaults(), prompts=prompts)
    return path


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "sat.pt"
    torch.save({"module": in_sat_naming(lively(DIT).state_dict())}, path)
    return path


def output(path, dtype=torch.float32):
    """Returns the output of the network in a file for fixed random input."""
    model = load_model(path, dtype=dtype)
    size = (1, model.config.in_dim, 2, 18, 16) if model.config == SMALL else (1, 4, 2, 4, 6)
    generator = torch.Generator().manual_seed(1)
    x, hint = torch.randn(2, *size, generator=generator).to(dtype)
    y = torch.randn(1, 5, model.config.context_dim, generator=generator).to(dtype)
    with torch.no_grad():
        return model.network(x, torch.tensor([500]), y, hint).float()


def off(path, source) -> float:
    """Relative error of the output."""
    found, wanted = output(path), output(source)
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    "which, name, most",
    [("unet", "fp8_scaled", 0.08), ("unet", "int8", 0.016), ("unet", "nvfp4", 0.25),
     ("dit", "fp8_scaled", 0.015), ("dit", "int8", 0.0033), ("dit", "nvfp4", 0.048)],
)  # fmt: skip
def test_a_quantised_network_gives_nearly_the_same(tmp_path, request, which, name, most):
    source, path = request.getfixturevalue(which), tmp_path / "q.safetensors"
    convert(source, path, WRITTEN[name])
    assert most / 3 < off(path, source) < most
    # Scales that are a little wrong do more.
    tensors = load_file(path)
    for key in tensors:
        if key.endswith("weight_scale"):
            tensors[key] = (tensors[key].float() * 1.25).to(tensors[key].dtype)
    save_file(tensors, tmp_path / "wrong.safetensors", open_tensors(path).metadata)
    assert off(tmp_path / "wrong.safetensors", source) > 1.5 * most


QUANTISED = re.compile(
    r".*transformer_blocks\.\d+\.(attn\d\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))\.weight"
)


CONFIGS = {
    "float8_e4m3fn": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
    "int8_tensorwise": {"format": "int8_tensorwise"},
    "nvfp4": {"format": "nvfp4"},
}


@pytest.mark.parametrize("format", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("which", ["unet", "dit"])
def test_only_linear_layers_of_transformer_blocks_are_quantised(tmp_path, request, which, format):
    source, path = request.getfixturevalue(which), tmp_path / "q.safetensors"
    convert(source, path, format)
    before, after = open_model(source), open_tensors(path)
    assert open_model(path).config == before.config
    packed = {key for key, tensor in after.items() if isinstance(tensor, PackedTensor)}
    assert packed == {key for key in before.tensors if QUANTISED.fullmatch(key)} != set()
    for key, tensor in before.tensors.items():
        if key not in packed:
            assert torch.equal(after[key], tensor.half())
    tensors = load_file(path)
    ends = {key.rpartition(".")[2] for key in tensors}
    assert ends >= {"weight", "bias", "comfy_quant", *format.scales}
    for key in packed:
        config = tensors[key.removesuffix("weight") + "comfy_quant"]
        assert json.loads(bytes(config.tolist())) == CONFIGS[format.name]


def test_what_is_kept_has_the_type_of_the_file(tmp_path, unet):
    convert(unet, tmp_path / "b.safetensors", torch.bfloat16)
    convert(tmp_path / "b.safetensors", tmp_path / "q.safetensors", INT8)
    kept = [t.dtype for t in open_tensors(tmp_path / "q.safetensors").values()]
    assert set(kept) == {torch.bfloat16}


def test_a_weight_that_has_no_whole_groups_is_kept(tmp_path):
    network = ControlledVideoUNet(replace(SMALL, context_dim=24))
    save_model(tmp_path / "a.safetensors", network, sampling=SamplingDefaults())
    convert(tmp_path / "a.safetensors", tmp_path / "q.safetensors", NVFP4)
    file = open_tensors(tmp_path / "q.safetensors")
    stem = "middle_block.1.transformer_blocks.0.attn2"
    assert not isinstance(file[f"{stem}.to_k.weight"], PackedTensor)  # looks at the text
    assert isinstance(file[f"{stem}.to_q.weight"], PackedTensor)


def test_what_was_quantised_is_unpacked_copied_and_quantised_anew(tmp_path, unet):
    a, b, c, d = (tmp_path / f"{name}.safetensors" for name in "abcd")
    convert(unet, a, INT8)
    convert(a, b, torch.float16)
    assert describe(b).quantization == {} and set(describe(b).dtypes) == {"float16"}
    assert off(b, a) < 1e-3
    convert(a, c)
    found, wanted = load_file(c), load_file(a)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert open_tensors(c).metadata == open_tensors(a).metadata
    convert(a, d, E4M3)
    assert describe(d).quantization == {"float8_e4m3fn": describe(a).quantization[INT8.name]}


def test_info_tells_the_format(tmp_path, unet):
    convert(unet, tmp_path / "q.safetensors", NVFP4)
    info, plain = describe(tmp_path / "q.safetensors"), describe(unet)
    layers = sum(map(bool, map(QUANTISED.fullmatch, open_model(unet).tensors)))
    assert info.quantization == {"nvfp4": layers} and not plain.quantization
    assert f"quantised: {layers} layers as nvfp4" in str(info)
    assert info.parameters == plain.parameters and info.problems == ""
    assert info.presets == plain.presets and info.config == asdict(SMALL)
    assert info.bytes < 0.45 * plain.bytes


def test_the_command_line_writes_and_reads_them(tmp_path, capsys):
    path = tmp_path / "q.safetensors"
    main(["convert", str(BUILT_IN["tiny"][0]), str(path), "--dtype", "int8"])
    main(["info", str(path)])
    assert "layers as int8_tensorwise" in capsys.readouterr().out
    assert path.stat().st_size < 0.95 * BUILT_IN["tiny"][0].stat().st_size


def test_the_command_line_offers_what_is_written(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--dtype", "all"])
    output = capsys.readouterr().err
    assert all(name in output for name in WRITTEN)


def test_another_kind_of_file_is_not_quantised(tmp_path):
    save_file({"decoder.time_conv_out.weight": torch.ones(3)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="only those are quantised.*seems to be a video VAE"):
        convert(tmp_path / "vae.safetensors", tmp_path / "q.safetensors", INT8)
    assert not (tmp_path / "q.safetensors").exists()


def test_a_quantised_file_of_another_model_says_what_it_is(tmp_path):
    tensors = layer(uneven(), E4M3, "encoder.block.0.layer.0.SelfAttention.q")
    save_file(tensors, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match="does not fit.*seems to be a T5 text encoder"):
        load_model(tmp_path / "t5.safetensors")


def test_a_network_quantised_under_other_names_is_refused_and_can_be_converted(tmp_path, dit):
    tensors = dict(torch.load(dit)["module"])
    stem = "model.diffusion_model.transformer.layers.0.attention.query_key_value"
    tensors |= layer(tensors.pop(f"{stem}.weight"), INT8, stem)
    save_file(tensors, tmp_path / "sat.safetensors")
    with pytest.raises(ValueError, match="under the names of SAT.*`convert`"):
        load_model(tmp_path / "sat.safetensors")
    convert(tmp_path / "sat.safetensors", tmp_path / "star.safetensors", torch.float32)
    assert 0 < off(tmp_path / "star.safetensors", dit) < 0.01
