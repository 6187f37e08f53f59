from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star_core.models.unet import ControlledVideoUNet
from star_core.training.objective import Trains
from star_core.training.plan import plan_training
from star_core.training.tiny import NETWORK

CONFIG = replace(NETWORK, dim_mult=(1, 2), attn_scales=(1.0,))
SIZE = {"frames": 3, "height": 10, "width": 8}


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
    everything = sum(p.numel() for p in ControlledVideoUNet(CONFIG, device="meta").parameters())
    assert plans["all", False].trained == plans["all", False].parameters == everything
    star, lora = plans["star", True], plans["lora", True]
    assert 0 < lora.trained < star.trained < everything
    assert star.weights == 2 * (everything - star.trained) + 4 * star.trained
    assert star.states == 16 * star.trained


def test_checkpointing_keeps_less_and_computes_more(plans):
    again, kept = plans["star", True], plans["star", False]
    assert again.activations + again.block < 0.5 * kept.activations
    assert 1.1 * kept.flops < again.flops < 1.6 * kept.flops


def test_a_step_of_all_takes_three_times_a_forward_pass(plans):
    network = ControlledVideoUNet(CONFIG, device="meta")
    x = torch.empty(1, CONFIG.in_dim, 3, 10, 8, device="meta")
    y = torch.empty(1, 77, CONFIG.context_dim, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.zeros(1, device="meta", dtype=torch.int64), y, x)
    assert plans["all", False].flops == pytest.approx(3 * counter.get_total_flops(), rel=0.1)


def test_the_table_shares_a_batch_between_gpus(plans):
    lines = plans["star", True].table((1, 3), batch=8).splitlines()
    assert [int(line.split()[1]) for line in lines[1:]] == [8, 3]
