"""LoRA: low-rank changes of a network's layers (Hu et al. 2021, arXiv:2106.09685), and its files.

A file has the names that ComfyUI's Load LoRA nodes expect. It may carry settings, those fields of
`SamplingDefaults` that a model needs with this LoRA, such as the few evaluations that it was
distilled for. They are a tensor, JSON in bytes, because ComfyUI's nodes hand on nothing else of a
file: its MODEL holds it as a patch of a buffer of this name.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoints.metadata import check_fields, read_object
from .checkpoints.tensors import open_tensors, write_tensors
from .models.temporal_conv import speed_up_temporal_convs
from .sampling_defaults import SamplingDefaults

LoraLayers = Literal["attention", "all"]

# ComfyUI's prefix for the keys of a network.
_PREFIX = "diffusion_model."
_DOWN = (".lora_down.weight", ".lora_A.weight")  # LoRA of diffusers have the names with letters
_UP = (".lora_up.weight", ".lora_B.weight")
# The buffer of ComfyUI's network that the settings replace, and its size in bytes.
SETTINGS, SETTINGS_SIZE = "star_settings", 512
_SETTINGS_KEY = f"{_PREFIX}{SETTINGS}.set_weight"


class LoraLayer:
    """Mixin of a linear layer or convolution, to whose output it adds up(down(x)) · alpha / rank.

    The layer's own weights keep their names. strength: factor of what is added.
    """

    lora_down: nn.Module
    lora_up: nn.Module
    alpha: float
    rank: int
    strength: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer with its LoRA."""
        out = super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        if not self.strength:
            return out
        scale = self.strength * self.alpha / self.rank
        return out + scale * self.lora_up(self.lora_down(input))


@cache
def _with_lora(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Lora{kind.__name__}", (LoraLayer, kind), {"plain": kind})


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Returns the layers of a network that have a LoRA, by name."""
    return {n: layer for n, layer in network.named_modules() if isinstance(layer, LoraLayer)}


def add_lora(
    network: nn.Module,
    rank: int,
    *,
    layers: LoraLayers = "attention",
    controlnet: bool = True,
    alpha: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Adds a LoRA to layers of a network in place; returns the layers' names.

    It has no effect at first: up is zero, down is random by `seed`.

    layers: "attention" for the linear layers of the transformers; "all" for all linear layers and
    convolutions. LIEM never gets any. controlnet: whether the ControlNet gets one too. alpha: None
    for the rank. ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be at least 1, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    names = []
    for name, layer in list(network.named_modules()):
        if "local" in name or (name.startswith("VideoControlNet.") and not controlnet):
            continue
        linear = isinstance(layer, nn.Linear) and "transformer_blocks." in name
        wide = isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if linear if layers == "attention" else wide:
            _add(layer, rank, rank if alpha is None else alpha, generator)
            names.append(name)
    return names


def _add(layer: Any, rank: int, alpha: float, generator: torch.Generator) -> None:
    down, up = _factors(layer, rank)
    with torch.no_grad():
        noise = torch.randn(down.weight.shape, generator=generator)
        down.weight.copy_(noise / down.weight[0].numel() ** 0.5)
        up.weight.zero_()
    layer.__class__ = _with_lora(type(layer))
    layer.lora_down, layer.lora_up = down, up
    layer.alpha, layer.rank = float(alpha), rank
    speed_up_temporal_convs(nn.ModuleList([down, up]))


def _factors(layer: nn.Module, rank: int) -> tuple[Any, Any]:
    """Returns two layers whose product has the shape of a layer's weight."""
    weight: Any = layer.weight
    placement: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "bias": False}
    if isinstance(layer, nn.Linear):
        down = nn.Linear(layer.in_features, rank, **placement)
        return down, nn.Linear(rank, layer.out_features, **placement)
    kind: Any = next(k for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, k))
    conv: Any = layer
    same = {"stride": conv.stride, "padding": conv.padding, **placement}
    down = kind(conv.in_channels, rank, conv.kernel_size, **same)
    return down, kind(rank, conv.out_channels, 1, **placement)


@contextmanager
def lora_strength(network: nn.Module, strength: float) -> Iterator[None]:
    """Sets the strength of a network's LoRA in a `with` block; at 0 the network is as without."""
    layers = list(lora_layers(network).values())
    before = [layer.strength for layer in layers]
    try:
        for layer in layers:
            layer.strength = strength
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.strength = value


def write_lora(
    path: str | os.PathLike[str],
    network: nn.Module,
    *,
    sampling: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = torch.float16,
    overwrite: bool = False,
) -> None:
    """Writes the LoRA of a network under the names that ComfyUI's Load LoRA nodes expect.

    sampling: fields of `SamplingDefaults` that the model needs with this LoRA. dtype: of the file;
    None keeps the network's. ValueError if the network has no LoRA, or if the file exists and
    `overwrite` is off.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(network).items():
        tensors[f"{_PREFIX}{name}.lora_down.weight"] = layer.lora_down.weight
        tensors[f"{_PREFIX}{name}.lora_up.weight"] = layer.lora_up.weight
        tensors[f"{_PREFIX}{name}.alpha"] = torch.tensor(layer.alpha)
    if not tensors:
        raise ValueError("this network has no LoRA: call add_lora before training")
    if sampling:
        text = json.dumps(dict(sampling)).encode().ljust(SETTINGS_SIZE)
        tensors[_SETTINGS_KEY] = torch.tensor(list(text), dtype=torch.uint8)
    write_tensors(path, tensors, dtype=dtype, overwrite=overwrite)


def without_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a network's state without the tensors of its LoRA: only official names."""
    return {key: value for key, value in state.items() if ".lora_" not in key}


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """Adds the LoRA to the weights of its layers and removes it, in place."""
    for layer in lora_layers(network).values():
        scale = layer.strength * layer.alpha / layer.rank
        layer.weight += scale * _product(layer.lora_up.weight, layer.lora_down.weight)
        del layer.lora_down, layer.lora_up
        layer.__class__ = layer.plain


def _product(up: Tensor, down: Tensor) -> Tensor:
    """Returns the change of a weight: (out r 1...) and (r in k...) -> (out in k...)."""
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraFile:
    """A LoRA file, opened. strength: factor of its effect; negative is allowed.

    changes: for each of the network's layers, up (out r ...), down (r in ...) and the factor
    alpha / rank. sampling: fields of `SamplingDefaults` that the file asks for.
    """

    path: Path
    strength: float
    changes: Mapping[str, tuple[Tensor, Tensor, float]]
    sampling: Mapping[str, Any]

    @torch.no_grad()
    def apply(self, network: nn.Module) -> None:
        """Adds the LoRA to the weights of a network in place.

        ValueError if the network lacks a layer of the file, or has it in another size.
        """
        layers: dict[str, Any] = dict(network.named_modules())
        for name, (up, down, _) in self.changes.items():
            if not isinstance(weight := getattr(layers.get(name), "weight", None), Tensor):
                raise ValueError(
                    f"{self.path.name} is for another model: this one has no layer {name}"
                )
            if (changed := (len(up), *down.shape[1:])) != weight.shape:
                raise ValueError(
                    f"{self.path.name} is for another model: its {name} changes weights of "
                    f"{list(changed)}, here they are {list(weight.shape)}"
                )
        for name, (up, down, scale) in self.changes.items():
            weight = layers[name].weight
            change = _product(*(factor.to(weight.device).float() for factor in (up, down)))
            # Not in place, because weights may be views of the file that they come from.
            changed = weight.float() + self.strength * scale * change
            weight.data = changed.to(weight.dtype)

    @torch.no_grad()
    def continue_in(self, network: nn.Module) -> None:
        """Sets the LoRA that `add_lora` has added to a network to that of the file.

        The strength is ignored. ValueError if the network's has other layers or another rank.
        """
        layers = lora_layers(network)
        own = {n: (x.lora_up.weight.shape, x.lora_down.weight.shape) for n, x in layers.items()}
        stored = {name: (up.shape, down.shape) for name, (up, down, _) in self.changes.items()}
        if own != stored:
            names = sorted(own.keys() | stored.keys())
            odd = next(name for name in names if own.get(name) != stored.get(name))
            raise ValueError(
                f"{self.path.name} differs from the LoRA that is trained, at {odd}: give the same "
                "--rank, --lora-layers and --no-lora-controlnet as for its own training"
            )
        for name, (up, down, scale) in self.changes.items():
            layer = layers[name]
            layer.lora_up.weight.copy_(up)
            layer.lora_down.weight.copy_(down)
            layer.alpha = scale * layer.rank


def open_lora(path: str | os.PathLike[str], strength: float = 1.0) -> LoraFile:
    """Opens a LoRA file of this project or of diffusers.

    ValueError for an unreadable file, one with other tensors than those of a LoRA, and for settings
    that this version does not know.
    """
    file = open_tensors(path)
    changes = {}
    for key in file:
        if not key.endswith(_DOWN):
            continue
        name = key.removesuffix(_DOWN[0]).removesuffix(_DOWN[1])
        up = next((name + end for end in _UP if name + end in file), None)
        if up is None:
            raise ValueError(f"{file.path} is incomplete: the other half of {key} is missing")
        down = file[key]
        alpha = float(file[f"{name}.alpha"]) if f"{name}.alpha" in file else float(len(down))
        changes[name.removeprefix(_PREFIX)] = file[up], down, alpha / len(down)
    known = {n for n in file if n.endswith((*_DOWN, *_UP, ".alpha")) or n == _SETTINGS_KEY}
    if not changes or len(known) < len(file):
        odd = next((name for name in file if name not in known), "nothing")
        raise ValueError(f"{file.path} is not a LoRA for a STAR network: it holds {odd}")
    return LoraFile(
        path=file.path,
        strength=strength,
        changes=changes,
        sampling=read_settings(file[_SETTINGS_KEY], str(path)) if _SETTINGS_KEY in file else {},
    )


def read_settings(settings: Tensor, where: str) -> dict[str, Any]:
    """Returns the fields of `SamplingDefaults` in the settings tensor (n,) of a LoRA file.

    where: the file, for the ValueError if the settings are damaged or unknown to this version.
    """
    where = f"{where}, {SETTINGS}"
    text = bytes(settings.to(torch.uint8).tolist()).decode(errors="replace")
    sampling = read_object(text, where)
    check_fields(SamplingDefaults, sampling, where)
    try:
        replace(SamplingDefaults(), **sampling)
    except TypeError:
        raise ValueError(f"{where} has unknown fields: update this package") from None
    return sampling


def with_loras(
    sampling: SamplingDefaults, loras: Iterable[tuple[float, Mapping[str, Any]]]
) -> SamplingDefaults:
    """Returns a model's sampling settings with those that its LoRAs ask for.

    loras: strength and settings of each. The last one decides; one of strength 0 asks for nothing.
    """
    for strength, settings in loras:
        if strength:
            sampling = replace(sampling, **settings)
    return sampling
