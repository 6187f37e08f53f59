"""Shared by the tests of the core."""

from pathlib import Path

import pytest

from tests.command_line import write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mkv", 3, 12, 16)
