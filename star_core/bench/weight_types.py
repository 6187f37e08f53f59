"""What a type of weights costs, in memory and in error: `python -m star_core bench --weights`.

The error is that of the weights alone: they are rounded as they are stored, and all is computed in
float32. It is relative, the norm of the difference by that of the output in float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Union

import torch
from torch import Tensor, nn

from ..backbones import SIZES, Network, NetworkConfig, build_network
from ..checkpoints.quantization import CONFIG, WRITTEN, Format, PackedTensor, quantized
from ..model import BUILT_IN
from ..models.unet import UNetConfig
from ..star_checkpoint import load_model, quantized_layers

WeightType = Union[torch.dtype, Format]  # noqa: UP007
# By the names of `convert` and of the node that loads a model; the casts are ComfyUI's.
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
    """A type of weights. errors: by network. bytes: of the weights of networks of full size."""

    type: str
    errors: dict[str, float]
    bytes: dict[str, int]


def rounded(network: nn.Module, type: WeightType) -> dict[str, Tensor]:
    """The weights of a network as they come back from being stored, in float32."""
    quantised = _quantised(network, type)
    return {
        key: _unpacked(tensor, type) if key in quantised else tensor.to(_kept(type)).float()
        for key, tensor in network.state_dict().items()
    }


def size(network: nn.Module, type: WeightType) -> int:
    """Bytes of a network's weights when they are stored so; it may be on meta."""
    quantised = _quantised(network, type)
    return sum(
        _packed_bytes(tensor.shape, type)
        if key in quantised
        else tensor.numel() * _kept(type).itemsize
        for key, tensor in network.state_dict().items()
    )


def _quantised(network: nn.Module, type: WeightType) -> set[str]:
    layers = quantized_layers(network, type) if isinstance(type, Format) else []
    return {f"{layer}.weight" for layer in layers}


def _kept(type: WeightType) -> torch.dtype:
    return torch.float16 if isinstance(type, Format) else type


def _unpacked(weight: Tensor, type: WeightType) -> Tensor:
    assert isinstance(type, Format)
    parts = quantized(weight, type)
    del parts[CONFIG]
    return PackedTensor(parts, {"format": type.name}, torch.float32).unpacked()


@cache
def _packed_bytes(shape: torch.Size, type: WeightType) -> int:
    assert isinstance(type, Format)
    return sum(span.nbytes for span in quantized(torch.ones(shape), type).values())


def drawn(config: NetworkConfig) -> Network:
    """A network of random weights that keep the size of what passes them."""
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


# Name -> how it is made, and its latents: frames, height, width.
NETWORKS: dict[str, tuple[Callable[[], Network], tuple[int, int, int]]] = {
    "tiny": (_built_in, (4, 34, 32)),
    "320 channels, random": (
        lambda: drawn(UNetConfig(dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5))),
        (4, 18, 16),
    ),
    "3072 channels, random": (
        lambda: drawn(replace(SIZES["cogvideox-5b"], num_layers=2)),
        (2, 8, 8),
    ),
}


@torch.inference_mode()
def errors(
    network: Network, sides: tuple[int, int, int], types: Mapping[str, WeightType]
) -> dict[str, float]:
    """Of the velocity of drawn latents (frames height width) at half the noise, by type."""
    config, generator = network.config, torch.Generator().manual_seed(1)
    x, hint = torch.randn(2, 1, config.in_dim, *sides, generator=generator)
    y = torch.randn(1, config.context_length, config.context_dim, generator=generator)

    def velocity() -> Tensor:
        return network(x, torch.tensor([500]), y, hint)

    wanted, weights = velocity(), {k: v.clone() for k, v in network.state_dict().items()}
    found = {}
    for name, type in types.items():
        network.load_state_dict(rounded(network, type))
        found[name] = ((velocity() - wanted).norm() / wanted.norm()).item()
        network.load_state_dict(weights)
    return found


def measure() -> list[Measurement]:
    """All types on all networks."""
    found = {name: errors(make(), sides, TYPES) for name, (make, sides) in NETWORKS.items()}
    whole = {name: build_network(config, device="meta") for name, config in SIZES.items()}
    return [
        Measurement(
            type=name,
            errors={network: by_type[name] for network, by_type in found.items()},
            bytes={size_name: size(network, type) for size_name, network in whole.items()},
        )
        for name, type in TYPES.items()
    ]


def table(measured: list[Measurement]) -> str:
    """In Markdown."""
    errors = [f"error, {name}" for name in measured[0].errors]
    head = ["weights", *errors, *(f"GiB, {name}" for name in measured[0].bytes)]
    rows = [head, ["---"] * len(head)]
    for each in measured:
        counts = [f"{count / 2**30:.2f}" for count in each.bytes.values()]
        rows.append([each.type, *(f"{error:.2g}" for error in each.errors.values()), *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
