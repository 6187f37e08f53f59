"""Model files of this project and of STAR: told apart, loaded, written, converted.

A file is self-describing if its safetensors metadata has the key `star`: JSON with `config`, the
fields of `UNetConfig`, `sampling`, those of `SamplingDefaults`, `latents`, those of `LatentFormat`,
and `backbone`, a key of `networks.BACKBONES` (`i2vgenxl` if it is missing), for which the config is
that backbone's. The tensors `prompts.positive` and `prompts.negative` (1 l d) stand for the text
embeddings of a model without text encoder, `prompts.sharp` for its second preset. STAR's published
files have none of these; `networks` says how they are sampled.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backbones import (
    BACKBONES,
    COGVIDEOX,
    Backbone,
    Network,
    NetworkConfig,
    backbone_of,
    build_network,
)
from .checkpoints.kinds import VENHANCER, VIDEO_UNET, identify
from .checkpoints.quantization import CONFIG, Format, formats_of, quantized, stored, usual_type
from .checkpoints.tensors import (
    LazyTensors,
    TensorFile,
    cast,
    compare,
    load_into,
    open_tensors,
    write_tensors,
)
from .models.attention import Attention, scaled_dot_product
from .models.slicing import Slicing
from .sampling_defaults import SD_LATENTS, LatentFormat, SamplingDefaults

__all__ = [
    "FileInfo",
    "LearnedPrompts",
    "ModelFile",
    "StarModel",
    "convert",
    "describe",
    "load_into",
    "load_model",
    "open_model",
    "open_tensors",
    "save_model",
]

_PROMPTS = "prompts."


FAITHFUL, SHARP = "faithful", "sharp"


def check_preset(preset: str | None, known: Sequence[str]) -> None:
    """ValueError unless a model with these presets has this one. None is whatever comes first."""
    if preset is None or preset in known:
        return
    if not known:
        raise ValueError("presets are for models with learned prompts; tell this one what you want")
    raise ValueError(f"this model has no preset {preset!r}: choose {', '.join(known)}")


class LearnedPrompts(NamedTuple):
    """Embeddings (1 l d) that take the place of encoded prompts.

    positive: what restores faithfully. negative: what leaves the video as it is. sharp: what shows
    more detail than is certain; None where a model has not learned that.
    """

    positive: Tensor
    negative: Tensor
    sharp: Tensor | None = None

    @property
    def presets(self) -> tuple[str, ...]:
        return (FAITHFUL,) if self.sharp is None else (FAITHFUL, SHARP)

    def of(self, preset: str | None) -> tuple[Tensor, Tensor]:
        """Positive and negative of a preset, None for the first; ValueError if it has none such."""
        check_preset(preset, self.presets)
        positive = self.sharp if preset == SHARP and self.sharp is not None else self.positive
        return positive, self.negative

    def to(self, device: torch.device | str, dtype: torch.dtype | None) -> "LearnedPrompts":
        sharp = None if self.sharp is None else self.sharp.to(device=device, dtype=dtype)
        positive, negative = (p.to(device=device, dtype=dtype) for p in self[:2])
        return LearnedPrompts(positive, negative, sharp)


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """What a network's file holds: `tensors` are those of the network, still memory-mapped."""

    path: Path
    config: NetworkConfig
    sampling: SamplingDefaults
    latents: LatentFormat
    prompts: LearnedPrompts | None
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StarModel:
    """A network ready for sampling, and what its file says about itself."""

    network: Network
    config: NetworkConfig
    sampling: SamplingDefaults
    prompts: LearnedPrompts | None
    latents: LatentFormat = SD_LATENTS


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """What a file of STAR's network, published or self-describing, says and holds.

    Raises ValueError for a file that is unreadable; what it lacks shows when it is loaded.
    """
    file = open_tensors(path)
    config, sampling, latents = _described(file)
    tensors = _network_tensors(file)
    if formats_of(file) and not formats_of(tensors):
        raise ValueError(
            f"{file.path} is quantised under the names of SAT, which no loader takes: write it "
            "again with `convert`, quantised under diffusers' names or not at all"
        )
    return ModelFile(
        path=file.path,
        config=config,
        sampling=sampling,
        latents=latents,
        prompts=_prompts(file),
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
    """Load STAR's network, published or self-describing, for inference.

    dtype: None keeps the file's. Raises ValueError for a file that is no such network.
    """
    file = open_model(path)
    network = build_network(file.config, operations=operations, attention=attention, device="meta")
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
    prompts: LearnedPrompts | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a self-describing file that `load_model` reads; further metadata is added to it."""
    tensors = network.state_dict()
    if prompts is not None:
        learned = prompts._asdict().items()
        tensors |= {_PROMPTS + name: value for name, value in learned if value is not None}
    write_tensors(
        path,
        tensors,
        dtype=dtype,
        metadata={**(metadata or {}), "star": _description(network.config, sampling, latents)},
        overwrite=overwrite,
    )


def _description(config: NetworkConfig, sampling: SamplingDefaults, latents: LatentFormat) -> str:
    star = {
        "backbone": backbone_of(config).name,
        "config": asdict(config),
        "sampling": asdict(sampling),
        "latents": asdict(latents),
    }
    return json.dumps(star)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: torch.dtype | Format | None = None,
    *,
    shift: float | None = None,
    latent_scale: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write any checkpoint as safetensors, floating-point tensors as float16, bfloat16 or float32.

    dtype: None keeps each tensor's. One of `quantization.WRITTEN` quantises the linear layers in
    the transformer blocks of STAR's network, see `quantized_layers`; what else is wider than 16
    bits becomes float16. Keys and metadata stay, and so do other types of tensors; but STAR's
    network on CogVideoX gets diffusers' names, its LoRA merged, and describes itself. One tensor at
    a time is in memory. shift, latent_scale: what such a network is to be used with.
    Raises ValueError for an unreadable source, an existing destination unless `overwrite`, values
    that `dtype` cannot hold, a network of the second sort that lacks tensors or has others, and for
    another kind of file that is to be quantised.
    """
    if not isinstance(dtype, Format) and dtype not in (
        None,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ):
        raise ValueError(f"{dtype} is not a type for weights: choose float16, bfloat16 or float32")
    if (
        Path(destination).exists()
        and Path(source).exists()
        and os.path.samefile(source, destination)
    ):
        raise ValueError(f"{destination} is the source itself: choose another name")
    file = open_tensors(source)
    tensors, metadata = file, file.metadata
    backbone = backbone_of(file)
    weights = backbone.weights(file)
    if weights is not file or shift or latent_scale:
        if backbone is not COGVIDEOX:
            raise ValueError(
                f"{source} is no network on CogVideoX: leave out shift and latent scale"
            )
        config, sampling, latents = _described(file)
        sampling = replace(sampling, shift=shift or sampling.shift)
        latents = replace(latents, scale=latent_scale or latents.scale)
        differences = compare(weights, build_network(config, device="meta").state_dict())
        if str(differences):
            raise ValueError(f"{source} is no complete network on CogVideoX: {differences}")
        tensors, metadata = weights, {**metadata, "star": _description(config, sampling, latents)}
    if isinstance(dtype, Format):
        tensors, dtype = _quantized(file, tensors, dtype), None
    elif dtype is None:
        tensors = stored(tensors) if tensors is file else tensors
    write_tensors(destination, tensors, dtype=dtype, metadata=metadata, overwrite=overwrite)


def quantized_layers(network: nn.Module, format: Format) -> list[str]:
    """Which layers of a network are quantised: what ComfyUI computes so and what bears it.

    Those are the linear layers of attention and feed-forward in the transformer blocks. Norms, with
    what modulates them, LIEM, embeddings, the first and the last layers stay as they are.
    """
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and "transformer_blocks." in name
        and not re.search(r"norm|local", name)
        and format.takes(layer.weight.shape)
    ]


def _quantized(file: TensorFile, tensors: Mapping[str, Tensor], format: Format) -> LazyTensors:
    """The tensors of STAR's network with its layers quantised, each made when it is asked for."""
    network = build_network(_described(file)[0], device="meta")
    differences = compare(tensors, network.state_dict())
    if differences.missing or differences.mismatched:
        raise ValueError(
            f"{file.path} is no complete network of STAR's, and only those are quantised here: "
            f"{differences}. It seems to be a {identify(file).title}"
        )
    layers = set(quantized_layers(network, format))
    usual = usual_type(file.values())
    narrow = usual if usual.itemsize == 2 else torch.float16

    @lru_cache(1)  # the parts of a layer are asked for one after the other
    def parts(key: str) -> dict[str, Tensor]:
        return quantized(cast(key, tensors[key], torch.float32), format)

    def part(key: str, name: str) -> Tensor:
        return parts(key)[name]

    def kept(key: str) -> Tensor:
        tensor = tensors[key]
        return cast(key, tensor, narrow if tensor.dtype.itemsize > 2 else None)

    make: dict[str, Callable[[], Tensor]] = {}
    for key in tensors:
        stem, _, end = key.rpartition(".")
        if end == "weight" and stem in layers:
            names = (end, *format.scales, CONFIG)
            make |= {f"{stem}.{name}": partial(part, key, name) for name in names}
        else:
            make[key] = partial(kept, key)
    return LazyTensors(make)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """What a file is. `dtypes` counts stored tensors by type, `quantization` layers by format.

    `problems` says how a network differs from STAR's, and what to do with a file of a kind that
    cannot be used; "" if there is nothing to say.

    `backbone` (its name), `config`, `sampling` and `latents` are those of STAR's network, None for
    other kinds of file. `presets`: of a network with learned prompts.
    """

    path: str
    kind: str
    title: str
    format: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    quantization: dict[str, int]
    backbone: str | None
    config: dict | None
    sampling: dict | None
    latents: dict | None
    presets: tuple[str, ...]
    problems: str
    metadata: dict[str, str]

    @property
    def size(self) -> NetworkConfig:
        """Of STAR's network."""
        assert self.backbone is not None and self.config is not None
        return BACKBONES[self.backbone].config(**self.config)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        lines = [
            f"{self.path}: {self.title}",
            f"format: {self.format}, {self.bytes / 1e6:,.1f} MB",
            f"tensors: {self.tensors} ({dtypes}), {self.parameters:,} values",
        ]
        if self.quantization:
            layers = (f"{count} layers as {name}" for name, count in self.quantization.items())
            lines.append(f"quantised: {', '.join(layers)}")
        for name in ("config", "sampling"):
            if fields := getattr(self, name):
                lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in fields.items()))
        if self.presets:
            lines.append("prompts: embedded, no text encoder needed")
            lines.append(f"presets: {', '.join(self.presets)}")
        if self.problems:
            lines.append(f"problems: {self.problems}")
        lines += [f"metadata: {k}: {v}" for k, v in self.metadata.items() if k != "star"]
        return "\n".join(lines)


def describe(path: str | os.PathLike[str]) -> FileInfo:
    """Say what a checkpoint is, without loading it. Raises ValueError if it is none."""
    file = open_tensors(path)
    kind = _backbone(file).kind if "star" in file.metadata else identify(file)
    backbone = config = sampling = latents = prompts = None
    problems = [kind.advice]
    own = kind in [backbone.kind for backbone in BACKBONES.values()]
    if own or kind in (VENHANCER, VIDEO_UNET):
        described = _described(file)
        wanted = build_network(described[0], device="meta").state_dict()
        problems.insert(0, str(compare(_network_tensors(file), wanted)))
        if own:
            backbone = _backbone(file).name
            config, sampling, latents = map(asdict, described)
            prompts = _prompts(file)
    return FileInfo(
        path=str(file.path),
        kind=kind.name,
        title=kind.title,
        format=file.format,
        tensors=len(stored(file)),
        parameters=sum(tensor.numel() for tensor in file.values()),
        bytes=file.path.stat().st_size,
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in stored(file).values())),
        quantization=formats_of(file),
        backbone=backbone,
        config=config,
        sampling=sampling,
        latents=latents,
        presets=prompts.presets if prompts else (),
        problems="; ".join(filter(None, problems)),
        metadata=file.metadata,
    )


def _network_tensors(file: TensorFile) -> Mapping[str, Tensor]:
    tensors = _backbone(file).weights(file)
    if tensors is not file:
        return tensors
    return {key: tensor for key, tensor in file.items() if not key.startswith(_PROMPTS)}


def _prompts(file: TensorFile) -> LearnedPrompts | None:
    found = {
        name: file[_PROMPTS + name] for name in LearnedPrompts._fields if _PROMPTS + name in file
    }
    if not found:
        return None
    for name in ("positive", "negative"):
        if name not in found:
            missing = repr(_PROMPTS + name)
            raise ValueError(f"{file.path} is incomplete: {missing} is missing; write it again")
    return LearnedPrompts(**found)


def _backbone(file: TensorFile) -> Backbone:
    """Of a file that says it, else judged by its tensors."""
    if "star" not in file.metadata:
        return backbone_of(file)
    try:
        return BACKBONES[json.loads(file.metadata["star"]).get("backbone", "i2vgenxl")]
    except (ValueError, KeyError, AttributeError) as error:
        raise _unknown(file, error) from None


def _described(file: TensorFile) -> tuple[NetworkConfig, SamplingDefaults, LatentFormat]:
    """What the metadata says, else from shapes and STAR's."""
    backbone = _backbone(file)
    if "star" not in file.metadata:
        config = backbone.infer(file)
        return config, *backbone.published(config)
    try:
        star = json.loads(file.metadata["star"])
        return (
            backbone.config(**star["config"]),
            SamplingDefaults(**star["sampling"]),
            LatentFormat(**star.get("latents", {})),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _unknown(file, error) from None


def _unknown(file: TensorFile, error: Exception) -> ValueError:
    return ValueError(
        f"{file.path} describes itself in a way that this version does not know ({error}): "
        "update this package or write the file again"
    )
