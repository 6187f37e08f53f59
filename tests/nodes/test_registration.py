"""The pack inside a real ComfyUI."""

import asyncio

import pytest

pytestmark = pytest.mark.host


def test_the_host_gets_an_extension_with_a_list_of_nodes(pack):
    from comfy_api.latest import ComfyExtension  # pyright: ignore[reportMissingImports]

    extension = asyncio.run(pack.comfy_entrypoint())
    assert isinstance(extension, ComfyExtension)
    assert isinstance(asyncio.run(extension.get_node_list()), list)
