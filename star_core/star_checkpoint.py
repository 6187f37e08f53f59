"""Reads and writes the network files of this project and of STAR.

A file is self-describing if its safetensors metadata has the key `star`: JSON with `backbone`, a
key of `backbones.BACKBONES` ("i2vgenxl" if it is missing), and the fields of three settings:
`config` (the backbone's config class), `sampling` (`SamplingDefaults`) and `latents`
(`LatentFormat`). The tensors `prompts.positive` and `prompts.negative` (1 l d) are the text
embeddings of a model that needs no text encoder, and `prompts.sharp` is its second preset. STAR's
published files have none of these; their settings come from `backbones`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backbones import (
    BACKBONES,
    Backbone,
    Network,
    NetworkConfig,
    backbone_of,
    build_network,
    identify_backbone,
)
from .checkpoints.metadata import build_checked, dataclass_from_json, read_object
from .checkpoints.quantization import formats_of
from .checkpoints.tensors import TensorFile, load_into, open_tensors, write_tensors
from .models.attention import Attention, scaled_dot_product
from .models.slicing import Slicing
from .sampling_defaults import SD_LATENTS, LatentFormat, SamplingDefaults

_PROMPTS = "prompts."


FAITHFUL, SHARP = "faithful", "sharp"


def check_preset(preset: str | None, known: Sequence[str]) -> None:
    """Raises ValueError unless `preset` is in `known`, the model's presets, or None."""
    if preset is None or preset in known:
        return
    if not known:
        raise ValueError("this model has no presets: leave the preset out and write a prompt")
    raise ValueError(f"this model has no preset {preset!r}: choose {', '.join(known)}")


class LearnedPrompts(NamedTuple):
    """Learned embeddings (1 l d) that replace encoded prompts.

    positive: restores faithfully. negative: leaves the video as it is. sharp: adds detail that the
    video does not determine; None where a model has not learned such a preset.
    """

    positive: Tensor
    negative: Tensor
    sharp: Tensor | None = None

    @property
    def presets(self) -> tuple[str, ...]:
        """The names of the presets, the default first."""
        return (FAITHFUL,) if self.sharp is None else (FAITHFUL, SHARP)

    def of(self, preset: str | None) -> tuple[Tensor, Tensor]:
        """Returns the positive and the negative embedding of a preset, None for the default.

        Raises ValueError for a preset that is not in `presets`.
        """
        check_preset(preset, self.presets)
        positive = self.sharp if preset == SHARP and self.sharp is not None else self.positive
        return positive, self.negative

    def to(self, device: torch.device | str, dtype: torch.dtype | None) -> "LearnedPrompts":
        """Returns the prompts on a device and, unless dtype is None, in another type."""
        sharp = None if self.sharp is None else self.sharp.to(device=device, dtype=dtype)
        positive, negative = (p.to(device=device, dtype=dtype) for p in self[:2])
        return LearnedPrompts(positive, negative, sharp)


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A network's file, opened: its settings, and the network's tensors, still memory-mapped."""

    path: Path
    config: NetworkConfig
    sampling: SamplingDefaults
    latents: LatentFormat
    prompts: LearnedPrompts | None
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StarModel:
    """A network that is ready for sampling, and the settings of its file."""

    network: Network
    config: NetworkConfig
    sampling: SamplingDefaults
    prompts: LearnedPrompts | None
    latents: LatentFormat = SD_LATENTS


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Opens the file of a network of STAR's, published or self-describing.

    Raises ValueError for an unreadable file. Missing tensors are found only when it is loaded.
    """
    file = open_tensors(path)
    config, sampling, latents = network_settings(file)
    tensors = network_tensors(file)
    if formats_of(file) and not formats_of(tensors):
        raise ValueError(
            f"{file.path} is quantised under the names of SAT, which no loader supports: write it "
            "again with `convert`, quantised under diffusers' names or not at all"
        )
    return ModelFile(
        path=file.path,
        config=config,
        sampling=sampling,
        latents=latents,
        prompts=learned_prompts(file),
        tensors=tensors,
    )


def load_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = nn,
    attention: Attention = scaled_dot_product,
) -> StarModel:
    """Loads a network of STAR's, published or self-describing, for inference.

    dtype: of the weights and the learned prompts; None keeps the file's. operations: torch.nn, or a
    host's layers. attention: see `models.attention`. Raises ValueError for an unreadable file and
    for one that lacks tensors of such a network.
    """
    file = open_model(path)
    network = build_checked(
        lambda: build_network(
            file.config, operations=operations, attention=attention, device="meta"
        ),
        str(file.path),
    )
    load_into(network, file.tensors, device=device, dtype=dtype, name=str(file.path))
    network.eval().requires_grad_(False)
    network.slicing = Slicing()
    return StarModel(
        network=network,
        config=file.config,
        sampling=file.sampling,
        prompts=file.prompts and file.prompts.to(device, dtype),
        latents=file.latents,
    )


def save_model(
    path: str | os.PathLike[str],
    network: Network,
    *,
    sampling: SamplingDefaults,
    latents: LatentFormat = SD_LATENTS,
    weights: Mapping[str, Tensor] | None = None,
    prompts: LearnedPrompts | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a self-describing safetensors file that `load_model` can read.

    weights: by the network's keys, in place of its own. dtype: of the weights and prompts; None
    keeps theirs. metadata: further text for the file's metadata. Raises ValueError if the file
    exists while `overwrite` is off, or cannot be written.
    """
    tensors = dict(network.state_dict() if weights is None else weights)
    if prompts is not None:
        learned = prompts._asdict().items()
        tensors |= {_PROMPTS + name: value for name, value in learned if value is not None}
    write_tensors(
        path,
        tensors,
        dtype=dtype,
        metadata={**(metadata or {}), "star": self_description(network.config, sampling, latents)},
        overwrite=overwrite,
    )


def self_description(
    config: NetworkConfig, sampling: SamplingDefaults, latents: LatentFormat
) -> str:
    """Returns the JSON that a self-describing file has as `star` in its metadata."""
    star = {
        "backbone": backbone_of(config).name,
        "config": asdict(config),
        "sampling": asdict(sampling),
        "latents": asdict(latents),
    }
    return json.dumps(star)


def network_tensors(file: TensorFile) -> Mapping[str, Tensor]:
    """Returns the tensors of a file's network under the network's names, without the prompts."""
    tensors = file_backbone(file).weights(file)
    if tensors is not file:
        return tensors
    return {key: tensor for key, tensor in file.items() if not key.startswith(_PROMPTS)}


def learned_prompts(file: TensorFile) -> LearnedPrompts | None:
    """Returns a file's learned prompts, None without any; ValueError if one is missing."""
    prompts = {
        name: file[_PROMPTS + name] for name in LearnedPrompts._fields if _PROMPTS + name in file
    }
    if not prompts:
        return None
    for name in ("positive", "negative"):
        if name not in prompts:
            missing = repr(_PROMPTS + name)
            raise ValueError(f"{file.path} is incomplete: {missing} is missing; write it again")
    return LearnedPrompts(**prompts)


def file_backbone(file: TensorFile) -> Backbone:
    """Returns the backbone that a file states, or that its tensors suggest if it states none.

    Raises ValueError if the file's description of itself is unknown to this version.
    """
    if "star" not in file.metadata:
        return identify_backbone(file)
    name = _description(file).get("backbone", "i2vgenxl")
    if not isinstance(name, str) or name not in BACKBONES:
        raise ValueError(
            f"{file.path} states a backbone that this version does not know: update this package"
        )
    return BACKBONES[name]


def network_settings(file: TensorFile) -> tuple[NetworkConfig, SamplingDefaults, LatentFormat]:
    """Returns the settings that a file states.

    Without any, the config is inferred from the tensors' shapes, and the others are STAR's. Raises
    ValueError if the file's description of itself is unknown to this version.
    """
    backbone = file_backbone(file)
    if "star" not in file.metadata:
        config = backbone.infer(file)
        return config, *backbone.published(config)
    star = _description(file)
    return (
        dataclass_from_json(backbone.config, star.get("config"), f"{file.path}, star.config"),
        dataclass_from_json(SamplingDefaults, star.get("sampling"), f"{file.path}, star.sampling"),
        dataclass_from_json(LatentFormat, star.get("latents", {}), f"{file.path}, star.latents"),
    )


def _description(file: TensorFile) -> dict[str, Any]:
    return read_object(file.metadata["star"], f"{file.path}, star")
