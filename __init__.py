"""ComfyUI node pack: STAR video super-resolution.

Nothing is imported here until the host asks: pytest imports this file too, where there is no host.
"""


async def comfy_entrypoint():
    """ComfyUI's entry into the pack."""
    from .nodes import StarExtension

    return StarExtension()
