"""Shared by all tests: opt-in markers, seeds, and the pack as ComfyUI loads it."""

import importlib.util
import os
import sys

import pytest
import torch
from hypothesis import settings

from tests.paths import ROOT

# One thread here and in the processes that tests start: most tensors are too small for more, and
# several tests run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A deadline would time tests; a fixed choice of examples makes a failure appear for everybody.
settings.register_profile("star", deadline=None, derandomize=True)
settings.load_profile("star")

OPT_IN = {
    "host": (lambda: "COMFYUI_DIR" in os.environ, "set COMFYUI_DIR to a ComfyUI checkout"),
    "browser": (
        lambda: (
            {"COMFYUI_DIR", "CHROMIUM"} <= os.environ.keys()
            and importlib.util.find_spec("playwright")
        ),
        "set COMFYUI_DIR and CHROMIUM, and install playwright",
    ),
    "page": (
        lambda: "CHROMIUM" in os.environ and importlib.util.find_spec("playwright"),
        "set CHROMIUM to a Chromium, and install playwright",
    ),
    "gpu": (torch.cuda.is_available, "needs a CUDA device"),
    "weights": (
        lambda: "STAR_WEIGHTS" in os.environ,
        "set STAR_WEIGHTS to the checkpoints' folder",
    ),
    "resolver": (lambda: "STAR_RESOLVER" in os.environ, "set STAR_RESOLVER=1 to ask the index"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for name, (available, reason) in OPT_IN.items():
        marked = [item for item in items if item.get_closest_marker(name)]
        if marked and not available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded():
    """Seeds the global generator, so that a test does not depend on those before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def chromium():
    """The browser that CHROMIUM names, through playwright; it asks nobody for updates."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    flags = [
        *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update"),
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pack():
    """The pack as the host loads it: by path, under a name that is no package name of ours.

    The host comes first on the path, or `import nodes` inside it would find our package.
    """
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    from comfy.cli_args import args  # pyright: ignore[reportMissingImports]

    args.cpu = not torch.cuda.is_available()
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
