"""Checks the packages in ComfyUI's Python, which the pack itself never changes."""

import re
import sys
from importlib import metadata
from pathlib import Path

INSTALL = Path(__file__).resolve().parents[1] / "install.py"
# The oldest versions that work; None for any. pyproject.toml has the same for pip, but nobody
# should install from there into ComfyUI's environment, because it could replace ComfyUI's torch.
NEEDED = {
    "torch": "2.4",
    "diffusers": "0.35.2",
    "transformers": "4.57",
    "huggingface_hub": None,
    "safetensors": None,
    "einops": None,
    "filelock": None,
    "torchsde": None,
    "numpy": None,
    "av": "14.2",
    "imageio-ffmpeg": None,
}


def unmet() -> list[str]:
    """Returns a sentence with the command to run for each package that is missing or too old."""
    problems = []
    for name, oldest in NEEDED.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = None
        if installed is not None and (oldest is None or _release(installed) >= _release(oldest)):
            continue
        required = f"{name} {oldest} or later" if oldest else name
        if installed is None:  # install.py does not change installed packages
            command = f'"{sys.executable}" "{INSTALL}"'
            problems.append(f"needs {required}, which is not installed: run {command}")
        else:
            problems.append(
                f"needs {required}, found {installed}: run "
                f'"{sys.executable}" -m pip install "{name}>={oldest}"'
            )
    return problems


def _release(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version: (2, 9, 0) for 2.9.0+cu128."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
