"""Installing into ComfyUI's environment must not move the packages that ComfyUI lives on."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements.txt"
LINES = [
    line
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

# A host's environment as pip sees it: what is installed, and what those packages require.
HOST = {
    "torch": ("2.9.0+cu128", []),
    "transformers": ("4.57.6", ["huggingface-hub<1.0,>=0.34.0", "safetensors>=0.4.3"]),
    "huggingface_hub": ("0.36.0", ["requests", "tqdm>=4.42.1"]),
    "safetensors": ("0.6.2", []),
    "numpy": ("2.3.4", []),
    "requests": ("2.32.5", []),
    "tqdm": ("4.67.1", []),
    "pillow": ("12.0.0", []),
}


@pytest.fixture(scope="module")
def host_python(tmp_path_factory):
    """The Python of an environment where the host's packages seem to be installed."""
    folder = tmp_path_factory.mktemp("host")
    venv.create(folder, with_pip=True, symlinks=sys.platform != "win32")
    site = next(folder.rglob("site-packages"))
    for name, (version, requires) in HOST.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@pytest.mark.resolver
@pytest.mark.parametrize(
    "what",
    [pytest.param(["-r", str(REQUIREMENTS)], id="whole file"), *([line] for line in LINES)],
    ids=lambda what: what[-1] if isinstance(what, list) else None,
)
def test_installing_changes_nothing_that_the_host_has(host_python, tmp_path, what):
    """Line by line too: that is how ComfyUI-Manager installs."""
    report = tmp_path / "report.json"
    command = [host_python, "-m", "pip", "install", "--dry-run", "--report", report, *what]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {entry["metadata"]["name"].lower().replace("-", "_") for entry in installed}
    assert not names & HOST.keys()
