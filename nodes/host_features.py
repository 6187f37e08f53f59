"""What a host has or lacks, from ComfyUI v0.3.64 on: asked of the host itself, and only here.

Version numbers say nothing, because forks and branches count in their own way.
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
    """A node's schema. Hosts up to 0.3.64 have no `search_aliases`, which are left out there."""
    if "search_aliases" in inspect.signature(io.Schema).parameters:
        fields["search_aliases"] = search_aliases
    return io.Schema(**fields)


def advanced(input: io.Input) -> io.Input:
    """An input for experts, which the frontend folds away.

    In the `extra_dict`, because hosts up to 0.3.64 take no argument of that name.
    """
    input.extra_dict["advanced"] = True
    return input


def trim_of(video: Any) -> tuple[float, float]:
    """Start and duration of a VIDEO in seconds of its file's timestamps; 0 lasts to the end.

    Hosts up to 0.19 keep to themselves what those of 2025 do not have.
    """
    if hasattr(video, "get_active_trim_window"):
        return video.get_active_trim_window()
    start = getattr(video, "_VideoFromFile__start_time", 0.0)
    if start < 0:
        start = max(video._get_raw_duration() + start, 0.0)
    return start, getattr(video, "_VideoFromFile__duration", 0.0)


def crop_corner_of(video: Any) -> tuple[int, int] | None:
    """Column and row where the crop of a VIDEO begins; its size is that of the VIDEO.

    Hosts of late 2026 crop, and keep it to themselves.
    """
    crop = getattr(video, "_VideoFromFile__crop", None)
    if crop is None:
        return None
    x, y, *_ = crop
    return x - x % 2, y - y % 2  # as the host rounds them


def bit_depth_of(video: Any) -> int:
    """Bits of a component that a VIDEO is to be stored with; 8 where hosts know nothing else."""
    return video.get_bit_depth() if hasattr(video, "get_bit_depth") else 8


def color_space_of(video: Any) -> str:
    """In the host's words; sRGB where hosts know nothing else."""
    return video.get_color_space() if hasattr(video, "get_color_space") else "sRGB"


def alpha_of(components: Any) -> Any:
    """Opacity beside the images of VideoComponents, None without; hosts of 2025 have no such."""
    return getattr(components, "alpha", None)


def patcher_class(disable_dynamic: bool = False) -> type[comfy.model_patcher.ModelPatcher]:
    """The class that keeps the weights of a network made of the host's layers.

    Where the host has dynamic VRAM and has switched it on, the one that loads weights as they are
    used. disable_dynamic: the plain one all the same.
    """
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


def memory_ran_out(error: Exception) -> bool:
    """Whether an error says that the device's memory is full.

    Newer hosts are told first: drivers report it in several ways, and leave an error behind that
    the host clears away.
    """
    asked = getattr(mm, "is_oom", None)
    return (asked is not None and asked(error)) or is_out_of_memory(error)


def check_host(part: Any, *names: str) -> None:
    """Raises RuntimeError unless a part of the host has these attributes, which are private there.

    The error says which hosts have them.
    """
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        owner = getattr(part, "__name__", type(part).__name__)
        raise RuntimeError(
            f"this ComfyUI has no {owner}.{missing[0]}, which STAR relies on: use a ComfyUI from "
            "v0.3.64 to v0.38, or a newer version of STAR"
        )


def lacking_for(formats: Iterable[str]) -> str:
    """What this host lacks to compute with weights quantised in these formats of its own, and the
    cure; "" if it lacks nothing."""
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
