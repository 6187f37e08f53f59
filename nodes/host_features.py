"""What some hosts have and others lack: asked of the host itself, never of its version."""

import inspect
from typing import Any

from comfy_api.latest import io


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
