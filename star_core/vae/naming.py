"""Converts the names of a VAE's weights from the original training code's to diffusers'."""

import re
from collections.abc import Mapping, Sequence
from itertools import count

from torch import Tensor

PREFIX = "first_stage_model."  # prefix of the VAE in the checkpoint of a whole model


def renamed(file: Mapping[str, Tensor], renames: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Returns the VAE's tensors in a file under diffusers' names.

    renames: regular expressions and their replacements, applied in order to every key. They must
    not match names of diffusers.
    """
    if any(key.startswith(PREFIX) for key in file):
        file = {k.removeprefix(PREFIX): v for k, v in file.items() if k.startswith(PREFIX)}
    levels = len({key.split(".")[2] for key in file if key.startswith("decoder.up.")})

    def in_diffusers_order(match: re.Match[str]) -> str:
        # The original counts the decoder's levels from fine to coarse, diffusers the other way.
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}."

    def name(key: str) -> str:
        key = re.sub(r"^decoder\.up\.(\d+)\.", in_diffusers_order, key)
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        return key

    return {name(key): tensor for key, tensor in file.items()}


def count_of(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Returns how many of the keys `pattern.format(0)`, `pattern.format(1)`, ... exist in a row."""
    return next(i for i in count() if pattern.format(i) not in tensors)
