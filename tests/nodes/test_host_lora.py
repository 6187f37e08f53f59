"""LoRAs that the host adds to the network."""

import pytest
import torch

from star_core.lora import add_lora, merge_lora, write_lora
from star_core.model import BUILT_IN
from star_core.star_checkpoint import load_model

pytestmark = pytest.mark.host


def test_a_lora_for_the_network_changes_the_result_and_can_be_taken_off(host):
    import comfy.sd  # pyright: ignore[reportMissingImports]

    key = "diffusion_model.output_blocks.5.0.emb_layers.1"
    weight = host.model.model.diffusion_model.state_dict()[key[16:] + ".weight"]
    generator = torch.Generator().manual_seed(1)
    lora = {
        f"{key}.lora_A.weight": torch.randn(4, weight.shape[1], generator=generator),
        f"{key}.lora_B.weight": 10 * torch.randn(weight.shape[0], 4, generator=generator),
    }
    plain = host.ksampler(host.model, "euler", steps=2, cfg=1.0)
    patched, _ = comfy.sd.load_lora_for_models(host.model, None, lora, 1.0, 1.0)
    assert (host.ksampler(patched, "euler", steps=2, cfg=1.0) - plain).abs().max() > 0.01
    assert torch.equal(host.ksampler(host.model, "euler", steps=2, cfg=1.0), plain)


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_trained_lora_is_loaded_by_the_host_and_does_what_the_core_does(host, tmp_path, layers):
    import comfy.sd  # pyright: ignore[reportMissingImports]
    import comfy.utils  # pyright: ignore[reportMissingImports]

    network = load_model(BUILT_IN["tiny"][0], dtype=torch.float32).network
    add_lora(network, 2, layers=layers, alpha=4.0)
    for key, parameter in network.named_parameters():
        if "lora_up" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    write_lora(tmp_path / "lora.safetensors", network, dtype=torch.float32)
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(host.model, None, lora, 1.0, 1.0)
    assert len(patched.patches) == len(lora) // 3
    merge_lora(network)
    merged = network.state_dict()
    convolutions = [key for key in patched.patches if "conv" in key or "in_layers" in key]
    assert bool(convolutions) == (layers == "all")
    for key in [*list(patched.patches)[:5], *convolutions[:5]]:
        patched.patch_weight_to_device(key)
        weight = patched.model.state_dict()[key]
        torch.testing.assert_close(
            weight.float(), merged[key.removeprefix("diffusion_model.")], rtol=2e-3, atol=2e-3
        )
    patched.unpatch_model()
