"""LoRA: low-rank changes of the transformers' linear layers (Hu et al. 2021, arXiv:2106.09685)."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.tensors import write_tensors

# ComfyUI's prefix for the keys of a network.
_PREFIX = "diffusion_model."


class LoraLinear(nn.Linear):
    """A linear layer plus up(down(x)) · alpha / rank; its own weights keep their names."""

    lora_down: nn.Linear
    lora_up: nn.Linear
    alpha: float

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer with its LoRA to (... d)."""
        scale = self.alpha / self.lora_down.out_features
        return super().forward(input) + scale * self.lora_up(self.lora_down(input))


def add_lora(
    network: nn.Module, rank: int, *, alpha: float | None = None, seed: int = 0
) -> list[str]:
    """Adds a LoRA to every linear layer of the transformers in place; returns the layers' names.

    It has no effect at first: up is zero, down is random by `seed`. alpha: None for the rank.
    ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be at least 1, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    names = []
    for name, layer in list(network.named_modules()):
        inside = "transformer_blocks." in name and "local" not in name  # not in LIEM
        if type(layer) is not nn.Linear or not inside:
            continue
        layer.__class__ = LoraLinear
        assert isinstance(layer, LoraLinear)
        placement = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        layer.lora_down = nn.Linear(layer.in_features, rank, bias=False, **placement)
        layer.lora_up = nn.Linear(rank, layer.out_features, bias=False, **placement)
        layer.alpha = float(rank if alpha is None else alpha)
        with torch.no_grad():
            noise = torch.randn(rank, layer.in_features, generator=generator)
            layer.lora_down.weight.copy_(noise / layer.in_features**0.5)
            layer.lora_up.weight.zero_()
        names.append(name)
    return names


def write_lora(
    path: str | os.PathLike[str],
    network: nn.Module,
    *,
    dtype: torch.dtype | None = torch.float16,
    overwrite: bool = False,
) -> None:
    """Writes the LoRA of a network under the names that ComfyUI's Load LoRA nodes expect.

    dtype: of the file; None keeps the network's. ValueError if the network has no LoRA, or if the
    file exists and `overwrite` is off.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLinear):
            tensors[f"{_PREFIX}{name}.lora_down.weight"] = layer.lora_down.weight
            tensors[f"{_PREFIX}{name}.lora_up.weight"] = layer.lora_up.weight
            tensors[f"{_PREFIX}{name}.alpha"] = torch.tensor(layer.alpha)
    if not tensors:
        raise ValueError("this network has no LoRA: call add_lora before training")
    write_tensors(path, tensors, dtype=dtype, overwrite=overwrite)


def without_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a network's state without the tensors of its LoRA: only official names."""
    return {key: value for key, value in state.items() if ".lora_" not in key}


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """Adds the LoRA to the weights of its layers and removes it, in place."""
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, LoraLinear)]
    for layer in layers:
        scale = layer.alpha / layer.lora_down.out_features
        layer.weight += scale * (layer.lora_up.weight @ layer.lora_down.weight)
        del layer.lora_down, layer.lora_up
        layer.__class__ = nn.Linear
