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
    open_model = importlib.import_module(".star_core.checkpoints", pack.__name__).open_model
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
    networks = importlib.import_module(".star_core.networks", pack.__name__)
    monkeypatch.setattr(host.mm, "unet_offload_device", lambda: torch.device("meta"))
    config = networks.SIZES[size]
    wanted = networks.build_network(config, device="meta").state_dict()
    star = replace(open_star("i2vgenxl"), config=config, tensors=wanted)
    found = host.load_patcher(star, "default").model.diffusion_model.state_dict()
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
