"""ComfyUI nodes: thin adapters over star_core, and the only place that may import the host."""

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

logger = logging.getLogger(__name__)

# The one list of nodes: of each module its classes. A module that lacks an optional package is
# left out with its nodes, the others work.
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
    """The pack as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .host_files import add_own_folder
        from .host_packages import unmet

        for sentence in unmet():
            logger.error("STAR %s", sentence)
        add_own_folder()
        nodes = []
        for name, classes in NODES.items():
            try:
                module = importlib.import_module(f".{name}", __name__)
            except ImportError:
                # The host shows no traceback for errors in here.
                logger.exception("STAR: the nodes %s cannot be used", ", ".join(classes))
                continue
            nodes += [getattr(module, class_name) for class_name in classes]
        return nodes
