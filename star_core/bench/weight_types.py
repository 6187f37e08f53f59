"""Measures memory and error of weight types: `python -m star_core bench --weights`.

The error is that of the weights alone: they are rounded as in a file, and everything is computed in
float32. It is the norm of the difference divided by the norm of the output with float32 weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Union

import torch
from torch import Tensor, nn

from ..backbones import SIZES, Network, NetworkConfig, build_network
from ..checkpoints.quantization import CONFIG, WRITTEN, Format, PackedTensor, quantized
from ..conversion import quantized_layers
from ..model import BUILT_IN
from ..models.unet import UNetConfig
from ..star_checkpoint import load_model

WeightType = Union[torch.dtype, Format]  # noqa: UP007
# Names as in the command `convert` and the node that loads a model; the casts are ComfyUI's.
TYPES: dict[str, WeightType] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3fn, cast": torch.float8_e4m3fn,
    "fp8_e5m2, cast": torch.float8_e5m2,
    **WRITTEN,
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A weight type. errors: relative, by network. bytes: of the weights of full-size networks."""

    type: str
    errors: dict[str, float]
    bytes: dict[str, int]


def rounded(network: nn.Module, type: WeightType) -> dict[str, Tensor]:
    """Returns the weights of a network in float32 after rounding them to a type."""
    quantised = _quantised(network, type)
    return {
        key: _unpacked(tensor, type)
        if key in quantised
        else tensor.to(_unpacked_dtype(type)).float()
        for key, tensor in network.state_dict().items()
    }


def size(network: nn.Module, type: WeightType) -> int:
    """Returns the bytes of a network's weights in a type; the network may be on meta."""
    quantised = _quantised(network, type)
    return sum(
        _packed_bytes(tensor.shape, type)
        if key in quantised
        else tensor.numel() * _unpacked_dtype(type).itemsize
        for key, tensor in network.state_dict().items()
    )


def _quantised(network: nn.Module, type: WeightType) -> set[str]:
    layers = quantized_layers(network, type) if isinstance(type, Format) else []
    return {f"{layer}.weight" for layer in layers}


def _unpacked_dtype(type: WeightType) -> torch.dtype:
    """Returns the dtype of the weights that are not quantised."""
    return torch.float16 if isinstance(type, Format) else type


def _unpacked(weight: Tensor, type: WeightType) -> Tensor:
    assert isinstance(type, Format)
    parts = quantized(weight, type)
    del parts[CONFIG]
    return PackedTensor(parts, {"format": type.name}, torch.float32).unpacked()


@cache
def _packed_bytes(shape: torch.Size, type: WeightType) -> int:
    assert isinstance(type, Format)
    return sum(tensor.nbytes for tensor in quantized(torch.ones(shape), type).values())


def random_network(config: NetworkConfig) -> Network:
    """Returns a network with random weights that roughly preserve the scale of activations."""
    network = build_network(config, device="meta").to_empty(device="cpu")
    network.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1, generator=generator)
        else:
            parameter.fill_(1)
    return network


def _built_in() -> Network:
    return load_model(BUILT_IN["tiny"][0], dtype=torch.float32).network


# Name -> function that builds the network, and size of its latents: frames, height, width.
NETWORKS: dict[str, tuple[Callable[[], Network], tuple[int, int, int]]] = {
    "tiny": (_built_in, (4, 34, 32)),
    "320 channels, random": (
        lambda: random_network(
            UNetConfig(dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5))
        ),
        (4, 18, 16),
    ),
    "3072 channels, random": (
        lambda: random_network(replace(SIZES["cogvideox-5b"], num_layers=2)),
        (2, 8, 8),
    ),
}


@torch.inference_mode()
def errors(
    network: Network, sides: tuple[int, int, int], types: Mapping[str, WeightType]
) -> dict[str, float]:
    """Returns the relative error of the velocity by type, for random latents at timestep 500.

    sides: frames, height and width of the latents. types: weight types by name.
    """
    config, generator = network.config, torch.Generator().manual_seed(1)
    x, hint = torch.randn(2, 1, config.in_dim, *sides, generator=generator)
    y = torch.randn(1, config.context_length, config.context_dim, generator=generator)

    def velocity() -> Tensor:
        return network(x, torch.tensor([500]), y, hint)

    exact, weights = velocity(), {k: v.clone() for k, v in network.state_dict().items()}
    by_type = {}
    for name, type in types.items():
        network.load_state_dict(rounded(network, type))
        by_type[name] = ((velocity() - exact).norm() / exact.norm()).item()
        network.load_state_dict(weights)
    return by_type


def measure() -> list[Measurement]:
    """Measures all types on all networks."""
    relative = {name: errors(build(), sides, TYPES) for name, (build, sides) in NETWORKS.items()}
    full_size = {name: build_network(config, device="meta") for name, config in SIZES.items()}
    return [
        Measurement(
            type=name,
            errors={network: by_type[name] for network, by_type in relative.items()},
            bytes={size_name: size(network, type) for size_name, network in full_size.items()},
        )
        for name, type in TYPES.items()
    ]


def table(measured: list[Measurement]) -> str:
    """Returns a Markdown table of measurements, a row for each type."""
    errors = [f"error, {name}" for name in measured[0].errors]
    head = ["weights", *errors, *(f"GiB, {name}" for name in measured[0].bytes)]
    rows = [head, ["---"] * len(head)]
    for each in measured:
        counts = [f"{count / 2**30:.2f}" for count in each.bytes.values()]
        rows.append([each.type, *(f"{error:.2g}" for error in each.errors.values()), *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
