"""Quantised files as MODELs of the host, through its own operations."""

import importlib
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from star_core.checkpoints.quantization import INT8, WRITTEN, hadamard, quantized
from star_core.checkpoints.tensors import open_tensors
from star_core.conversion import convert, quantized_layers
from star_core.model import BUILT_IN
from star_core.star_checkpoint import load_model
from tests.cogvideox_files import write_model
from tests.nodes.test_host_weights import Run, with_lora
from tests.nodes.test_host_weights import device_memory as device_memory

pytestmark = pytest.mark.host

BACKBONES = ["i2vgenxl", "cogvideox"]


class Host:
    """The pack's modules."""

    def __init__(self, pack: Any) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f".{name}", pack.__name__)

        self.model = module("nodes.host_model")
        self.checkpoints = module("star_core.star_checkpoint")

    def load(self, path, weight_type="auto"):
        return self.model.load_patcher(self.checkpoints.open_model(path), weight_type)

    @property
    def formats(self) -> dict[str, Any]:
        """What the host computes with."""
        ops = importlib.import_module("comfy.ops")
        return getattr(ops, "QUANT_ALGOS", {}) if hasattr(ops, "mixed_precision_ops") else {}


@pytest.fixture(scope="module")
def host(pack) -> Host:
    return Host(pack)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Any]:
    return {
        "i2vgenxl": BUILT_IN["tiny"][0],
        "cogvideox": write_model(tmp_path_factory.mktemp("star")),
    }


@pytest.fixture(scope="module")
def quantised(host, sources, tmp_path_factory):
    """A small model of a backbone in a format; skips where the host does not know that."""
    folder = tmp_path_factory.mktemp("quantised")

    def file(backbone: str, name: str):
        if WRITTEN[name].name not in host.formats:
            pytest.skip(f"this host does not compute with {name}")
        path = folder / f"{backbone}_{name}.safetensors"
        if not path.exists():
            convert(sources[backbone], path, WRITTEN[name])
        return path

    return file


def velocity(network, config, dtype=torch.float32):
    """Of a clip that is drawn; both backbones."""
    generator = torch.Generator().manual_seed(1)
    sides = (18, 16) if config.backbone == "i2vgenxl" else (4, 6)
    x, hint = torch.randn(2, 1, config.in_dim, 3, *sides, generator=generator).to(dtype)
    y = torch.randn(1, 7, config.context_dim, generator=generator).to(dtype)
    with torch.inference_mode():
        return network(x, torch.tensor([500]), y, hint=hint).float()


def off(found, wanted) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


# How far the host may be from the same weights in float32. In int8 it rounds what comes into a
# layer as well, to 127 steps a token.
HOSTS = {"fp8_scaled": 1e-5, "int8": 0.006, "nvfp4": 1e-5}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_host_computes_with_quantised_weights(host, quantised, backbone, name):
    path = quantised(backbone, name)
    star, core = host.checkpoints.open_model(path), load_model(path, dtype=torch.float32)
    network = host.model.load_patcher(star).model.diffusion_model
    found = {
        layer: module.weight.nbytes
        for layer, module in network.named_modules()
        if type(getattr(module, "weight", None)).__name__ == "QuantizedTensor"
    }
    layers = quantized_layers(core.network, WRITTEN[name])
    assert found == {
        layer: star.tensors[f"{layer}.weight"].parts["weight"].nbytes for layer in layers
    }
    assert found
    wanted = velocity(core.network, star.config)
    assert off(velocity(network, star.config), wanted) < HOSTS[name]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_weight_type_unpacks_them(host, quantised, backbone):
    path = quantised(backbone, "fp8_scaled")
    star = host.checkpoints.open_model(path)
    network = host.load(path, "fp16").model.diffusion_model
    assert {p.dtype for p in network.parameters()} == {torch.float16}
    wanted = load_model(path, dtype=torch.float16).network.state_dict()
    found = network.state_dict()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor)
    assert star.tensors.keys() == wanted.keys()


def test_rotated_int8_of_others_is_taken(host, sources, quantised, tmp_path):
    """ConvRot: groups of columns turned by a Hadamard matrix, before they are rounded."""
    tensors, source = load_file(quantised("i2vgenxl", "int8")), open_tensors(sources["i2vgenxl"])
    rotation = hadamard(16)
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    for key in [key for key in tensors if key.endswith(".comfy_quant")]:
        stem = key.removesuffix(".comfy_quant")
        turned = source[f"{stem}.weight"].float().unflatten(1, (-1, 16)) @ rotation
        parts = quantized(turned.flatten(1), INT8)
        parts["comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
        tensors |= {f"{stem}.{end}": part for end, part in parts.items()}
    path = tmp_path / "convrot.safetensors"
    save_file(tensors, path, open_tensors(quantised("i2vgenxl", "int8")).metadata)
    config = host.checkpoints.open_model(path).config
    core, whole = (load_model(p, dtype=torch.float32) for p in (path, sources["i2vgenxl"]))
    wanted = velocity(core.network, config)
    assert off(wanted, velocity(whole.network, config)) < 0.004
    assert off(velocity(host.load(path).model.diffusion_model, config), wanted) < 0.006


def test_a_file_of_another_model_says_what_it_is(host, tmp_path):
    if not host.formats:
        pytest.skip("this host does not compute with quantised weights")
    stem = "encoder.block.0.layer.0.SelfAttention.q"
    parts = quantized(torch.randn(16, 16), WRITTEN["fp8_scaled"])
    save_file({f"{stem}.{end}": part for end, part in parts.items()}, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match="does not fit.*seems to be a T5 text encoder"):
        host.load(tmp_path / "t5.safetensors")


@pytest.mark.parametrize("lacks", ["operations", "format", "kitchen"])
def test_a_host_that_cannot_says_which_can(host, sources, tmp_path, monkeypatch, lacks):
    """As v0.3.64, 0.19.3 for int8, and a host without comfy-kitchen are."""
    ops, path = importlib.import_module("comfy.ops"), tmp_path / "int8.safetensors"
    convert(sources["cogvideox"], path, INT8)
    says = "update it.*int8 needs 0.27"
    if lacks == "operations":
        monkeypatch.delattr(ops, "mixed_precision_ops", raising=False)
    elif not host.formats:
        pytest.skip("this host has no operations for quantised weights")
    elif lacks == "format":
        known = {name: how for name, how in ops.QUANT_ALGOS.items() if name != INT8.name}
        monkeypatch.setattr(ops, "QUANT_ALGOS", known)
    elif INT8.name in host.formats:
        monkeypatch.setattr(ops, "get_layout_class", lambda layout: None)
        says = "comfy-kitchen is missing"
    with pytest.raises(ValueError, match=f"int8.safetensors.*{says}.*choose weight_dtype fp16"):
        host.load(path)
    assert host.load(path, "fp16").model.diffusion_model.dtype == torch.float16


def test_what_is_written_equals_what_comfy_kitchen_writes():
    kitchen = pytest.importorskip("comfy_kitchen", reason="this host has no comfy-kitchen")
    weight = torch.randn(160, 96, generator=torch.Generator().manual_seed(0))
    ours = quantized(weight, WRITTEN["nvfp4"])
    theirs, scales = kitchen.quantize_nvfp4(weight, ours["weight_scale_2"])
    assert torch.equal(ours["weight"], theirs)
    assert torch.equal(ours["weight_scale"].view(torch.uint8), scales.view(torch.uint8))
    ours = quantized(weight, WRITTEN["fp8_scaled"])
    theirs = kitchen.quantize_per_tensor_fp8(weight, ours["weight_scale"])
    found, wanted = ours["weight"].float(), theirs.float()
    assert (found != wanted).float().mean() < 0.01  # it multiplies where we divide
    if hasattr(kitchen, "quantize_int8_rowwise"):
        theirs, scales = kitchen.quantize_int8_rowwise(weight)
        ours = quantized(weight, INT8)
        assert torch.equal(ours["weight"], theirs) and torch.equal(ours["weight_scale"], scales)


# How far off what a LoRA changes may be, relative to the change: a weight that stays on the device
# is quantised again with its share in it.
LORA = {"fp8_scaled": 0.05, "int8": 0.02, "nvfp4": 0.4}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", LORA)
def test_a_lora_on_quantised_weights_changes_what_it_changes_on_others(
    host, quantised, backbone, name
):
    path = quantised(backbone, name)
    run = Run(host.model, host.checkpoints.open_model(path))
    changes = []
    for weight_type in ("auto", "fp16"):
        model = host.load(path, weight_type)
        changes.append(run(with_lora(model)) - run(model))
    found, wanted = changes
    assert off(found, wanted) < LORA[name]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_streamed_quantised_weights_give_what_resident_ones_give(
    host, quantised, request, backbone, name, lora
):
    keep_on_device = request.getfixturevalue("device_memory")
    star = host.checkpoints.open_model(quantised(backbone, name))
    run, model = Run(host.model, star), host.model.load_patcher(star)
    plain = run(model)
    if lora:
        model = with_lora(model)
    resident, size = run(model), model.model_size()
    for kept in (0.1, size / 2):
        keep_on_device(kept)
        streamed = run(model)
        assert model.model.model_lowvram and model.loaded_size() <= kept + 1
        if lora:
            assert off(streamed - plain, resident - plain) < LORA[name]
        else:
            torch.testing.assert_close(streamed, resident, rtol=1e-5, atol=1e-5)
