"""Where weights are while they work, and where they wait (command line and training; a host has
its own memory management)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Keeps a module on `device` for the block and takes it back to where it was afterwards."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
