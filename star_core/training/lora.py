"""LoRA: low-rank changes of the transformers' linear layers (Hu et al. 2021, arXiv:2106.09685)."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.tensors import write_tensors

# What the host puts before the keys of a network.
_PREFIX = "diffusion_model."


class LoraLinear(nn.Linear):
    """A linear layer plus up(down(x)) alpha / rank; its own weights keep their names."""

    lora_down: nn.Linear
    lora_up: nn.Linear
    alpha: float

    def forward(self, input: Tensor) -> Tensor:
        scale = self.alpha / self.lora_down.out_features
        return super().forward(input) + scale * self.lora_up(self.lora_down(input))


def add_lora(
    network: nn.Module, rank: int, *, alpha: float | None = None, seed: int = 0
) -> list[str]:
    """Gives every linear layer of the transformers its LoRA, in place; the names of the layers.

    It starts as no change: up is zero, down is drawn from `seed`. alpha: None is the rank.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA is at least 1, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    names = []
    for name, layer in list(network.named_modules()):
        inside = "transformer_blocks." in name and "local" not in name  # but not in LIEM
        if type(layer) is not nn.Linear or not inside:
            continue
        layer.__class__ = LoraLinear
        assert isinstance(layer, LoraLinear)
        where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        layer.lora_down = nn.Linear(layer.in_features, rank, bias=False, **where)
        layer.lora_up = nn.Linear(rank, layer.out_features, bias=False, **where)
        layer.alpha = float(rank if alpha is None else alpha)
        with torch.no_grad():
            drawn = torch.randn(rank, layer.in_features, generator=generator)
            layer.lora_down.weight.copy_(drawn / layer.in_features**0.5)
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
    """Writes the LoRA alone, under the names that ComfyUI's Load LoRA nodes look for."""
    tensors: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLinear):
            tensors[f"{_PREFIX}{name}.lora_down.weight"] = layer.lora_down.weight
            tensors[f"{_PREFIX}{name}.lora_up.weight"] = layer.lora_up.weight
            tensors[f"{_PREFIX}{name}.alpha"] = torch.tensor(layer.alpha)
    if not tensors:
        raise ValueError("this network has no LoRA: add it before training (add_lora)")
    write_tensors(path, tensors, dtype=dtype, overwrite=overwrite)


def without_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's state without its LoRA: the official names alone."""
    return {key: value for key, value in state.items() if ".lora_" not in key}


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """The change becomes part of the weights, and the layers plain ones again."""
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, LoraLinear)]
    for layer in layers:
        scale = layer.alpha / layer.lora_down.out_features
        layer.weight += scale * (layer.lora_up.weight @ layer.lora_down.weight)
        del layer.lora_down, layer.lora_up
        layer.__class__ = nn.Linear
