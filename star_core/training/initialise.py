"""Opens a network for training from files that may lack ControlNet and LIEM."""

import logging
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones import Network, build_network
from ..checkpoints.tensors import load_into
from ..star_checkpoint import ModelFile, open_model

logger = logging.getLogger(__name__)

_CONTROL = "VideoControlNet."
# Parts that only the ControlNet has; all others are copies of the UNet's encoder.
_CONTROL_ONLY = ("input_hint_block.", "zero_convs.", "middle_block_out.")


def start_network(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Network, ModelFile]:
    """Loads a network with official names and adds the parts of STAR that the file lacks.

    A missing ControlNet becomes a copy of the encoder, with its own layers zero, so that it has no
    effect at first. The weights of a missing LIEM are zero: its gate is one half everywhere, which
    the norm after it cancels.

    Returns the network and the description of the file. ValueError if anything else is missing.
    """
    file = open_model(path)
    network = build_network(file.config, device="meta")
    tensors = completed(file.tensors, network.state_dict())
    load_into(network, tensors, device=device, dtype=dtype, name=str(path))
    return network, file


def completed(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a file with initial values for a ControlNet or LIEM that it lacks.

    expected: the tensors of a whole network by key, possibly on meta.
    """
    added: dict[str, Tensor] = {}

    def zeros(keys: list[str]) -> dict[str, Tensor]:
        return {key: torch.zeros(expected[key].shape) for key in keys}

    # A part is added only if all of it is missing: a file that lacks a few tensors is broken.
    parts = {
        "ControlNet": [key for key in expected if key.startswith(_CONTROL) and not _is_liem(key)],
        "LIEM of the UNet": [k for k in expected if _is_liem(k) and not k.startswith(_CONTROL)],
        "LIEM of the ControlNet": [k for k in expected if _is_liem(k) and k.startswith(_CONTROL)],
    }
    absent = {
        name: keys for name, keys in parts.items() if keys and not any(k in tensors for k in keys)
    }
    for name, keys in absent.items():
        logger.info("the file has no %s: it starts without effect", name)
        if name.startswith("LIEM"):
            added |= zeros(keys)
            continue
        own = [key for key in keys if key.removeprefix(_CONTROL).startswith(_CONTROL_ONLY)]
        added |= zeros(own)
        for key in set(keys) - set(own):
            source = key.removeprefix(_CONTROL)
            if source in tensors:
                added[key] = tensors[source].clone()
    return added | dict(tensors)


def _is_liem(key: str) -> bool:
    return ".local1." in key or ".local2." in key
