"""Installs the packages that ComfyUI's Python lacks for STAR, and changes no installed package.

ComfyUI-Manager runs this after requirements.txt. To run it by hand, use ComfyUI's own Python:

    python install.py

Arguments are passed to pip, for example --dry-run.
"""

import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# Not in requirements.txt: each release of diffusers requires certain versions of huggingface_hub
# and safetensors, and pip would change ComfyUI's to fit the newest. With the installed versions as
# constraints, pip chooses a diffusers that fits them.
DIFFUSERS = "diffusers>=0.35.2"


def main(arguments: list[str]) -> int:
    """Runs pip with these arguments and returns its exit code."""
    requirements = ["-r", str(REQUIREMENTS)]
    packages = [(d.metadata["Name"], d.version) for d in metadata.distributions()]
    installed = {name: version for name, version in packages if name}
    # An installed diffusers is left alone; loading the pack reports it if it is too old.
    requirements += [] if "diffusers" in installed else [DIFFUSERS]
    pip = [sys.executable, "-m", "pip", "install"]
    if find_spec("pip") is None:
        pip = ["uv", "pip", "install", "--python", sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "installed.txt")
        lines = (f"{name}=={version}\n" for name, version in installed.items())
        constraints.write_text("".join(lines))
        code = subprocess.run(
            [*pip, "--constraint", str(constraints), *requirements, *arguments]
        ).returncode
    if code:
        print(
            "STAR: no version of a missing package fits the installed ones, or the package index "
            "cannot be reached. Nothing was changed; updating ComfyUI's requirements may help."
        )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
