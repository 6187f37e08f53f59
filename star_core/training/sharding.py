"""Weights, gradients and optimizer states spread over processes by torch's FSDP2.

Zhao et al. 2023, arXiv:2304.11277. Each process keeps a part of every parameter; a block of the
network is whole only while it computes.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Network


def shard(network: Network, device: torch.device) -> None:
    """Spreads a network over all processes, in place, block by block.

    ValueError if there are no processes to spread it over, or if this torch has no FSDP2.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError("--shard needs several processes: start them by torchrun")
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise ValueError(
            f"torch {torch.__version__} has no FSDP2: install torch 2.6 or newer, or leave out "
            "--shard"
        ) from error
    # Blocks return views, but nothing overwrites these while gradients are recorded.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process keeps, or the tensor if it is whole."""
    part = tensor.detach()
    return part.to_local() if hasattr(part, "to_local") else part  # pyright: ignore


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor put together from its parts; all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """Returns this process's part of a tensor as a tensor that is spread like a parameter."""
    if not hasattr(parameter, "to_local") or part.ndim == 0:
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def local_state(optimizer: Any) -> dict[str, Any]:
    """Returns an optimizer's state with the parts of this process only."""
    state = optimizer.state_dict()
    parts = {
        index: {k: local(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": parts}


def skeleton(network: Network) -> Network:
    """Returns a copy of a network without weights, on the device "meta"."""
    memo = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, memo)


def gather_into(target: Network | None, network: Network) -> None:
    """Puts the weights of a network, from all processes, into `target` on the CPU.

    All processes must call this; those with None only take part.
    """
    weights = {}
    for key, tensor in network.state_dict().items():
        tensor = whole(tensor)
        if target is not None:
            weights[key] = tensor.detach().cpu()
    if target is not None:
        target.load_state_dict(weights, assign=True)
