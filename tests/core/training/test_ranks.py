"""Several processes: the same weights, validation together, sharded weights."""

import math
import os
import socket
from dataclasses import replace

import torch
from torch import multiprocessing

from star_core.training.objective import TrainingObjective
from star_core.training.processes import gathered
from star_core.training.tiny import SAMPLING, new_network
from star_core.training.trainer import TrainExecution, mean_parts, train
from star_core.training.validation import Validation
from star_core.vae.patch import PatchGeometry
from tests.small_run import CONFIG, SMALL, Poisoned, latent_pairs, stored, write

STAR = replace(CONFIG, trains="star", steps=3, batch=1)
MUON = replace(STAR, optimizer="muon", ema=0.5)
SHARDED = TrainExecution(shard=True, keep=9)


def ranks(work, *arguments):
    """Runs work(rank, *arguments) in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(as_rank, (port, work, *arguments), nprocs=2)  # pyright: ignore


def as_rank(rank, port, work, *arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    work(rank, *arguments)


def begun():
    network, prompts = new_network(SMALL, 0)
    torch.nn.init.normal_(network.out[-1].weight, generator=torch.Generator().manual_seed(0))  # pyright: ignore
    return network, prompts


def sharded(rank, folder):
    pairs = latent_pairs(folder / "pairs")
    seen = []

    def validate(network, prompts, step):
        network.eval()
        x, t = torch.ones(1, 4, 2, 4, 4), torch.tensor([500])
        with torch.no_grad():
            seen.append(network(x, t, prompts.positive, x).sum().item())
        network.train()
        return {"sum": seen[-1]}

    for steps in (2, 3):  # the second run resumes
        network, prompts = begun()
        config = replace(STAR, steps=steps)
        objective = TrainingObjective(network, config, prompts=prompts)
        train(pairs, objective, folder / "sharded", write=write, every=1, execution=SHARDED,
              validate=validate)  # fmt: skip
    torch.save(seen, folder / f"seen-{rank}.pt")


def shared(rank, folder):
    """Trains with a sample of the second rank that is not finite, and validates a clip a rank."""
    network, prompts = begun()
    data = Poisoned(latent_pairs(folder / "pairs"), [3])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = PatchGeometry(latent_channels=4, width=8).build()
    clip = torch.full((2, 3, 16, 16), 0.1 + 0.8 * rank), torch.rand(2, 3, 16, 16)
    measure = Validation({rank: clip}, vae, folder, sampling=SAMPLING)

    def validate(network, prompts, step):
        figures = measure(network, prompts, step)
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        torch.save({"figures": figures, "weights": weights}, folder / f"seen-{rank}.pt")
        return figures

    objective = TrainingObjective(network, MUON, prompts=prompts)
    train(data, objective, folder / "shared", write=write, validate=validate)
    assert gathered([rank]) == [0, 1]
    means = mean_parts([{"a": float(rank), "b": math.nan}])
    assert means["a"] == 0.5 and math.isnan(means["b"])


def test_ranks_skip_and_validate_together(tmp_path):
    ranks(shared, tmp_path)
    network, prompts = begun()
    data = Poisoned(latent_pairs(tmp_path / "pairs"), [3])
    objective = TrainingObjective(network, replace(MUON, batch=2), prompts=prompts)
    train(data, objective, tmp_path / "one", write=write)
    both, one = (stored(tmp_path / name, 3) for name in ("shared", "one"))
    assert both["skipped"] == one["skipped"] == 1
    for key, value in one["average"].items():
        # Both optimizers make much of rounding where gradients are nearly nothing.
        assert (both["average"][key] - value).abs().mean() < 3e-4
    # Both validate the averaged weights, and know the means of both clips.
    seen = [torch.load(tmp_path / f"seen-{rank}.pt") for rank in (0, 1)]
    assert seen[0]["figures"] == seen[1]["figures"]
    for key, value in both["average"].items():
        for each in seen:
            assert torch.equal(each["weights"][key.removeprefix("network.")], value)
    videos = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert videos == ["0000003_0.mp4", "0000003_1.mp4"]


def test_sharded_ranks_train_validate_and_resume_as_one_process(tmp_path):
    pairs = latent_pairs(tmp_path / "pairs")
    ranks(sharded, tmp_path)
    network, prompts = begun()
    objective = TrainingObjective(network, replace(STAR, batch=2), prompts=prompts)
    train(pairs, objective, tmp_path / "one", write=write)
    one = stored(tmp_path / "one", 3)
    parts = [
        torch.load(tmp_path / "sharded" / f"state-0000003-{rank}.pt", weights_only=True)
        for rank in (0, 1)
    ]
    for kind in ("trained", "average"):
        for key, value in one[kind].items():
            both = torch.cat([part[kind][key].reshape(-1, *value.shape[1:]) for part in parts])
            torch.testing.assert_close(both, value, rtol=1e-4, atol=5e-4)
    files = [(tmp_path / name / "tiny.safetensors").stat().st_size for name in ("one", "sharded")]
    assert files[0] == files[1]
    seen = [torch.load(tmp_path / f"seen-{rank}.pt") for rank in (0, 1)]
    assert seen[0] == seen[1] and len(set(seen[0])) == 3
