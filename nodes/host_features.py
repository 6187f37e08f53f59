"""Differences between hosts from ComfyUI v0.3.64 on, which only this module checks.

It tests for features, because forks and branches have version numbers of their own.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
from comfy_api.latest import io

from ..star_core.memory import is_out_of_memory


def schema(*, search_aliases: list[str], **fields: Any) -> io.Schema:
    """Returns a node's schema; without `search_aliases` on hosts up to 0.3.64, which lack them."""
    if "search_aliases" in inspect.signature(io.Schema).parameters:
        fields["search_aliases"] = search_aliases
    return io.Schema(**fields)


def advanced(input: io.Input) -> io.Input:
    """Marks an input as advanced, so that the frontend folds it away, and returns it.

    The mark is in `extra_dict`, because inputs of hosts up to 0.3.64 have no argument for it.
    """
    input.extra_dict["advanced"] = True
    return input


def trim_of(video: Any) -> tuple[float, float]:
    """Returns start and duration of a VIDEO in seconds of its file; duration 0 is to the end.

    Hosts up to 0.19 have this only in private attributes, those of 2025 not at all.
    """
    if hasattr(video, "get_active_trim_window"):
        return video.get_active_trim_window()
    start = getattr(video, "_VideoFromFile__start_time", 0.0)
    if start < 0:
        start = max(video._get_raw_duration() + start, 0.0)
    return start, getattr(video, "_VideoFromFile__duration", 0.0)


def crop_corner_of(video: Any) -> tuple[int, int] | None:
    """Returns column and row where the crop of a VIDEO begins, None if it is not cropped.

    Hosts of late 2026 have this in a private attribute. The size of the crop is the VIDEO's.
    """
    crop = getattr(video, "_VideoFromFile__crop", None)
    if crop is None:
        return None
    x, y, *_ = crop
    return x - x % 2, y - y % 2  # as the host rounds them


def bit_depth_of(video: Any) -> int:
    """Returns the bits per component of a VIDEO; 8 on hosts without that property."""
    return video.get_bit_depth() if hasattr(video, "get_bit_depth") else 8


def color_space_of(video: Any) -> str:
    """Returns the host's name for the colour space of a VIDEO; sRGB on hosts without one."""
    return video.get_color_space() if hasattr(video, "get_color_space") else "sRGB"


def alpha_of(components: Any) -> Any:
    """Returns the alpha channel of VideoComponents, None if there is none, as on hosts of 2025."""
    return getattr(components, "alpha", None)


def patcher_class(disable_dynamic: bool = False) -> type[comfy.model_patcher.ModelPatcher]:
    """Returns the class that manages the weights of a network made of the host's layers.

    If the host has dynamic VRAM and it is enabled, this class loads weights as they are used.
    disable_dynamic: return the plain class in any case.
    """
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


def memory_ran_out(error: Exception) -> bool:
    """Returns whether an error means that the device is out of memory.

    Newer hosts have a check of their own, which comes first: it knows the messages of several
    drivers and clears the error state that they leave.
    """
    is_oom = getattr(mm, "is_oom", None)
    return (is_oom is not None and is_oom(error)) or is_out_of_memory(error)


def check_host(part: Any, *names: str) -> None:
    """Raises RuntimeError unless a part of the host has these attributes.

    They are private, so another version may lack them; the error names the versions that work.
    """
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        owner = getattr(part, "__name__", type(part).__name__)
        raise RuntimeError(
            f"this ComfyUI has no {owner}.{missing[0]}, which STAR relies on: use a ComfyUI from "
            "v0.3.64 to v0.38, or a newer version of STAR"
        )


def lacking_for(formats: Iterable[str]) -> str:
    """Returns why this host cannot compute with weights in these quantised formats, and what to do.

    formats: names that the host uses in quantised files. Returns "" if it can.
    """
    known = comfy.ops.QUANT_ALGOS if hasattr(comfy.ops, "mixed_precision_ops") else {}
    if unknown := set(formats) - set(known):
        return (
            f"this ComfyUI does not compute with {', '.join(sorted(unknown))}: update it "
            "(float8 and nvfp4 need 0.19 or newer, int8 needs 0.27)"
        )
    layouts = [known[name]["comfy_tensor_layout"] for name in formats]
    if any(comfy.ops.get_layout_class(layout) is None for layout in layouts):
        return "ComfyUI's package comfy-kitchen is missing: install ComfyUI's requirements"
    return ""
