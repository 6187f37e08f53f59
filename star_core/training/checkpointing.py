"""Gradient checkpointing: blocks keep their inputs and recompute the rest in the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones import Network
from ..lora import lora_layers, lora_strength
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
        return _checkpoint(module, forward, *args, **kwargs)

    module.forward = checkpointed


def _wrap_res_block(module: ResBlock) -> None:
    forward = module.forward

    def checkpointed(channels: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        # The block empties the list, so each of the two runs gets a list of its own.
        parts = tuple(channels)
        channels.clear()

        def run(*parts: Tensor) -> Tensor:
            return forward(list(parts), *args, **kwargs)

        return _checkpoint(module, run, *parts)

    module.forward = checkpointed


def _checkpoint(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a block; when it is recomputed, its LoRA has the strength that it has now."""
    strengths = {layer.strength for layer in lora_layers(module).values()}
    assert len(strengths) < 2, "a block whose layers have LoRA of different strengths"

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), lora_strength(module, *strengths) if strengths else nullcontext()

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
