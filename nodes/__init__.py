"""ComfyUI nodes: thin adapters over star_core, and the only place that may import the host."""

from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]


class StarExtension(ComfyExtension):
    """The pack as the host sees it; `get_node_list` is the one flat list of its nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return []
