"""What the pack needs of the packages in ComfyUI's Python, which it never changes itself."""

import re
import sys
from importlib import metadata

# The oldest versions that work; None for any. pyproject.toml says the same to pip, but nobody
# installs from there into ComfyUI's environment: a newer torch would be another ComfyUI.
NEEDED = {
    "torch": "2.4",
    "transformers": "4.37.2",
    "huggingface_hub": None,
    "safetensors": None,
    "einops": None,
    "torchsde": None,
    "numpy": None,
    "imageio-ffmpeg": None,
}


def unmet() -> list[str]:
    """Of each package that is missing or too old a sentence with the command that mends it."""
    told = []
    for name, oldest in NEEDED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = None
        if found is not None and (oldest is None or _release(found) >= _release(oldest)):
            continue
        wanted = f"{name} {oldest} or later" if oldest else name
        state = f"found {found}" if found else "it is not installed"
        what = f'"{name}>={oldest}"' if oldest else name
        told.append(f'needs {wanted}, {state}: run "{sys.executable}" -m pip install {what}')
    return told


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version that order releases: (2, 9, 0) of 2.9.0+cu128."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
