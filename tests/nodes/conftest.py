"""A running ComfyUI, and the built-in model in one, for the tests of nodes."""

import pytest

from tests.nodes.server import Server
from tests.nodes.small_host import Host


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A live host with the pack in it, shared by the whole run."""
    with Server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")
def host(pack) -> Host:
    return Host(pack)
