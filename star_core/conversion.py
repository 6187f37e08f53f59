"""Converts checkpoints to safetensors, changes their types, and quantises STAR's networks."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .backbones import build_network, identify_backbone
from .checkpoints.kinds import identify
from .checkpoints.quantization import CONFIG, Format, quantized, stored, usual_type
from .checkpoints.tensors import (
    LazyTensors,
    TensorFile,
    cast,
    compare,
    open_tensors,
    write_tensors,
)
from .star_checkpoint import network_settings, self_description


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: torch.dtype | Format | None = None,
    *,
    shift: float | None = None,
    latent_scale: float | None = None,
    overwrite: bool = False,
) -> None:
    """Writes any checkpoint as safetensors, with one tensor in memory at a time.

    Keys, metadata and tensors that are not floating-point stay as they are. STAR's networks on
    CogVideoX get diffusers' names and a self-describing file, and their LoRA is merged.

    dtype: of floating-point tensors: float16, bfloat16, float32, or None to keep each tensor's. A
    format of `quantization.WRITTEN` quantises the layers that `quantized_layers` lists in a network
    of STAR's; other tensors that are wider than 16 bits become float16.
    shift, latent_scale: the noise schedule's shift and the latents' scale with which a network on
    CogVideoX is to be used; None keeps the file's. overwrite: whether `destination` may exist.
    Raises ValueError for an unreadable source, an existing destination unless `overwrite`, values
    beyond the range of `dtype`, a network on CogVideoX with missing or unexpected tensors, and a
    file to be quantised that is not a network of STAR's.
    """
    if not isinstance(dtype, Format) and dtype not in (
        None,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ):
        raise ValueError(f"weights cannot be {dtype}: choose float16, bfloat16 or float32")
    if (
        Path(destination).exists()
        and Path(source).exists()
        and os.path.samefile(source, destination)
    ):
        raise ValueError(f"{destination} is the source itself: choose another name")
    file = open_tensors(source)
    tensors, metadata = file, file.metadata
    backbone = identify_backbone(file)
    weights = backbone.weights(file)
    if (shift or latent_scale) and not backbone.has_shift:
        raise ValueError(
            f"{source} is not a network on CogVideoX: leave out shift and latent scale"
        )
    if weights is not file or shift or latent_scale:
        config, sampling, latents = network_settings(file)
        sampling = replace(sampling, shift=shift or sampling.shift)
        latents = replace(latents, scale=latent_scale or latents.scale)
        differences = compare(weights, build_network(config, device="meta").state_dict())
        if str(differences):
            raise ValueError(f"{source} is not a complete {backbone.kind.title}: {differences}")
        tensors = weights
        metadata = {**metadata, "star": self_description(config, sampling, latents)}
    if isinstance(dtype, Format):
        tensors, dtype = _quantized(file, tensors, dtype), None
    elif dtype is None:
        tensors = stored(tensors) if tensors is file else tensors
    write_tensors(destination, tensors, dtype=dtype, metadata=metadata, overwrite=overwrite)


def quantized_layers(network: nn.Module, format: Format) -> list[str]:
    """Returns the names of the layers of a network that `convert` quantises.

    They are the linear layers of attention and feed-forward in the transformer blocks: ComfyUI can
    compute with them, and they tolerate the loss of precision. Norms and their modulation, LIEM,
    embeddings, and the first and last layers are not quantised.
    """
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and "transformer_blocks." in name
        and not re.search(r"norm|local", name)
        and format.fits(layer.weight.shape)
    ]


def _quantized(file: TensorFile, tensors: Mapping[str, Tensor], format: Format) -> LazyTensors:
    """Returns the tensors of STAR's network with its layers quantised, each computed on access."""
    network = build_network(network_settings(file)[0], device="meta")
    differences = compare(tensors, network.state_dict())
    if differences.missing or differences.mismatched:
        raise ValueError(
            f"{file.path} is not a complete network of STAR's, and only those are quantised: "
            f"{differences}. It seems to be a {identify(file).title}"
        )
    layers = set(quantized_layers(network, format))
    usual = usual_type(file.values())
    narrow = usual if usual.itemsize == 2 else torch.float16

    @lru_cache(1)  # the parts of a layer are accessed one after the other
    def parts(key: str) -> dict[str, Tensor]:
        return quantized(cast(key, tensors[key], torch.float32), format)

    def part(key: str, name: str) -> Tensor:
        return parts(key)[name]

    def unquantized(key: str) -> Tensor:
        tensor = tensors[key]
        return cast(key, tensor, narrow if tensor.dtype.itemsize > 2 else None)

    make: dict[str, Callable[[], Tensor]] = {}
    for key in tensors:
        stem, _, end = key.rpartition(".")
        if end == "weight" and stem in layers:
            names = (end, *format.scales, CONFIG)
            make |= {f"{stem}.{name}": partial(part, key, name) for name in names}
        else:
            make[key] = partial(unquantized, key)
    return LazyTensors(make)
