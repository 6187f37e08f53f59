"""Sets everything up and runs it: `python tasks.py demo` or `python tasks.py test`.

Standard library only; the same on Linux, macOS and Windows. The first run makes a virtual
environment beside this file and installs into it, later runs start at once.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(venv: Path, constraints: str, extra: str) -> Path:
    """The Python of `venv` with this project and its optional group `extra` installed.

    A stamp, written last, tells that the installation is whole and made from these very files.
    """
    digest = hashlib.sha256(f"{ROOT} {extra}".encode())
    for name in ("pyproject.toml", constraints):
        digest.update((ROOT / name).read_bytes())
    python, stamp = python_of(venv), venv / f"installed-{extra}"
    if python.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
        return python
    if not python.exists() or not any(venv.glob("installed-*")):
        print(f"Making {venv.name}: a few minutes, once", flush=True)
        run(sys.executable, "-m", "venv", "--clear", venv)
    run(
        *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--constraint", constraints, "--editable", f".[{extra}]"),
    )
    stamp.write_text(digest.hexdigest())
    return python


def run(*command: object) -> None:
    """Runs a command in the project's folder; its failure ends this program with its code."""
    code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if code:
        sys.exit(code if code > 0 else 1)


def demo(arguments: argparse.Namespace) -> None:
    venv = ROOT / ".venv"
    extra = "dev" if (venv / "installed-dev").exists() else "metrics"  # dev includes metrics
    python = environment(venv, "constraints.txt", extra)
    run(python, "-m", "star_core", "demo", *(["--quick"] if arguments.quick else []))


def test(arguments: argparse.Namespace) -> None:
    suffix = "-oldest" if arguments.oldest else ""
    python = environment(ROOT / f".venv{suffix}", f"constraints{suffix}.txt", "dev")
    run(python, "-m", "ruff", "check", ".")
    run(python, "-m", "ruff", "format", "--check", ".")
    run(python, "-m", "pyright", "--pythonpath", python)
    # A process for each core, with one thread each: tests are too small for more.
    run(python, "-m", "pytest", "--numprocesses=auto", "--dist=worksteal")


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (this file runs before anything checks it)
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("demo", help="restore the shipped clip into out/")
    command.add_argument("--quick", action="store_true", help="fewer frames")
    command.set_defaults(do=demo)
    command = commands.add_parser("test", help="lint, formatting, types, tests")
    command.add_argument("--oldest", action="store_true", help="with the oldest packages supported")
    command.set_defaults(do=test)
    arguments = parser.parse_args()
    try:
        arguments.do(arguments)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
