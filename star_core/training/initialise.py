"""A network to start training from, out of files that may lack what STAR adds."""

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
# The ControlNet's own parts; all others are copies of the UNet's encoder.
_OUTLETS = ("input_hint_block.", "zero_convs.", "middle_block_out.")


def start_network(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Network, ModelFile]:
    """The network of a file with official names, with what one on I2VGen-XL lacks of STAR.

    A ControlNet that is absent becomes a copy of the encoder, and what leads into and out of it
    zero, so that it changes nothing yet. A LIEM that is absent becomes zero too: half open
    everywhere, which the norm behind it takes out again. ValueError if anything else is missing.
    """
    file = open_model(path)
    network = build_network(file.config, device="meta")
    tensors = completed(file.tensors, network.state_dict())
    load_into(network, tensors, device=device, dtype=dtype, name=str(path))
    return network, file


def completed(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file with those of LIEM and ControlNet that it has none of."""
    made: dict[str, Tensor] = {}

    def zeros(keys: list[str]) -> dict[str, Tensor]:
        return {key: torch.zeros(wanted[key].shape) for key in keys}

    # All of them or none: a file that has lost a few is broken.
    parts = {
        "ControlNet": [key for key in wanted if key.startswith(_CONTROL) and not _is_liem(key)],
        "LIEM of the UNet": [k for k in wanted if _is_liem(k) and not k.startswith(_CONTROL)],
        "LIEM of the ControlNet": [k for k in wanted if _is_liem(k) and k.startswith(_CONTROL)],
    }
    absent = {
        name: keys for name, keys in parts.items() if keys and not any(k in tensors for k in keys)
    }
    for name, keys in absent.items():
        logger.info("the file has no %s: it starts neutral", name)
        if name.startswith("LIEM"):
            made |= zeros(keys)
            continue
        own = [key for key in keys if key.removeprefix(_CONTROL).startswith(_OUTLETS)]
        made |= zeros(own)
        for key in set(keys) - set(own):
            source = key.removeprefix(_CONTROL)
            if source in tensors:
                made[key] = tensors[source].clone()
    return made | dict(tensors)


def _is_liem(key: str) -> bool:
    return ".local1." in key or ".local2." in key
