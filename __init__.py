"""ComfyUI node pack: STAR video super-resolution.

Nothing is imported before the host calls the entry point, because pytest imports this file without
a host.
"""

WEB_DIRECTORY = "./web"  # help pages and scripts, which the host serves


async def comfy_entrypoint():
    """Returns the extension; ComfyUI calls this when it loads the pack."""
    from .nodes import StarExtension

    return StarExtension()
