"""What hosts have and lack, and what a MODEL or a host of another kind is told."""

import asyncio
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from star_core.model import BUILT_IN
from star_core.vae.small_decoder import SmallDecoderConfig, save_decoder

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def features(pack) -> Any:
    return importlib.import_module(".nodes.host_features", pack.__name__)


@pytest.fixture(scope="module")
def load_tiny(pack) -> Any:
    host = importlib.import_module(".nodes.host_model", pack.__name__)
    star = importlib.import_module(".star_core.star_checkpoint", pack.__name__).open_model(
        BUILT_IN["tiny"][0]
    )
    return lambda **options: host.load_patcher(star, "fp16", **options)


def test_a_host_that_lacks_what_is_needed_is_told_which_one_has_it(features):
    features.check_host(SimpleNamespace(cfg=1.0), "cfg")
    with pytest.raises(RuntimeError, match=r"no SimpleNamespace\.cfg.*from v0\.3\.64 to v0\.38"):
        features.check_host(SimpleNamespace(), "cfg")


def test_memory_that_ran_out_is_known_in_every_form(features):
    from comfy import model_management as mm  # pyright: ignore[reportMissingImports]

    accelerator = getattr(torch, "AcceleratorError", RuntimeError)
    full = [
        mm.OOM_EXCEPTION("CUDA out of memory"),
        accelerator("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ]
    if hasattr(mm, "is_oom"):
        full.append(accelerator("CUDA error 2"))
        full[-1].error_code = 2
    assert all(map(features.memory_ran_out, full))
    other = [accelerator("CUDA error: unspecified launch failure"), ValueError("out of memory")]
    assert not any(map(features.memory_ran_out, other))


def test_weights_are_kept_as_the_host_keeps_its_own_unless_told_otherwise(load_tiny, monkeypatch):
    from comfy import model_patcher  # pyright: ignore[reportMissingImports]

    class Dynamic(model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(model_patcher, "CoreModelPatcher", Dynamic, raising=False)
    assert type(load_tiny()) is Dynamic
    assert type(load_tiny(disable_dynamic=True)) is model_patcher.ModelPatcher
    monkeypatch.delattr(model_patcher, "CoreModelPatcher")
    assert type(load_tiny()) is model_patcher.ModelPatcher


def second_device(patcher: Any) -> Any:
    """What the host's device and multi-GPU nodes make of a patcher."""
    if not hasattr(patcher, "deepclone_multigpu"):
        pytest.skip("this host has no nodes that choose the device of a MODEL")
    return patcher.deepclone_multigpu(new_load_device=torch.device("cpu"))


def test_the_host_makes_a_model_anew_for_another_device(load_tiny):
    model = load_tiny()
    other = second_device(model)
    assert other.model is not model.model
    ours, theirs = (each.model.diffusion_model.state_dict() for each in (model, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    rebuild, arguments = model.clone().cached_patcher_init[:2]
    assert not rebuild(*arguments, disable_dynamic=True).is_dynamic()


def test_the_host_makes_a_vae_anew_for_another_device(pack, tmp_path):
    decoder = SmallDecoderConfig(latent_channels=32, factor=4, width=8, blocks=1).build()
    save_decoder(tmp_path / "decoder.safetensors", decoder)
    module = importlib.import_module(".nodes.host_vae", pack.__name__)
    with torch.inference_mode():
        small = tmp_path / "decoder.safetensors"
        vae = module.load_host_vae(BUILT_IN["tiny"][1], decoder=small, window=4, overlap=2)
        latents = torch.randn(1, 32, 6, 8, 8)
        expected = vae.decode(latents)
        vae.patcher = second_device(vae.patcher)
        assert vae.patcher.model is not vae.first_stage_model
        vae.first_stage_model = vae.patcher.model
        assert torch.equal(vae.decode(latents), expected)
    assert not vae.patcher.is_dynamic()


def values(schema: Any, model: Any, vae: Any) -> dict[str, Any]:
    """One for the MODEL and each input that a node needs: its own default, or a small one."""
    given = {
        "MODEL": model,
        "VAE": vae,
        "IMAGE": torch.rand(2, 64, 64, 3),
        "CONDITIONING": [[torch.zeros(1, 7, 16), {}]],
        "LATENT": {"samples": torch.zeros(1, 32, 2, 8, 8)},
    }
    inputs = [e for e in schema.inputs if not e.optional or e.get_io_type() == "MODEL"]
    return {
        each.id: given.get(each.get_io_type(), getattr(each, "default", None)) for each in inputs
    }


def test_a_model_of_another_pack_is_refused_by_every_node_with_its_name_and_a_cure(pack):
    nodes = importlib.import_module(".nodes", pack.__name__)
    vae_module = importlib.import_module(".nodes.host_vae", pack.__name__)
    vae = vae_module.load_host_vae(BUILT_IN["tiny"][1])
    refused = 0
    for node in asyncio.run(nodes.StarExtension().get_node_list()):
        schema = node.define_schema()
        if not any(each.get_io_type() == "MODEL" for each in schema.inputs):
            continue
        for foreign in (SimpleNamespace(model=torch.nn.Linear(1, 1)), object()):
            kind = type(getattr(foreign, "model", foreign)).__name__
            message = f"{schema.display_name}: the MODEL is a {kind}, .*STAR Load Model"
            with pytest.raises(ValueError, match=message):
                node.execute(**values(schema, foreign, vae))
            refused += 1
    assert refused >= 12
