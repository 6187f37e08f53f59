"""Installs what ComfyUI's Python lacks for STAR, and changes nothing that is there.

ComfyUI-Manager runs this after requirements.txt; by hand, with ComfyUI's own Python:

    python install.py

Arguments are handed on to pip, for example --dry-run.
"""

import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# Not in requirements.txt: each release of diffusers demands a huggingface_hub and a safetensors of
# its own, and pip would move ComfyUI's to the newest's. Constraints let it choose one that fits.
DIFFUSERS = "diffusers>=0.35.2"


def main(arguments: list[str]) -> int:
    wanted = ["-r", str(REQUIREMENTS)]
    found = [(d.metadata["Name"], d.version) for d in metadata.distributions()]
    there = {name: version for name, version in found if name}
    # One that is there is left alone; loading says so if it is too old.
    wanted += [] if "diffusers" in there else [DIFFUSERS]
    pip = [sys.executable, "-m", "pip", "install"]
    if find_spec("pip") is None:
        pip = ["uv", "pip", "install", "--python", sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "what-is-there.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in there.items()))
        code = subprocess.run(
            [*pip, "--constraint", str(constraints), *wanted, *arguments]
        ).returncode
    if code:
        print(
            "STAR: no version of what is missing fits the packages that are there, or the package "
            "index cannot be reached. Nothing was changed; updating ComfyUI's requirements helps."
        )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
