"""Exchange between the processes of a training run."""

from typing import Any

from torch import distributed


def gathered(items: list[Any]) -> list[Any]:
    """Returns the items of all processes in their order; every process must call this."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return items
    lists: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(lists, items)
    return [item for each in lists for item in each]
