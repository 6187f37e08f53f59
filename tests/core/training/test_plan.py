from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star_core.lora import add_lora
from star_core.models.unet import ControlledVideoUNet
from star_core.training.adversarial import heads_of
from star_core.training.distillation import DistillConfig
from star_core.training.objective import Trains
from star_core.training.pixels import PixelCrop
from star_core.training.plan import plan_training
from star_core.training.tiny import NETWORK
from star_core.vae.patch import PatchGeometry
from star_core.vae.svd import SVDGeometry

CONFIG = replace(NETWORK, dim_mult=(1,), attn_scales=(1.0,))
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


@pytest.mark.parametrize(("evaluations", "solver_steps"), [(1, 4), (4, 4)])
def test_a_distillation_counts_the_teacher_and_the_students_second_look(evaluations, solver_steps):
    options = {"trains": "lora", "lora_layers": "all", "lora_controlnet": False, **SIZE}
    distill = DistillConfig(evaluations=evaluations, solver_steps=solver_steps)
    plain, distilled = (plan_training(CONFIG, distill=d, **options) for d in (None, distill))
    network = ControlledVideoUNet(CONFIG, device="meta")
    add_lora(network, 16, layers="all", controlnet=False)
    x, y = torch.empty(1, 32, 3, 10, 8, device="meta"), torch.empty(1, 77, 32, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(x, torch.zeros(1, device="meta", dtype=torch.int64), y, x)
    share = (distilled.flops - plain.flops) / counter.get_total_flops()
    assert share == pytest.approx(3 - evaluations / solver_steps, rel=0.01)
    assert distilled.memory() == plain.memory()
    names = [name for name, _ in network.named_parameters() if ".lora_" in name]
    assert distilled.trained == sum(network.get_parameter(name).numel() for name in names)


def test_an_adversarial_loss_counts_the_controlnet_and_the_heads():
    options = {"trains": "lora", "lora_layers": "all", **SIZE}
    plans = [
        plan_training(CONFIG, distill=DistillConfig(adversarial=weight), **options)
        for weight in (0.0, 0.1)
    ]
    plain, judged = plans
    x, y = torch.empty(1, 32, 3, 10, 8, device="meta"), torch.empty(1, 77, 32, device="meta")
    network = ControlledVideoUNet(CONFIG, device="meta")
    with FlopCounterMode(display=False) as counter:
        network.control_features(x, torch.zeros(1, device="meta", dtype=torch.int64), y, x)
    heads = sum(p.numel() for p in heads_of(CONFIG).parameters())
    assert judged.trained - plain.trained == heads
    assert judged.model == plain.model and judged.state > plain.state
    # The features of both, and the gradient of the student's through them.
    assert judged.flops - plain.flops > 3 * counter.get_total_flops()
    assert judged.memory() > plain.memory()


def test_hours_follow_from_steps_and_the_rate_of_a_gpu():
    plan = plan_training(CONFIG, batch=2, accumulate=3, **SIZE)
    assert plan.hours(100, 1e9) == pytest.approx(plan.flops * 6 * 100 / 1e9 / 3600)
    assert "TFLOP/s" not in plan.table(steps=100)
    assert f"{plan.hours(100, 1e9):.1f} hours" in plan.table(steps=100, rate=1e9)


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
    assert again.stages["activations"] < 0.5 * kept.stages["activations"]
    assert 1.1 * kept.flops < again.flops < 1.6 * kept.flops


def test_a_step_of_all_takes_three_times_a_forward_pass(plans):
    network = ControlledVideoUNet(CONFIG, device="meta")
    x = torch.empty(1, CONFIG.in_dim, 3, 10, 8, device="meta")
    y = torch.empty(1, 77, CONFIG.context_dim, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.zeros(1, device="meta", dtype=torch.int64), y, x)
    assert plans["all", False].flops == pytest.approx(3 * counter.get_total_flops(), rel=0.1)
