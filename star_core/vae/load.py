"""Loads the VAE of either backbone, from a file in any naming or from diffusers' folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.kinds import VAE_COGVIDEOX, VAE_PATCH, FileKind, identify
from ..checkpoints.tensors import load_into, open_tensors
from . import cogvideox, svd
from .cogvideox import CausalVAEGeometry, CausalVideoVAE
from .frame_vae import FrameGeometry, VideoVAE
from .patch import patch_vae

METADATA = "star_vae"  # of a file: its configuration as JSON


@dataclass(frozen=True, kw_only=True)
class _Family:
    """One kind of VAE. diffusers_class: in the config.json of its folder. build: the VAE of a
    configuration. weights: those of a file in diffusers' naming. infer: what their shapes tell of
    the configuration, None where they do not tell enough."""

    diffusers_class: str
    build: Callable[[Mapping[str, Any]], VideoVAE | CausalVideoVAE]
    weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    infer: Callable[[Mapping[str, Tensor]], Mapping[str, Any]] | None


_SVD = _Family(
    diffusers_class="AutoencoderKLTemporalDecoder",
    build=svd.svd_vae,
    weights=svd.in_diffusers_naming,
    infer=svd.infer_config,
)
_FAMILIES: dict[FileKind, _Family] = {
    VAE_PATCH: _Family(
        diffusers_class="",
        build=patch_vae,
        weights=dict,
        infer=None,
    ),
    VAE_COGVIDEOX: _Family(
        diffusers_class="AutoencoderKLCogVideoX",
        build=cogvideox.causal_vae,
        weights=cogvideox.in_diffusers_naming,
        infer=cogvideox.infer_config,
    ),
}


@dataclass(frozen=True, kw_only=True)
class _OpenVAE:
    """A VAE on meta, with the weights that belong into it. stated: whether the file or its folder
    states the configuration, which otherwise follows from shapes."""

    vae: VideoVAE | CausalVideoVAE
    weights: Mapping[str, Tensor]
    path: Path
    stated: bool


def load_vae(
    path: str | os.PathLike[str],
    *,
    scale: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoVAE | CausalVideoVAE:
    """Loads the VAE of either backbone from a file, or from diffusers' folder (the VAE's own or the
    one above `vae`).

    The file may be in diffusers' naming or in that of the original code, alone or inside the
    checkpoint of a whole model. Its configuration is that of config.json beside it, of its metadata
    (JSON under `star_vae`), or inferred from the shapes.
    scale: the scaling factor of a VAE of CogVideoX whose file does not state one.
    device, dtype: of the weights. ValueError for a file that is no such VAE or is incomplete.
    """
    opened = _open(path)
    vae = opened.vae
    load_into(vae.model, opened.weights, device=device, dtype=dtype, name=str(opened.path))
    vae.model.eval().requires_grad_(False)
    if scale is not None and not opened.stated and isinstance(vae, CausalVideoVAE):
        vae.scaling_factor = scale
    return vae


def load_frame_vae(path: str | os.PathLike[str]) -> VideoVAE:
    """As `load_vae`, on the CPU in float32; ValueError for the VAE of CogVideoX too."""
    vae = load_vae(path)
    if not isinstance(vae, VideoVAE):
        raise ValueError(f"{path} is the VAE of CogVideoX: name one that encodes frame by frame")
    return vae


def geometry_of(path: str | os.PathLike[str]) -> FrameGeometry | CausalVAEGeometry:
    """The sizes of a VAE, without loading its weights. ValueError as in `load_vae`."""
    return _open(path).vae.geometry


def vae_file(path: str | os.PathLike[str]) -> Path:
    """The weights in diffusers' folder (the VAE's own or the one above `vae`), or the file itself.

    A folder that holds no weights is returned as it is.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    ends = ("safetensors", "fp16.safetensors", "bin", "fp16.bin")
    names = [f"diffusion_pytorch_model.{end}" for end in ends]
    places = [inner / name for inner in (folder / "vae", folder) for name in names]
    return next((place for place in places if place.is_file()), folder)


def _open(path: str | os.PathLike[str]) -> _OpenVAE:
    path, file_path = Path(path), vae_file(path)
    if file_path.is_dir():
        raise ValueError(
            f"{path} holds no VAE: it needs config.json and diffusion_pytorch_model.safetensors, "
            "or name the checkpoint file itself"
        )
    beside = file_path.with_name("config.json")
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    name = config.get("_class_name")
    if path.is_dir() and name not in (_SVD.diffusers_class, "AutoencoderKLCogVideoX", None):
        raise ValueError(
            f"{path} holds a {name}, not a video VAE: use the AutoencoderKLTemporalDecoder of "
            "stable-video-diffusion-img2vid or the AutoencoderKLCogVideoX of CogVideoX"
        )
    file = open_tensors(file_path)
    kind = identify(file)
    family = _FAMILIES.get(kind, _SVD)
    weights = family.weights(file)
    if family is _SVD and "decoder.time_conv_out.weight" not in weights:
        raise ValueError(
            f"{path} has no video VAE, it seems to be a {kind.title}: use the VAE of "
            "Stable Video Diffusion (vae/diffusion_pytorch_model.safetensors of "
            "stable-video-diffusion-img2vid) or a whole SVD checkpoint"
        )
    stated = (
        config if name == family.diffusers_class else json.loads(file.metadata.get(METADATA, "{}"))
    )
    config = stated
    if not stated:
        if family.infer is None:
            raise ValueError(
                f"{path} is a {kind.title} without its configuration ({METADATA} in the metadata): "
                "take the file as it was written"
            )
        config = family.infer(weights)
    with torch.device("meta"):
        vae = family.build(config)
    return _OpenVAE(vae=vae, weights=weights, path=file_path, stated=bool(stated))
