"""Convolution over time only, computed as a 2-D convolution over (frames, pixels).

The layer is a Conv3d with kernel (k, 1, 1). The same sums are 2 to 4 times faster as a Conv2d,
which libraries optimise better.
"""

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@cache
def temporal_conv(conv3d: type[nn.Conv3d]) -> type[nn.Conv3d]:
    """Returns a subclass of torch's or a host's Conv3d that runs (k, 1, 1) kernels as Conv2d."""

    class TemporalConv(conv3d):
        def _conv_forward(
            self, input: Tensor, weight: Tensor, bias: Tensor | None, **padded: Any
        ) -> Tensor:
            # A host's layer may get further padding arguments; only their defaults work here.
            if any(padded.values()):
                return super()._conv_forward(input, weight, bias, **padded)
            height, padding = input.shape[-2], (int(self.padding[0]), 0)
            planes = F.conv2d(input.flatten(3), weight.squeeze(-1), bias, padding=padding)
            return planes.unflatten(3, (height, -1))

    return TemporalConv


def speed_up_temporal_convs(module: nn.Module) -> None:
    """Replaces a module's (k, 1, 1) convolutions of stride 1 by `temporal_conv`, in place."""
    for layer in module.modules():
        if type(layer) is nn.Conv3d and layer.kernel_size[1:] == (1, 1) == layer.stride[1:]:
            layer.__class__ = temporal_conv(nn.Conv3d)
