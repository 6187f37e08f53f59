"""Several processes: the same weights, validation together, sharded weights."""

import os
import socket
from dataclasses import replace

import torch
from torch import multiprocessing

from star_core.training.objective import TrainingObjective
from star_core.training.tiny import new_network
from star_core.training.trainer import TrainExecution, train
from tests.small_run import CONFIG, SMALL, latent_pairs, stored, write

STAR = replace(CONFIG, trains="star", steps=3, batch=1)
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
