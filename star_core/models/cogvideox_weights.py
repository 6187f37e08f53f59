"""Weights of STAR on CogVideoX: the network's size, conversion between namings, merging of LoRA.

Published files have the tensor names of SAT, the framework of the training; the network here has
those of diffusers. Specification of the second backbone, sections 2 and 3.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checkpoints.tensors import LazyTensors
from ..windows.tiling import Tile

PATCH = 2  # side of a patch in latents
OVERLAP = 8  # default overlap of tiles in latents


@dataclass(frozen=True, kw_only=True)
class CogVideoXConfig:
    """Size of the network; the defaults are those of CogVideoX-5B.

    in_dim: channels of the latents. context_dim, context_length: sizes d and l of the text
    embedding (b l d). dim: width of tokens. num_heads: attention heads. num_layers: blocks.
    time_dim: width of the timestep embedding. positions: rotary, or sine and cosine added to the
    tokens (CogVideoX-2B). grid: rows and columns of tokens that the network was trained on.
    """

    backbone: ClassVar = "cogvideox"
    schedule: ClassVar[Literal["scaled_linear"]] = "scaled_linear"
    hint_prior: ClassVar = 0.0

    in_dim: int = 16
    context_dim: int = 4096
    context_length: int = 226
    dim: int = 3072
    num_heads: int = 48
    num_layers: int = 42
    time_dim: int = 512
    positions: Literal["rotary", "sincos"] = "rotary"
    grid: tuple[int, int] = (30, 45)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.dim % self.num_heads or self.dim // self.num_heads % 16:
            raise ValueError(
                f"{self.dim} channels do not divide into {self.num_heads} heads of a multiple of 16"
            )
        if self.positions not in ("rotary", "sincos"):
            raise ValueError(f"positions must be rotary or sincos, got {self.positions!r}")

    @property
    def out_dim(self) -> int:
        """Channels of the velocity."""
        return self.in_dim

    @property
    def downsamplings(self) -> int:
        """1: patches need even sides of latents, just as one down-sampling would."""
        return 1

    def tiles(self, sides: tuple[int, int], tile: Tile | None) -> tuple[list[range], list[range]]:
        """Returns the rows and the columns of the tiles that latents are computed in.

        sides: (height, width) of the latents. tile: in latents; tiles never exceed the trained
        grid, which is also the size for None.
        """
        rows, columns = (
            self._tile(PATCH * trained, tile).on_grid(side, step=PATCH)
            for trained, side in zip(self.grid, sides, strict=True)
        )
        return rows, columns

    def attention_tokens(self, frames: int, height: int, width: int) -> int:
        """Returns the tokens of the longest attention over latents of a size, or over a tile."""
        return self.context_length + frames * (height // PATCH) * (width // PATCH)

    def _tile(self, trained: int, tile: Tile | None) -> Tile:
        size, overlap = (tile.size, tile.overlap) if tile else (trained, OVERLAP)
        size = min(size, trained) // PATCH * PATCH
        return Tile(size=size, overlap=min(overlap, size - PATCH))


COGVIDEOX_2B = CogVideoXConfig(dim=1920, num_heads=30, num_layers=30, positions="sincos")

# SAT's name -> diffusers' names, each with its chunks of SAT's tensor along the first dimension.
_NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "time_embed.0": {"time_embedding.linear_1": (0,)},
    "time_embed.2": {"time_embedding.linear_2": (0,)},
    "mixins.patch_embed.proj_sr": {"patch_embed.proj": (0,)},
    "mixins.patch_embed.text_proj": {"patch_embed.text_proj": (0,)},
    "transformer.final_layernorm": {"norm_final": (0,)},
    "mixins.final_layer.norm_final": {"norm_out.norm": (0,)},
    "mixins.final_layer.adaLN_modulation.1": {"norm_out.linear": (0,)},
    "mixins.final_layer.linear": {"proj_out": (0,)},
}
# The same for each block.
_BLOCK_NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "transformer.layers.{}.input_layernorm": {"norm1.norm": (0,)},
    "transformer.layers.{}.post_attention_layernorm": {"norm2.norm": (0,)},
    "transformer.layers.{}.attention.query_key_value": {
        "attn1.to_q": (0,),
        "attn1.to_k": (1,),
        "attn1.to_v": (2,),
    },
    "transformer.layers.{}.attention.dense": {"attn1.to_out.0": (0,)},
    "mixins.adaln_layer.query_layernorm_list.{}": {"attn1.norm_q": (0,)},
    "mixins.adaln_layer.key_layernorm_list.{}": {"attn1.norm_k": (0,)},
    "mixins.adaln_layer.adaLN_modulations.{}.1": {
        "norm1.linear": (0, 1, 2, 6, 7, 8),
        "norm2.linear": (3, 4, 5, 9, 10, 11),
    },
    "transformer.layers.{}.mlp.dense_h_to_4h": {"ff.net.0.proj": (0,)},
    "transformer.layers.{}.mlp.dense_4h_to_h": {"ff.net.2": (0,)},
    "transformer.layers.{}.spa_local.conv1": {"spa_local.conv1": (0,)},
    "transformer.layers.{}.temp_local.conv1": {"temp_local.conv1": (0,)},
}
_PREFIX = "model.diffusion_model."
# Other networks in the same file, and position tables, which are computed here.
_UNUSED = re.compile(
    r"conditioner\.|first_stage_model\.|mixins\.pos_embed\.|"
    r"transformer\.(position|word)_embeddings\."
)
_ROTARY, _SINCOS = "mixins.pos_embed.freqs_cos", "mixins.pos_embed.pos_embedding"


def _name_table(layers: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Yields SAT's name and diffusers' names with their chunks, without `.weight` and `.bias`."""
    yield from _NAMES.items()
    for i in range(layers):
        for theirs, ours in _BLOCK_NAMES.items():
            in_block = {f"transformer_blocks.{i}.{name}": chunks for name, chunks in ours.items()}
            yield theirs.format(i), in_block


def _is_sat(keys: Iterable[str]) -> bool:
    return any(re.match(rf"({re.escape(_PREFIX)})?(mixins|transformer)\.", key) for key in keys)


def in_diffusers_naming(file: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the network's tensors under diffusers' names, LoRA merged, computed when read.

    file: a file's tensors in either naming. Other networks and tables in a SAT file are left out;
    unknown keys are passed through, so that loading reports them.
    """
    if not _is_sat(file):
        return file
    theirs = {key.removeprefix(_PREFIX): tensor for key, tensor in file.items()}
    theirs = {key: tensor for key, tensor in theirs.items() if not _UNUSED.match(key)}
    used: set[str] = set()
    make: dict[str, Callable[[], Tensor]] = {}
    for stem, ours in _name_table(_count_layers(theirs)):
        count = sum(map(len, ours.values()))
        for end in ("weight", "bias"):
            sources = _sources(theirs, stem, end)
            if sources is None:
                continue
            used.update(sources)
            for name, chunks in ours.items():
                make[f"{name}.{end}"] = partial(_chunks, theirs, sources, chunks, count)
    make |= {key: partial(theirs.__getitem__, key) for key in theirs if key not in used}
    return LazyTensors(make)


def in_sat_naming(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the network's tensors under SAT's names, with its prefix.

    ours: all tensors under diffusers' names, with no LoRA.
    """
    layers = 1 + max(int(m[1]) for key in ours if (m := _OUR_BLOCK.match(key)))
    theirs = {}
    for stem, parts in _name_table(layers):
        for end in ("weight", "bias"):
            if f"{next(iter(parts))}.{end}" not in ours:
                continue
            tensors = {
                chunk: tensor
                for name, chunks in parts.items()
                for chunk, tensor in zip(
                    chunks, ours[f"{name}.{end}"].chunk(len(chunks)), strict=True
                )
            }
            ordered = [tensors[i] for i in range(len(tensors))]
            theirs[f"{_PREFIX}{stem}.{end}"] = torch.cat(ordered) if ordered[1:] else ordered[0]
    return theirs


def infer_config(file: Mapping[str, Tensor]) -> CogVideoXConfig:
    """Infers the size of a network from the names and shapes of its weights, in either naming.

    If weights are missing, returns the published size, so that loading reports the difference.
    """
    ours = in_diffusers_naming(file)
    keys = {key.removeprefix(_PREFIX) for key in file}
    try:
        dim, channels = ours["patch_embed.proj.weight"].shape[:2]
        head = ours["transformer_blocks.0.attn1.norm_q.weight"].shape[0]
        positions = "sincos" if dim == COGVIDEOX_2B.dim else "rotary"
        if _SINCOS in keys or _ROTARY in keys:
            positions = "rotary" if _ROTARY in keys else "sincos"
        return CogVideoXConfig(
            in_dim=channels // 2,
            context_dim=ours["patch_embed.text_proj.weight"].shape[1],
            dim=dim,
            num_heads=dim // head,
            num_layers=1 + max(int(m[1]) for key in ours if (m := _OUR_BLOCK.match(key))),
            time_dim=ours["time_embedding.linear_2.weight"].shape[0],
            positions=positions,
        )
    except (KeyError, ValueError, ZeroDivisionError):
        return CogVideoXConfig()


_OUR_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


def _count_layers(theirs: Mapping[str, Tensor]) -> int:
    matches = (re.match(r"transformer\.layers\.(\d+)\.", key) for key in theirs)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _sources(theirs: Mapping[str, Tensor], stem: str, end: str) -> list[str] | None:
    """Returns the keys of one SAT tensor: its own, or those of the original and its LoRA."""
    if f"{stem}.{end}" in theirs:
        return [f"{stem}.{end}"]
    if f"{stem}.original.{end}" not in theirs:
        return None
    keys = [f"{stem}.original.{end}"]
    if end == "weight":
        pairs = (k for k in theirs if k.startswith((f"{stem}.matrix_A.", f"{stem}.matrix_B.")))
        keys += sorted(pairs)  # A.0, A.1 ..., B.0, B.1 ...
    return keys


def _chunks(
    theirs: Mapping[str, Tensor], sources: list[str], chunks: tuple[int, ...], count: int
) -> Tensor:
    """Returns some of the `count` chunks of a SAT tensor, with its LoRA merged."""
    original, *matrices = (theirs[key] for key in sources)
    parts = original.chunk(count)
    if not matrices:
        return torch.cat([parts[i] for i in chunks]) if chunks[1:] else parts[chunks[0]]
    down, up = matrices[: len(matrices) // 2], matrices[len(matrices) // 2 :]
    return torch.cat(
        # SAT's LoRA has alpha 1.
        [
            (parts[i].float() + up[i].float() @ down[i].float() / len(down[i])).to(parts[i])
            for i in chunks
        ]
    )
