"""Weights as the host keeps them: layers that wait for theirs, weights streamed to the device."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from star_core.model import BUILT_IN
from tests.cogvideox_files import write_model

pytestmark = pytest.mark.host

BACKBONES = ["i2vgenxl", "cogvideox"]


@pytest.fixture(scope="module")
def host(pack) -> Any:
    return importlib.import_module(".nodes.host_model", pack.__name__)


@pytest.fixture(scope="module")
def open_star(pack, tmp_path_factory) -> Callable[[str], Any]:
    """A small model file of a backbone."""
    open_model = importlib.import_module(".star_core.star_checkpoint", pack.__name__).open_model
    paths = {
        "i2vgenxl": BUILT_IN["tiny"][0],
        "cogvideox": write_model(tmp_path_factory.mktemp("star")),
    }
    return lambda backbone: open_model(paths[backbone])


@pytest.fixture
def lazy_layers(monkeypatch):
    """The host as with dynamic VRAM: its layers have no weights until they are loaded."""
    import comfy.ops  # pyright: ignore[reportMissingImports]
    from comfy import model_management as mm  # pyright: ignore[reportMissingImports]

    memory = getattr(importlib.import_module("comfy"), "memory_management", None)
    if memory is None:
        pytest.skip("this host has no dynamic VRAM")
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    monkeypatch.setattr(mm, "WINDOWS", True)  # where newer hosts do it everywhere
    assert comfy.ops.disable_weight_init.Linear(2, 2).weight is None


def same_weights(network: torch.nn.Module, other: torch.nn.Module) -> bool:
    weights, others = network.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        torch.equal(tensor, others[key]) for key, tensor in weights.items()
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_layers_that_wait_for_their_weights_get_them(host, open_star, backbone, request):
    star = open_star(backbone)
    plain = host.load_patcher(star, "fp16").model.diffusion_model
    request.getfixturevalue("lazy_layers")
    lazy = host.load_patcher(star, "fp16").model.diffusion_model
    assert same_weights(lazy, plain)


@pytest.mark.parametrize("size", ["i2vgenxl", "cogvideox-5b"])
def test_full_size_networks_load_into_layers_that_wait(
    host, pack, open_star, lazy_layers, monkeypatch, size
):
    networks = importlib.import_module(".star_core.backbones", pack.__name__)
    monkeypatch.setattr(host.mm, "unet_offload_device", lambda: torch.device("meta"))
    config = networks.SIZES[size]
    wanted = networks.build_network(config, device="meta").state_dict()
    star = replace(open_star("i2vgenxl"), config=config, tensors=wanted)
    found = host.load_patcher(star).model.diffusion_model.state_dict()
    del found["star_settings"]  # of LoRAs, see `sampling_defaults`
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_file_that_lacks_weights_is_refused_where_layers_wait(
    host, open_star, lazy_layers, backbone
):
    star = open_star(backbone)
    key = next(k for k, v in star.tensors.items() if k.endswith("weight") and v.ndim == 2)
    incomplete = {k: v for k, v in star.tensors.items() if k != key}
    with pytest.raises(ValueError, match=f"{key}' is missing"):
        host.load_patcher(replace(star, tensors=incomplete))


class Run:
    """A step of a host's sampler on a small clip, from which a MODEL's weights show."""

    def __init__(self, host: Any, star: Any) -> None:
        generator = torch.Generator().manual_seed(2)
        self.raw, self.noise = torch.randn(2, 1, star.config.in_dim, 3, 10, 12, generator=generator)
        prompt = torch.randn(1, 7, star.config.context_dim, generator=generator)
        self.conditioning = [[prompt, {host.HINT: self.raw}]]

    def __call__(self, model: Any) -> torch.Tensor:
        import comfy.sample  # pyright: ignore[reportMissingImports]

        prompts = (self.conditioning, self.conditioning)
        how = ("euler", "normal", *prompts, self.raw)
        return comfy.sample.sample(model, self.noise, 1, 1.0, *how, disable_pbar=True, seed=1)


def with_lora(model: Any) -> Any:
    """A MODEL with a LoRA on every layer that has a matrix or a kernel."""
    import comfy.sd  # pyright: ignore[reportMissingImports]

    generator, lora = torch.Generator().manual_seed(1), {}
    for key, weight in model.model.star.tensors.items():
        if weight.ndim < 2:
            continue
        name, wide = f"diffusion_model.{key.removesuffix('.weight')}", weight[0].numel()
        lora[f"{name}.lora_A.weight"] = torch.randn(2, wide, generator=generator)
        lora[f"{name}.lora_B.weight"] = 0.03 * torch.randn(len(weight), 2, generator=generator)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 1.0)
    assert len(patched.patches) == len(lora) // 2
    return patched


@pytest.fixture
def device_memory(monkeypatch) -> Callable[[float], None]:
    """Says how many bytes of a MODEL the host keeps on the device; the rest is streamed."""
    from comfy import model_management as mm  # pyright: ignore[reportMissingImports]

    load = mm.LoadedModel.model_load

    def limit(size: float) -> None:
        def limited(self, lowvram_model_memory=0, *args, **kwargs):
            return load(self, size, *args, **kwargs)

        mm.unload_all_models()
        monkeypatch.setattr(mm.LoadedModel, "model_load", limited)

    return limit


# How far off a LoRA's share may be: weights that carry one are rounded if they stay on the device.
ROUNDED = {"auto": 1e-5, "fp16": 2e-3, "bf16": 1e-2, "fp8_e4m3fn": 0.3}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("weight_type", ROUNDED)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_streamed_weights_give_what_resident_ones_give(
    host, open_star, device_memory, backbone, weight_type, lora
):
    star = open_star(backbone)
    run, model = Run(host, star), host.load_patcher(star, weight_type)
    plain = run(model)
    if lora:
        model = with_lora(model)
    resident = run(model)
    assert resident.isfinite().all() and torch.equal(resident, plain) != lora
    size = model.model_size()
    for kept in (0.1, size / 2):
        device_memory(kept)
        streamed = run(model)
        assert model.model.model_lowvram and model.loaded_size() <= kept + 1
        if lora:
            wrong = (streamed - resident).norm() / (resident - plain).norm()
            assert wrong < ROUNDED[weight_type]
        else:
            torch.testing.assert_close(streamed, resident, rtol=1e-5, atol=1e-5)
