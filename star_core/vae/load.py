"""Loads the VAE of either backbone from a file in any naming or from a diffusers folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.kinds import VAE_COGVIDEOX, VAE_PATCH, FileKind, identify
from ..checkpoints.metadata import build_checked, check_fields, read_object
from ..checkpoints.tensors import load_into, open_tensors
from . import cogvideox, svd
from .cogvideox import CausalVAEGeometry, CausalVideoVAE
from .frame_vae import FrameGeometry, VideoVAE
from .patch import PatchGeometry, patch_vae
from .small_decoder import METADATA as DECODER_METADATA
from .small_decoder import PREFIX, VAE_METADATA, use_decoder, with_decoder
from .svd import SVDGeometry

METADATA = VAE_METADATA  # metadata key of a file for its configuration as JSON


@dataclass(frozen=True, kw_only=True)
class _Family:
    """One kind of VAE.

    diffusers_class: its `_class_name` in config.json, "" for none. geometry: the dataclass of its
    sizes. build: makes the VAE of a configuration. weights: returns a file's weights under
    diffusers' names. infer: infers the configuration from those weights, None if their shapes are
    not enough.
    """

    diffusers_class: str
    geometry: type
    build: Callable[[Mapping[str, Any]], VideoVAE | CausalVideoVAE]
    weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    infer: Callable[[Mapping[str, Tensor]], Mapping[str, Any]] | None


_SVD = _Family(
    diffusers_class="AutoencoderKLTemporalDecoder",
    geometry=SVDGeometry,
    build=svd.svd_vae,
    weights=svd.in_diffusers_naming,
    infer=svd.infer_config,
)
_FAMILIES: dict[FileKind, _Family] = {
    VAE_PATCH: _Family(
        diffusers_class="",
        geometry=PatchGeometry,
        build=patch_vae,
        weights=dict,
        infer=None,
    ),
    VAE_COGVIDEOX: _Family(
        diffusers_class="AutoencoderKLCogVideoX",
        geometry=CausalVAEGeometry,
        build=cogvideox.causal_vae,
        weights=cogvideox.in_diffusers_naming,
        infer=cogvideox.infer_config,
    ),
}


@dataclass(frozen=True, kw_only=True)
class _OpenVAE:
    """A VAE on the meta device and its weights.

    stated: whether the configuration is stated in the file or its folder, or else inferred.
    has_decoder: whether the file holds a small decoder.
    """

    vae: VideoVAE | CausalVideoVAE
    weights: Mapping[str, Tensor]
    path: Path
    stated: bool
    has_decoder: bool


def load_vae(
    path: str | os.PathLike[str],
    *,
    scale: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoVAE | CausalVideoVAE:
    """Loads the VAE of either backbone.

    path: a file, or a diffusers folder (the VAE's own, or its parent with a folder `vae`). The file
    may use diffusers' names or those of the original code, alone or in the checkpoint of a whole
    model. Its configuration comes from config.json beside it, from its metadata (JSON under
    `star_vae`), or from the shapes of its weights. If it holds a small decoder (`small_decoder`),
    that one decodes.
    scale: scaling factor of a CogVideoX VAE whose file does not state one.
    device, dtype: device and dtype of the weights.
    Raises ValueError for a file that is not such a VAE or is incomplete.
    """
    opened = _open(path)
    vae = opened.vae
    load_into(vae.model, opened.weights, device=device, dtype=dtype, name=str(opened.path))
    vae.model.eval().requires_grad_(False)
    if opened.has_decoder:
        use_decoder(vae, opened.path)
    if scale is not None and not opened.stated and isinstance(vae, CausalVideoVAE):
        vae.scaling_factor = scale
    return vae


def load_frame_vae(path: str | os.PathLike[str]) -> VideoVAE:
    """Loads a VAE that encodes frame by frame, on the CPU in float32.

    path: a file or a diffusers folder, see `load_vae`. Raises ValueError for a file that is not a
    VAE or is incomplete, and for the VAE of CogVideoX.
    """
    vae = load_vae(path)
    if not isinstance(vae, VideoVAE):
        raise ValueError(f"{path} is the VAE of CogVideoX: use one that encodes frame by frame")
    return vae


def geometry_of(
    path: str | os.PathLike[str], decoder: str | os.PathLike[str] | None = None
) -> FrameGeometry | CausalVAEGeometry:
    """Returns the sizes of a VAE without loading its weights.

    path: a file or a diffusers folder, see `load_vae`. decoder: the file of a small decoder that
    takes the place of the VAE's own, see `use_decoder`; None for that of the VAE's file. Raises
    ValueError for a file that is not a VAE, and for a decoder that does not fit it.
    """
    opened = _open(path)
    if decoder is None and opened.has_decoder:
        decoder = opened.path
    return opened.vae.geometry if decoder is None else with_decoder(opened.vae.geometry, decoder)


def vae_file(path: str | os.PathLike[str]) -> Path:
    """Returns the file with a VAE's weights.

    path: a file, which is returned, or a diffusers folder (the VAE's own, or its parent with a
    folder `vae`). A folder without weights is returned itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    ends = ("safetensors", "fp16.safetensors", "bin", "fp16.bin")
    names = [f"diffusion_pytorch_model.{end}" for end in ends]
    candidates = [inner / name for inner in (folder / "vae", folder) for name in names]
    return next((file for file in candidates if file.is_file()), folder)


def _open(path: str | os.PathLike[str]) -> _OpenVAE:
    path, file_path = Path(path), vae_file(path)
    if file_path.is_dir():
        raise ValueError(
            f"{path} contains no VAE: it needs config.json and "
            "diffusion_pytorch_model.safetensors; or name the checkpoint file itself"
        )
    config_file = file_path.with_name("config.json")
    config: Mapping[str, Any] = {}
    if config_file.is_file():
        config = read_object(config_file.read_text(encoding="utf-8"), str(config_file))
    name = config.get("_class_name")
    if path.is_dir() and name not in (_SVD.diffusers_class, "AutoencoderKLCogVideoX", None):
        raise ValueError(
            f"{path} contains a {name}, not a video VAE: use the AutoencoderKLTemporalDecoder of "
            "stable-video-diffusion-img2vid or the AutoencoderKLCogVideoX of CogVideoX"
        )
    file = open_tensors(file_path)
    kind = identify(file)
    family = _FAMILIES.get(kind, _SVD)
    weights = {
        key: tensor for key, tensor in family.weights(file).items() if not key.startswith(PREFIX)
    }
    if family is _SVD and "decoder.time_conv_out.weight" not in weights:
        raise ValueError(
            f"{path} contains no video VAE, it seems to be a {kind.title}: use the VAE of "
            "Stable Video Diffusion (vae/diffusion_pytorch_model.safetensors of "
            "stable-video-diffusion-img2vid) or a whole SVD checkpoint"
        )
    where = str(config_file)
    if name != family.diffusers_class:
        where = f"{path}, {METADATA}"
        config = read_object(file.metadata.get(METADATA, "{}"), where)
    stated = bool(config)
    if not stated:
        if family.infer is None:
            raise ValueError(
                f"{path} is a {kind.title} without its configuration ({METADATA} in the metadata): "
                "use the original file"
            )
        config = family.infer(weights)
    check_fields(family.geometry, config, where)
    with torch.device("meta"):
        vae = build_checked(lambda: family.build(config), where)
    return _OpenVAE(
        vae=vae,
        weights=weights,
        path=file_path,
        stated=stated,
        has_decoder=DECODER_METADATA in file.metadata,
    )
