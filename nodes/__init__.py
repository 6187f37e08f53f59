"""ComfyUI nodes: thin adapters over star_core, and the only place that may import the host."""

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

logger = logging.getLogger(__name__)

# The only list of nodes: modules with their classes. If a module cannot be imported because a
# package is missing, its nodes are left out and the others work.
NODES = {
    "loaders": ("StarLoadModel",),
    "conditioning": ("StarAnalyzeDegradation", "StarTextEncode", "StarConditioning"),
    "denoise": (
        "StarTemporalChunks",
        "StarTiles",
        "StarGuidance",
        "StarFast",
        "StarSampling",
    ),
    "plan": ("StarPlan",),
    "decode": ("StarVAEEncode", "StarVAEDecode", "StarColorFix"),
    "restore": ("StarRestore", "StarRestoreVideo", "StarCompare"),
    "demo": ("StarDemoClip",),
    "degradation": ("StarDegrade",),
    "metrics": ("StarMetrics",),
}


class StarExtension(ComfyExtension):
    """The entry point through which the host gets the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Returns the node classes that can be imported, and logs what is missing for others."""
        from .host_files import add_own_folder
        from .host_packages import unmet

        for problem in unmet():
            logger.error("STAR %s", problem)
        add_own_folder()
        nodes = []
        for name, classes in NODES.items():
            try:
                module = importlib.import_module(f".{name}", __name__)
            except ImportError:
                # The host shows no traceback for errors in here.
                logger.exception("STAR: these nodes cannot be loaded: %s", ", ".join(classes))
                continue
            nodes += [getattr(module, class_name) for class_name in classes]
        return nodes
