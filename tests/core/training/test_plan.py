from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star_core.models.unet import ControlledVideoUNet
from star_core.training.objective import Trains
from star_core.training.pixels import PixelCrop
from star_core.training.plan import plan_training
from star_core.training.tiny import NETWORK
from star_core.vae.patch import PatchGeometry
from star_core.vae.svd import SVDGeometry

CONFIG = replace(NETWORK, dim_mult=(1, 2), attn_scales=(1.0,))
SIZE: dict[str, Any] = {"frames": 3, "height": 10, "width": 8}


@pytest.fixture(scope="module")
def plans():
    kinds: list[tuple[Trains, bool]] = [
        ("all", False),
        ("star", False),
        ("star", True),
        ("lora", True),
    ]
    return {
        (trains, again): plan_training(CONFIG, trains=trains, rank=2, checkpointing=again, **SIZE)
        for trains, again in kinds
    }


def test_what_is_trained_is_what_the_trainer_trains(plans):
    everything = list(ControlledVideoUNet(CONFIG, device="meta").named_parameters())
    count = sum(p.numel() for _, p in everything)
    assert plans["all", False].trained == plans["all", False].parameters == count
    star, lora = plans["star", True], plans["lora", True]
    assert 0 < lora.trained < star.trained < count
    frozen = sum(
        p.numel()
        for name, p in everything
        if p.ndim > 1 and "VideoControlNet" not in name and ".local" not in name
    )
    assert star.network["weights"] == 4 * count - 2 * frozen
    assert star.network["gradients"] == star.network["average"] == star.buckets == 4 * star.trained
    assert star.network["optimizer"] == 8 * star.trained
    assert star.state == 16 * star.trained and star.model == 2 * count
    assert lora.model == 2 * lora.trained


def test_options_move_and_share_what_they_say():
    def plan(**options):
        return plan_training(CONFIG, **SIZE, **options)

    base, cpu, sharded = plan(), plan(average_on_cpu=True), plan(shard=True)
    assert base.memory(1) - cpu.memory(1) == cpu.host == 4 * base.trained
    assert base.memory(2) - base.memory(1) == base.buckets
    spread = sum(base.network.values())
    assert base.memory(1) - sharded.memory(4) == pytest.approx(spread * 3 / 4, abs=4)
    wide = plan(bf16=False)
    assert wide.network["weights"] == 4 * wide.parameters
    # Without the matrices in bfloat16.
    assert wide.stages["activations"] > 1.5 * (base.stages["activations"] - 2 * base.trained)
    muon = plan(optimizer="muon")
    assert base.network["optimizer"] / 2 < muon.network["optimizer"] < base.network["optimizer"]
    two = plan(batch=2, accumulate=3)
    assert two.flops == base.flops
    assert two.stages["activations"] > 1.2 * base.stages["activations"]
    assert "12" in two.table((2,)).splitlines()[1].split()


def test_vae_and_pixels_are_counted():
    vae = PatchGeometry()
    none, latents = plan_training(CONFIG, **SIZE), plan_training(CONFIG, **SIZE, vae=vae)
    pixels = plan_training(CONFIG, **SIZE, vae=vae, crop=PixelCrop(frames=2, height=4, width=4))
    weights = sum(p.numel() for p in vae.build().model.parameters())
    assert latents.others["VAE"] == 4 * weights and "VAE" not in none.others
    assert none.flops < latents.flops < pixels.flops
    assert latents.stages["activations"] < pixels.stages["activations"]
    assert latents.stages["encoding"] > 0
    svd = SVDGeometry(block_out_channels=(32, 32, 32))
    assert plan_training(CONFIG, **SIZE, vae=svd, crop=PixelCrop()).flops > pixels.flops


def test_checkpointing_keeps_less_and_computes_more(plans):
    again, kept = plans["star", True], plans["star", False]
    assert again.stages["activations"] < 0.7 * kept.stages["activations"]
    assert 1.1 * kept.flops < again.flops < 1.6 * kept.flops


def test_a_step_of_all_takes_three_times_a_forward_pass(plans):
    network = ControlledVideoUNet(CONFIG, device="meta")
    x = torch.empty(1, CONFIG.in_dim, 3, 10, 8, device="meta")
    y = torch.empty(1, 77, CONFIG.context_dim, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.zeros(1, device="meta", dtype=torch.int64), y, x)
    assert plans["all", False].flops == pytest.approx(3 * counter.get_total_flops(), rel=0.1)
