"""Gradient checkpointing: blocks keep their inputs and recompute the rest in the backward pass."""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones import Network
from ..models.unet_blocks import ResBlock


def recompute(network: Network) -> None:
    """Turns gradient checkpointing on for every block; a second call changes nothing.

    A training step then takes about one more forward pass.
    """
    for block in network.blocks:
        if "forward" not in vars(block):
            if isinstance(block, ResBlock):
                _wrap_res_block(block)
            else:
                _wrap(block)


def _wrap(module: nn.Module) -> None:
    forward = module.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    module.forward = checkpointed


def _wrap_res_block(module: ResBlock) -> None:
    forward = module.forward

    def checkpointed(channels: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        # The block empties the list, so each of the two runs gets a list of its own.
        parts = tuple(channels)
        channels.clear()

        def run(*parts: Tensor) -> Tensor:
            return forward(list(parts), *args, **kwargs)

        return checkpoint(run, *parts, use_reentrant=False)

    module.forward = checkpointed
