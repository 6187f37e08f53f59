"""The names of a VAE's weights: how those of the original training code become diffusers'."""

import re
from collections.abc import Mapping, Sequence
from itertools import count

from torch import Tensor

PREFIX = "first_stage_model."  # of the VAE in the checkpoint of a whole model


def renamed(file: Mapping[str, Tensor], renames: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The VAE's tensors in a file, in diffusers' naming.

    renames: patterns and what takes their place, applied in order to every key. Names that are
    diffusers' already stay as they are.
    """
    if any(key.startswith(PREFIX) for key in file):
        file = {k.removeprefix(PREFIX): v for k, v in file.items() if k.startswith(PREFIX)}
    levels = len({key.split(".")[2] for key in file if key.startswith("decoder.up.")})

    def in_diffusers_order(match: re.Match[str]) -> str:
        # The originals count the decoder's blocks from the fine end, diffusers from the coarse one.
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}."

    def name(key: str) -> str:
        key = re.sub(r"^decoder\.up\.(\d+)\.", in_diffusers_order, key)
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        return key

    return {name(key): tensor for key, tensor in file.items()}


def count_of(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many keys there are that a pattern with one `{}` makes of 0, 1, 2 and so on."""
    return next(i for i in count() if pattern.format(i) not in tensors)
