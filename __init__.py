"""ComfyUI node pack: STAR video super-resolution.

Nothing is imported here until the host asks: pytest imports this file too, where there is no host.
"""

WEB_DIRECTORY = "./web"  # help pages and a script, which the host serves


async def comfy_entrypoint():
    """ComfyUI's entry into the pack."""
    from .nodes import StarExtension

    return StarExtension()
