"""What the pack needs of the packages in ComfyUI's Python, which it never changes itself."""

import re
import sys
from importlib import metadata
from pathlib import Path

INSTALL = Path(__file__).resolve().parents[1] / "install.py"
# The oldest versions that work; None for any. pyproject.toml says the same to pip, but nobody
# installs from there into ComfyUI's environment: a newer torch would be another ComfyUI.
NEEDED = {
    "torch": "2.4",
    "diffusers": "0.35.2",
    "transformers": "4.57",
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
        if found is None:  # install.py moves nothing that is there
            told.append(f'needs {wanted}, it is not installed: run "{sys.executable}" "{INSTALL}"')
        else:
            told.append(
                f"needs {wanted}, found {found}: run "
                f'"{sys.executable}" -m pip install "{name}>={oldest}"'
            )
    return told


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version that order releases: (2, 9, 0) of 2.9.0+cu128."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
