"""The weights of STAR on CogVideoX: size of the network, names in either naming, LoRA.

Published files are in the naming of SAT, in which it was trained; here the weights keep diffusers'
names. Specification of the second backbone, sections 2 and 3.
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

PATCH = 2  # latents a side
OVERLAP = 8  # latents that neighbouring tiles share where nobody says how many


@dataclass(frozen=True, kw_only=True)
class CogVideoXConfig:
    """Size of the network; the defaults are those of CogVideoX-5B.

    in_dim: channels of the latents. context_dim, context_length: of the text embedding (b l d).
    dim, num_heads, num_layers, time_dim: width of tokens, heads, blocks, timestep embedding.
    positions: rotary, or sine and cosine added to the tokens (CogVideoX-2B). grid: rows and columns
    of tokens that it was trained on.
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
                f"{self.num_heads} heads do not share {self.dim} channels in multiples of 16"
            )
        if self.positions not in ("rotary", "sincos"):
            raise ValueError(f"positions are rotary or sincos, got {self.positions!r}")

    @property
    def out_dim(self) -> int:
        return self.in_dim

    @property
    def downsamplings(self) -> int:
        """Sides of latents are multiples of 2, the size of a patch, as of one down-sampling."""
        return 1

    def tiles(self, sides: tuple[int, int], tile: Tile | None) -> tuple[list[range], list[range]]:
        """Rows and columns of latents (height, width) that are worked on together.

        No more than it was trained on, and of `tile` where that is smaller.
        """
        rows, columns = (
            self._tile(PATCH * trained, tile).on_grid(side, step=PATCH)
            for trained, side in zip(self.grid, sides, strict=True)
        )
        return rows, columns

    def _tile(self, trained: int, tile: Tile | None) -> Tile:
        size, overlap = (tile.size, tile.overlap) if tile else (trained, OVERLAP)
        size = min(size, trained) // PATCH * PATCH
        return Tile(size=size, overlap=min(overlap, size - PATCH))


COGVIDEOX_2B = CogVideoXConfig(dim=1920, num_heads=30, num_layers=30, positions="sincos")

# SAT's name -> diffusers' names, each with the chunks of SAT's tensor (first dimension) it holds.
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
# Other networks in the same file, and tables that are computed here.
_UNUSED = re.compile(
    r"conditioner\.|first_stage_model\.|mixins\.pos_embed\.|"
    r"transformer\.(position|word)_embeddings\."
)
_ROTARY, _SINCOS = "mixins.pos_embed.freqs_cos", "mixins.pos_embed.pos_embedding"


def names(layers: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """SAT's name and diffusers' names with their chunks, without `.weight` and `.bias`."""
    yield from _NAMES.items()
    for i in range(layers):
        for theirs, ours in _BLOCK_NAMES.items():
            in_block = {f"transformer_blocks.{i}.{name}": chunks for name, chunks in ours.items()}
            yield theirs.format(i), in_block


def is_sat(keys: Iterable[str]) -> bool:
    return any(re.match(rf"({re.escape(_PREFIX)})?(mixins|transformer)\.", key) for key in keys)


def in_diffusers_naming(file: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The network's tensors of a file in either naming, LoRA merged, made one by one.

    Other networks and tables in a file of SAT's are left out; keys that are not known stay as they
    are, so that loading names them.
    """
    if not is_sat(file):
        return file
    theirs = {key.removeprefix(_PREFIX): tensor for key, tensor in file.items()}
    theirs = {key: tensor for key, tensor in theirs.items() if not _UNUSED.match(key)}
    used: set[str] = set()
    make: dict[str, Callable[[], Tensor]] = {}
    for stem, ours in names(_layers(theirs)):
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
    """The inverse of `in_diffusers_naming`, with SAT's prefix: the network's tensors alone."""
    layers = 1 + max(int(m[1]) for key in ours if (m := _OUR_BLOCK.match(key)))
    theirs = {}
    for stem, parts in names(layers):
        for end in ("weight", "bias"):
            if f"{next(iter(parts))}.{end}" not in ours:
                continue
            pieces = {
                chunk: piece
                for name, chunks in parts.items()
                for chunk, piece in zip(
                    chunks, ours[f"{name}.{end}"].chunk(len(chunks)), strict=True
                )
            }
            ordered = [pieces[i] for i in range(len(pieces))]
            theirs[f"{_PREFIX}{stem}.{end}"] = torch.cat(ordered) if ordered[1:] else ordered[0]
    return theirs


def infer_config(file: Mapping[str, Tensor]) -> CogVideoXConfig:
    """Size of a network whose file does not state it, from the names and shapes of its weights.

    Where they do not tell, the published size is returned: comparing with it says what is wrong.
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


def _layers(theirs: Mapping[str, Tensor]) -> int:
    found = (re.match(r"transformer\.layers\.(\d+)\.", key) for key in theirs)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _sources(theirs: Mapping[str, Tensor], stem: str, end: str) -> list[str] | None:
    """Keys that a tensor of SAT's is made of: itself, or the original and its LoRA matrices."""
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
    """Some of `count` chunks of SAT's tensor."""
    original, *matrices = (theirs[key] for key in sources)
    pieces = original.chunk(count)
    if not matrices:
        return torch.cat([pieces[i] for i in chunks]) if chunks[1:] else pieces[chunks[0]]
    down, up = matrices[: len(matrices) // 2], matrices[len(matrices) // 2 :]
    return torch.cat(
        # SAT's LoRA has alpha 1.
        [
            (pieces[i].float() + up[i].float() @ down[i].float() / len(down[i])).to(pieces[i])
            for i in chunks
        ]
    )
