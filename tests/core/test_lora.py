from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from star_core.checkpoints.tensors import open_tensors
from star_core.lora import (
    LoraLayers,
    add_lora,
    lora_layers,
    lora_strength,
    merge_lora,
    open_lora,
    with_loras,
    write_lora,
)
from star_core.sampling_defaults import SamplingDefaults
from star_core.training.tiny import NETWORK, new_network

SMALL = replace(NETWORK, in_dim=4, out_dim=4, dim_mult=(1,), attn_scales=(1.0,), dropout=0.0)
FEW = {"steps": 2, "solver_mode": "normal", "sampler": "lcm", "cfg": 1.0}


def network_with_lora(layers: LoraLayers = "all", alpha=None):
    """A network whose LoRA has an effect, and one without it."""
    network, plain = (new_network(SMALL, 0)[0].eval() for _ in range(2))
    for each in (network, plain):
        for parameter in each.out[-1].parameters():
            torch.nn.init.constant_(parameter, 0.1)
    add_lora(network, 2, layers=layers, alpha=alpha)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(network).values():
        layer.lora_up.weight.data.normal_(std=0.2, generator=generator)
    return network, plain


@torch.no_grad()
def velocity(network):
    generator = torch.Generator().manual_seed(1)
    x, hint = (torch.randn(1, 4, 2, 6, 4, generator=generator) for _ in range(2))
    y = torch.randn(1, 4, SMALL.context_dim, generator=generator)
    return network(x, torch.tensor([500]), y, hint)


@pytest.fixture
def file(tmp_path):
    network, plain = network_with_lora(alpha=3.0)
    path = tmp_path / "few.safetensors"
    write_lora(path, network, sampling=FEW, dtype=None)
    return path, network, plain


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_merged_weights_give_what_the_layers_with_lora_give(layers):
    network, plain = network_with_lora(layers, alpha=3.0)
    v, without = velocity(network), velocity(plain)
    assert (v - without).abs().max() > 0.01
    merge_lora(network)
    assert not lora_layers(network)
    torch.testing.assert_close(velocity(network), v, atol=1e-4, rtol=1e-4)


def test_at_strength_0_the_network_is_as_without_and_afterwards_as_before():
    network, plain = network_with_lora()
    v = velocity(network)
    with pytest.raises(KeyboardInterrupt), lora_strength(network, 0.0):
        assert torch.equal(velocity(network), velocity(plain))
        raise KeyboardInterrupt
    assert torch.equal(velocity(network), v)


def test_all_layers_have_a_lora_except_liem_and_the_controlnet_if_so_wished():
    network, _ = network_with_lora()
    names = set(lora_layers(network))
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for name, layer in network.named_modules():
        wide = isinstance(layer, kinds) and "local" not in name and ".lora_" not in name
        assert wide == (name in names), name
    network = new_network(SMALL, 0)[0]
    assert not any("VideoControlNet" in n for n in add_lora(network, 2, controlnet=False))


@pytest.mark.parametrize("strength", [1.0, 0.25, -0.5])
def test_a_file_does_to_a_model_what_the_trained_layers_did(file, strength):
    path, network, plain = file
    open_lora(path, strength).apply(plain)
    with lora_strength(network, strength):
        torch.testing.assert_close(velocity(plain), velocity(network), atol=1e-4, rtol=1e-4)


def test_files_with_the_names_of_diffusers_are_read(file, tmp_path):
    path, network, plain = file
    renamed = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor * 1.0
        for key, tensor in open_tensors(path).items()
        if ".lora_" in key
    }
    save_file(renamed, tmp_path / "named.safetensors")
    open_lora(tmp_path / "named.safetensors", 1.5).apply(plain)  # 3 of rank 2
    torch.testing.assert_close(velocity(plain), velocity(network), atol=1e-4, rtol=1e-4)


def test_a_model_takes_the_settings_of_its_last_lora_that_has_an_effect(file, tmp_path):
    path, network, _ = file
    write_lora(tmp_path / "plain.safetensors", network)
    write_lora(tmp_path / "four.safetensors", network, sampling={"steps": 4})
    few, plain, four = (open_lora(tmp_path / f"{n}.safetensors") for n in ("few", "plain", "four"))
    own = SamplingDefaults(color_fix="none")

    def sampled(*files, strength=1.0):
        return with_loras(own, [(strength, file.sampling) for file in files])

    assert sampled(plain) == own
    assert sampled(few, plain) == replace(own, **FEW)
    assert sampled(few, four) == replace(own, **{**FEW, "steps": 4})
    assert sampled(few, strength=0.0) == own


def test_a_lora_of_another_model_is_refused_before_anything_is_changed(file):
    path, _, _ = file
    wider = new_network(replace(SMALL, num_heads=4), 0)[0]  # one layer is wider
    before = {key: value.clone() for key, value in wider.state_dict().items()}
    with pytest.raises(ValueError, match="few.safetensors is for another model: its .* are"):
        open_lora(path).apply(wider)
    assert all(torch.equal(value, before[key]) for key, value in wider.state_dict().items())
    other = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="has no layer"):
        open_lora(path).apply(other)


def settings(text):
    bytes_ = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return {"diffusion_model.star_settings.set_weight": bytes_}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(odd=torch.zeros(1)), "it holds odd"),
        (lambda t: t.clear() or t.update(weight=torch.zeros(1)), "it holds weight"),
        (lambda t: t.pop(next(k for k in t if "lora_up" in k)), "incomplete"),
        (lambda t: t.update(settings("nonsense")), "not valid JSON"),
        (lambda t: t.update(settings('{"steps": "two"}')), "steps cannot be"),
        (lambda t: t.update(settings('{"pace": 2}')), "update this package"),
        (lambda t: t.update(settings("[2]")), "must be an object"),
    ],
)
def test_what_is_no_lora_is_refused(file, tmp_path, change, message):
    tensors = {key: tensor.clone() for key, tensor in open_tensors(file[0]).items()}
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=message):
        open_lora(tmp_path / "changed.safetensors")
