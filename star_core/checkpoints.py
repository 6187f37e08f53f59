"""Model files of this project and of STAR: told apart, loaded, written, converted.

A file is self-describing if its safetensors metadata has the key `star`: JSON with `config`, the
fields of `UNetConfig`, `sampling`, those of `SamplingDefaults`, and `latents`, those of
`LatentFormat`. The tensors `prompts.positive` and `prompts.negative` (1 l d) stand for the text
embeddings of a model without text encoder. STAR's published files have none of these; they are
full-size and sampled as `SamplingDefaults` says.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backbones import SD_LATENTS, LatentFormat, SamplingDefaults
from .known_files import STAR_I2VGENXL, VENHANCER, VIDEO_UNET, identify
from .models.attention import Attention, scaled_dot_product
from .models.slicing import Slicing
from .models.unet import ControlledVideoUNet, UNetConfig
from .tensor_files import TensorFile, compare, load_into, open_tensors, write_tensors

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


class LearnedPrompts(NamedTuple):
    """Embeddings (1 l d) that take the place of encoded prompts."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """What a network's file holds: `tensors` are those of the network, still memory-mapped."""

    path: Path
    config: UNetConfig
    sampling: SamplingDefaults
    latents: LatentFormat
    prompts: LearnedPrompts | None
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StarModel:
    """A network ready for sampling, and what its file says about itself."""

    network: ControlledVideoUNet
    config: UNetConfig
    sampling: SamplingDefaults
    prompts: LearnedPrompts | None
    latents: LatentFormat = SD_LATENTS


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """What a file of STAR's network, published or self-describing, says and holds.

    Raises ValueError for a file that is unreadable; what it lacks shows when it is loaded.
    """
    file = open_tensors(path)
    config, sampling, latents = _described(file)
    return ModelFile(
        path=file.path,
        config=config,
        sampling=sampling,
        latents=latents,
        prompts=_prompts(file),
        tensors=_network_tensors(file),
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
    network = ControlledVideoUNet(
        file.config, operations=operations, attention=attention, device="meta"
    )
    load_into(network, file.tensors, device=device, dtype=dtype, name=str(file.path))
    network.eval().requires_grad_(False)
    network.slicing = Slicing()
    return StarModel(
        network=network,
        config=file.config,
        sampling=file.sampling,
        prompts=file.prompts
        and LearnedPrompts(*(prompt.to(device=device, dtype=dtype) for prompt in file.prompts)),
        latents=file.latents,
    )


def save_model(
    path: str | os.PathLike[str],
    network: ControlledVideoUNet,
    *,
    sampling: SamplingDefaults,
    latents: LatentFormat = SD_LATENTS,
    prompts: LearnedPrompts | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a self-describing file that `load_model` reads; further metadata is added to it."""
    star = {
        "config": asdict(network.config),
        "sampling": asdict(sampling),
        "latents": asdict(latents),
    }
    tensors = network.state_dict()
    if prompts is not None:
        tensors |= {_PROMPTS + name: value for name, value in prompts._asdict().items()}
    write_tensors(
        path,
        tensors,
        dtype=dtype,
        metadata={**(metadata or {}), "star": json.dumps(star)},
        overwrite=overwrite,
    )


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write any checkpoint as safetensors, floating-point tensors as float16, bfloat16 or float32.

    dtype: None keeps each tensor's. Keys and metadata stay, and so do other types of tensors. One
    tensor at a time is in memory.
    Raises ValueError for an unreadable source, an existing destination unless `overwrite`, and
    values that `dtype` cannot hold.
    """
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{dtype} is not a type for weights: choose float16, bfloat16 or float32")
    if (
        Path(destination).exists()
        and Path(source).exists()
        and os.path.samefile(source, destination)
    ):
        raise ValueError(f"{destination} is the source itself: choose another name")
    file = open_tensors(source)
    write_tensors(destination, file, dtype=dtype, metadata=file.metadata, overwrite=overwrite)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """What a file is. `dtypes` counts tensors by type.

    `problems` says how a network differs from STAR's, and what to do with a file of a kind that
    cannot be used; "" if there is nothing to say.

    `config` and `sampling` are those of STAR's network, None for other kinds of file.
    """

    path: str
    kind: str
    title: str
    format: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    config: dict | None
    sampling: dict | None
    prompts: bool
    problems: str
    metadata: dict[str, str]

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        lines = [
            f"{self.path}: {self.title}",
            f"format: {self.format}, {self.bytes / 1e6:,.1f} MB",
            f"tensors: {self.tensors} ({dtypes}), {self.parameters:,} values",
        ]
        for name in ("config", "sampling"):
            if fields := getattr(self, name):
                lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in fields.items()))
        if self.prompts:
            lines.append("prompts: embedded, no text encoder needed")
        if self.problems:
            lines.append(f"problems: {self.problems}")
        lines += [f"metadata: {k}: {v}" for k, v in self.metadata.items() if k != "star"]
        return "\n".join(lines)


def describe(path: str | os.PathLike[str]) -> FileInfo:
    """Say what a checkpoint is, without loading it. Raises ValueError if it is none."""
    file = open_tensors(path)
    kind = STAR_I2VGENXL if "star" in file.metadata else identify(file)
    config = sampling = None
    problems = [kind.advice]
    if kind in (STAR_I2VGENXL, VENHANCER, VIDEO_UNET):
        described = _described(file)
        wanted = ControlledVideoUNet(described[0], device="meta").state_dict()
        problems.insert(0, str(compare(_network_tensors(file), wanted)))
        if kind is STAR_I2VGENXL:
            config, sampling = map(asdict, described[:2])
    return FileInfo(
        path=str(file.path),
        kind=kind.name,
        title=kind.title,
        format=file.format,
        tensors=len(file),
        parameters=sum(tensor.numel() for tensor in file.values()),
        bytes=file.path.stat().st_size,
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in file.values())),
        config=config,
        sampling=sampling,
        prompts=_PROMPTS + "positive" in file,
        problems="; ".join(filter(None, problems)),
        metadata=file.metadata,
    )


def _network_tensors(file: TensorFile) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in file.items() if not key.startswith(_PROMPTS)}


def _prompts(file: TensorFile) -> LearnedPrompts | None:
    keys = [_PROMPTS + name for name in LearnedPrompts._fields]
    if not any(key in file for key in keys):
        return None
    if missing := [key for key in keys if key not in file]:
        raise ValueError(f"{file.path} is incomplete: {missing[0]!r} is missing; write it again")
    return LearnedPrompts(*(file[key] for key in keys))


def _described(file: TensorFile) -> tuple[UNetConfig, SamplingDefaults, LatentFormat]:
    """What the metadata says, else from shapes and STAR's."""
    if "star" not in file.metadata:
        return infer_config(file), SamplingDefaults(), LatentFormat()
    try:
        star = json.loads(file.metadata["star"])
        return (
            UNetConfig(**star["config"]),
            SamplingDefaults(**star["sampling"]),
            LatentFormat(**star.get("latents", {})),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file.path} describes itself in a way that this version does not know ({error}): "
            "update this package or write the file again"
        ) from None


def infer_config(tensors: Mapping[str, Tensor]) -> UNetConfig:
    """Configuration of a network whose file does not state it, from the shapes of its weights.

    What shapes do not tell (head_dim, norm_groups, dropout) is as published. Where the keys that
    tell it are missing, the published size is returned: comparing with it says what is wrong.
    """
    levels: list[list[int]] = [[]]  # of each resolution, the indices of its blocks
    for index in count(1):
        if f"input_blocks.{index}.op.weight" in tensors:
            levels.append([])
        elif f"input_blocks.{index}.0.out_layers.3.weight" in tensors:
            levels[-1].append(index)
        else:
            break
    try:
        dim, in_dim = tensors["input_blocks.0.0.weight"].shape[:2]
        widths = [
            tensors[f"input_blocks.{blocks[0]}.0.out_layers.3.weight"].shape[0] for blocks in levels
        ]
        inner = tensors["input_blocks.0.1.proj_in.weight"].shape[0]
        if any(size % UNetConfig.head_dim for size in (inner, *widths)):
            return UNetConfig()
        return UNetConfig(
            in_dim=in_dim,
            out_dim=tensors["out.2.weight"].shape[0],
            dim=dim,
            context_dim=tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            dim_mult=tuple(width // dim for width in widths),
            num_heads=inner // UNetConfig.head_dim,
            num_res_blocks=len(levels[0]),
            attn_scales=tuple(
                0.5**level
                for level, blocks in enumerate(levels)
                if f"input_blocks.{blocks[0]}.1.norm.weight" in tensors
            ),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return UNetConfig()
