"""A small network and latent pairs, which a training of a few steps takes moments for."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file

from star_core.sampling_defaults import LatentFormat
from star_core.training.objective import TrainConfig, TrainingObjective, sample_generator
from star_core.training.pairs import LatentPairs
from star_core.training.tiny import NETWORK, new_network, write_tiny
from star_core.training.trainer import train

SMALL = replace(
    NETWORK, in_dim=4, out_dim=4, dim_mult=(1,), attn_scales=(1.0,), hint_prior=0.5, dropout=0.0
)
CONFIG = TrainConfig(steps=4, batch=2, warmup=1, learning_rate=5e-3)
write = partial(write_tiny, latents=LatentFormat())


def latent_pairs(folder, height=4):
    """Six random pairs of two frames of `height`x4 latents, written to a folder once."""
    folder.mkdir(exist_ok=True)
    lq = torch.randn(6, 4, 2, height, 4, generator=torch.Generator().manual_seed(0))
    file = folder / "pairs_000.safetensors"
    if not file.exists():
        save_file({"hq": (0.5 * lq).half(), "lq": lq.half()}, file)
    return LatentPairs(folder, (2, height, 4))


class Poisoned:
    """Pairs of which some samples are not finite."""

    def __init__(self, pairs, bad):
        self.pairs = pairs
        self.bad = {sample_generator(CONFIG.seed, index).initial_seed() for index in bad}

    def sample(self, generator):
        sample = self.pairs.sample(generator)
        if generator.initial_seed() in self.bad:
            sample.hq[0] = float("nan")
        return sample


def run(data, out, config=CONFIG, **options):
    """Trains a small network anew; returns it."""
    network, prompts = new_network(SMALL, 0)
    objective = TrainingObjective(network, config, prompts=prompts)
    arguments: dict[str, Any] = {"write": write} | options
    train(data, objective, out, **arguments)
    return network


def states(out):
    """The steps of the states in a folder."""
    return [int(path.stem.rpartition("-")[2]) for path in sorted(out.glob("state-*.pt"))]


def stored(out, step):
    """The state of a step."""
    return torch.load(out / f"state-{step:07d}.pt", weights_only=True)


class Distance(torch.nn.Module):
    """In one channel alone; counts what it is shown."""

    def forward(self, restored, reference):
        self.pictures = len(restored)
        return (restored - reference)[:, 0].abs().mean((1, 2))
