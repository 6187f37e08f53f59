from dataclasses import replace

import pytest
import torch

from star_core.checkpoints.kinds import identify
from star_core.checkpoints.tensors import open_tensors, write_tensors
from star_core.lora import add_lora, merge_lora, without_lora, write_lora
from star_core.models.unet import ControlledVideoUNet
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import load_model, save_model
from star_core.training.initialise import start_network
from star_core.training.tiny import NETWORK
from star_core.training.trainer import choose_trained

SMALL = replace(
    NETWORK,
    in_dim=4,
    out_dim=4,
    dim_mult=(1, 1),
    attn_scales=(1.0,),
    hint_prior=0.0,
    guess_input=False,
)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ControlledVideoUNet(SMALL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.fixture
def without(network, tmp_path):
    """A file of the network without the keys that a part of their name tells."""

    def write(*parts):
        whole = tmp_path / "whole.safetensors"
        save_model(whole, network, sampling=SamplingDefaults(), overwrite=True)
        file = open_tensors(whole)
        left = {k: v.clone() for k, v in file.items() if not any(part in k for part in parts)}
        path = tmp_path / "part.safetensors"
        write_tensors(path, left, metadata=file.metadata, overwrite=True)
        return path

    return write


def outputs(network):
    generator = torch.Generator().manual_seed(1)
    x, hint = (torch.randn(1, 4, 2, 4, 4, generator=generator) for _ in range(2))
    y = torch.randn(1, 3, SMALL.context_dim, generator=generator)
    with torch.no_grad():
        return network(x, torch.tensor([500]), y, hint), network(x, torch.tensor([500]), y, None)


def test_a_complete_file_starts_as_it_is(network, without):
    started, _ = start_network(without())
    for key, value in network.state_dict().items():
        assert torch.equal(value, started.state_dict()[key]), key


def test_a_new_controlnet_is_a_copy_of_the_encoder_that_changes_nothing_yet(network, without):
    started, _ = start_network(without("VideoControlNet."))
    with_hint, without_hint = outputs(started)
    assert torch.equal(with_hint, without_hint)
    state = started.state_dict()
    for key, value in state.items():
        source = key.removeprefix("VideoControlNet.")
        if key != source and source in state and ".local" not in key:
            assert torch.equal(value, state[source]), key
    assert not any(v.any() for k, v in state.items() if "zero_convs" in k or "hint_block" in k)


def test_a_new_liem_is_half_open_everywhere_which_the_norm_takes_out_again(network, without):
    started, _ = start_network(without(".local1.", ".local2."))
    open_wide = ControlledVideoUNet(SMALL)
    open_wide.load_state_dict(started.state_dict())

    class Open(torch.nn.Module):
        def forward(self, x):
            return x

    for module in open_wide.modules():
        for name in ("local1", "local2"):
            if hasattr(module, name):
                setattr(module, name, Open())
    torch.testing.assert_close(
        outputs(started)[0], outputs(open_wide.eval())[0], rtol=1e-3, atol=1e-3
    )


def test_both_may_be_absent_and_training_then_reaches_them(without):
    started, _ = start_network(without("VideoControlNet.", ".local"))
    choose_trained(started, "star")
    v = started(*(torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.zeros(1, 2, 32)))
    v.square().mean().backward()
    gradients = {k: p.grad for k, p in started.named_parameters() if p.grad is not None}
    assert any("zero_convs" in key and grad.any() for key, grad in gradients.items())
    assert not any(key.startswith("out.") for key in gradients)


@pytest.mark.parametrize(
    "part",
    [
        "out.2.weight",
        "VideoControlNet.zero_convs.0",
        "input_blocks.0.1.transformer_blocks.0.local1",
    ],
)
def test_a_file_that_lost_anything_else_is_refused(without, part):
    with pytest.raises(ValueError, match="is missing"):
        start_network(without(part))


def test_lora_starts_as_no_change_and_trains_alone(network, without):
    changed, _ = start_network(without())
    changed.eval()
    before = outputs(changed)[0]
    names = add_lora(changed, 2)
    assert torch.equal(outputs(changed)[0], before)
    assert any(name.endswith("attn1.to_q") for name in names)
    choose_trained(changed, "lora")
    trained = [key for key, p in changed.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in key for key in trained)
    assert without_lora(changed.state_dict()).keys() == network.state_dict().keys()


def test_a_merged_lora_does_what_the_separate_one_did(without, tmp_path):
    changed, _ = start_network(without())
    add_lora(changed.eval(), 2, alpha=4.0)
    for key, parameter in changed.named_parameters():
        if "lora_up" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    separate = outputs(changed)[0]
    write_lora(tmp_path / "lora.safetensors", changed)
    file = open_tensors(tmp_path / "lora.safetensors")
    assert identify(file).name == "lora"
    assert all(key.startswith("diffusion_model.") for key in file)
    merge_lora(changed)
    torch.testing.assert_close(outputs(changed)[0], separate, rtol=1e-3, atol=1e-4)
    assert not any("lora" in key for key in changed.state_dict())


def test_what_has_no_lora_is_not_written_as_one(network, tmp_path):
    with pytest.raises(ValueError, match="no LoRA"):
        write_lora(tmp_path / "lora.safetensors", network)
    with pytest.raises(ValueError, match="rank"):
        add_lora(network, 0)


def test_a_started_network_is_written_under_official_names(without, tmp_path):
    started, file = start_network(without("VideoControlNet."))
    save_model(tmp_path / "new.safetensors", started, sampling=file.sampling)
    again = load_model(tmp_path / "new.safetensors")
    assert again.config == SMALL
