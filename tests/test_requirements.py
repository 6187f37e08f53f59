"""What is installed into ComfyUI's environment, and what the pack says of what is there."""

import json
import re
import runpy
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from tests.nodes.recorder import recorded_nodes
from tests.paths import ROOT

REQUIREMENTS = ROOT / "requirements.txt"
LINES = [
    line
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

# Environments as pip sees them: what is installed, and what those packages require. Of hosts as
# they were when the first three were new, and as one made today is.
COMMON = {
    "tqdm": ("4.67.1", []),
    "pillow": ("12.0.0", []),
    "einops": ("0.8.1", []),
    "torchsde": ("0.2.6", []),
}
OLD = {
    "transformers": ("4.57.6", ["huggingface-hub<1.0,>=0.34.0", "safetensors>=0.4.3"]),
    "huggingface_hub": ("0.36.0", ["requests", "tqdm>=4.42.1"]),
    "requests": ("2.32.5", []),
    "safetensors": ("0.6.2", []),
}
NEW = {
    "transformers": ("5.24.0", ["huggingface-hub<3.0,>=1.5.0", "safetensors>=0.4.3"]),
    "huggingface_hub": ("2.4.0", ["httpx<1,>=0.23.0", "tqdm>=4.42.1"]),
    "httpx": ("0.28.1", []),
    "safetensors": ("0.8.0", []),
}
HOSTS = {
    "v0.3.64": {"torch": ("2.9.0+cu128", []), "numpy": ("2.3.4", []), **COMMON, **OLD},
    "v0.19.3": {"torch": ("2.11.0+cu130", []), "numpy": ("2.4.4", []), **COMMON, **OLD},
    "v0.28.2": {"torch": ("2.13.0+cu130", []), "numpy": ("2.4.6", []), **COMMON, **NEW},
}
DIFFUSERS = {
    "none": {},
    "old": {"diffusers": ("0.29.2", ["huggingface-hub>=0.23.2", "safetensors>=0.3.1"])},
    "newest": {"diffusers": ("0.42.1", ["huggingface-hub<3.0,>=1.23.0", "safetensors>=0.8.0"])},
}


def environment(folder: Path, packages: dict[str, tuple[str, list[str]]]) -> Path:
    """The Python of a new environment where the packages seem to be installed."""
    venv.create(folder, with_pip=True, symlinks=sys.platform != "win32")
    site = next(folder.rglob("site-packages"))
    for name, (version, requires) in packages.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@pytest.mark.resolver
@pytest.mark.parametrize("diffusers", DIFFUSERS)
@pytest.mark.parametrize("host", HOSTS)
def test_installing_changes_nothing_that_is_there(tmp_path, host, diffusers):
    """requirements.txt as a whole and line by line, as ComfyUI-Manager installs, and install.py."""
    packages = HOSTS[host] | DIFFUSERS[diffusers]
    python, report = environment(tmp_path / "venv", packages), tmp_path / "report.json"
    pip, added = [python, "-m", "pip", "install"], set()
    for command in (
        [*pip, "-r", REQUIREMENTS],
        *([*pip, line] for line in LINES),
        [python, ROOT / "install.py"],
    ):
        command = [*command, "--dry-run", "--report", report]
        subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        installed = json.loads(report.read_text(encoding="utf-8"))["install"]
        added = {entry["metadata"]["name"].lower().replace("-", "_") for entry in installed}
        assert added and not added & packages.keys()
    assert "imageio_ffmpeg" in added and ("diffusers" in added) == ("diffusers" not in packages)


@pytest.fixture
def installed(monkeypatch):
    """What versions packages are told to have; those that are not in it keep their own."""
    reported: dict[str, str | None] = {}
    version = metadata.version

    def of(name: str) -> str:
        found = reported.get(name, version(name))
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", of)
    return reported


def test_where_all_is_well_the_log_says_nothing(installed, caplog):
    installed["torch"] = "2.10.0a0+git1234"
    assert recorded_nodes.__wrapped__()
    assert not caplog.records


@pytest.mark.parametrize(
    ("package", "found", "sentence"),
    [
        ("torch", "2.3.1+cu121", 'torch 2.4 or later, found 2.3.1.cu121: run .*"torch>=2.4"'),
        ("diffusers", "0.29.2", 'diffusers 0.35.2 or later, found 0.29.2: .*"diffusers>=0.35.2"'),
        ("transformers", "4.9.0", 'transformers [0-9.]+ or later, found 4.9.0: .*"transformers>='),
        ("einops", None, r'einops, which is not installed: run ".*" ".*install\.py"'),
    ],
)
def test_loading_says_what_is_too_old_or_missing_and_the_command(
    installed, caplog, package, found, sentence
):
    installed[package] = found
    assert recorded_nodes.__wrapped__()
    (record,) = caplog.records
    assert record.levelname == "ERROR" and re.search(f"STAR needs {sentence}", record.message)


def test_the_versions_that_loading_asks_for_are_those_that_pip_is_told():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    reported = {}
    for dependency in project["dependencies"]:
        name, _, oldest = dependency.partition(">=")
        reported[name] = oldest or None
    del reported["opencv-python-headless"]  # ComfyUI does without
    assert runpy.run_path(str(ROOT / "nodes" / "host_packages.py"))["NEEDED"] == reported
