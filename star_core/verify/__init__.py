"""Replays test vectors of the reference implementation, by family.

A case is NAME.json (what was run, tolerances) and usually NAME.safetensors (inputs, outputs,
weights). Its family is the longest known name that NAME begins with. Every family calls the
functions of the pipeline with the settings of the case, so that new cases can be replayed too.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from . import cogvideox, i2vgenxl
from .case import Case, Comparisons, load_case

Status = Literal["ok", "FAIL", "not yet", "info"]
Replay = Callable[[Case], Comparisons]
FAMILIES: dict[str, Mapping[str, Replay | None]] = {
    "what": i2vgenxl.FAMILIES,
    "case": cogvideox.FAMILIES,
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one case: its worst error and the tolerance there, or a note why there is none.

    status: "not yet" if this version does not implement the family, "info" if the case is not meant
    to be replayed.
    """

    name: str
    path: str
    status: Status
    error: float | None = None
    tolerance: float | None = None
    note: str = ""

    def __str__(self) -> str:
        numbers = ("-" if n is None else f"{n:.3g}" for n in (self.error, self.tolerance))
        return " ".join([self.status, self.name, *numbers, self.note]).rstrip()


def family_of(case: Case) -> tuple[str, Replay | None]:
    """Returns name and replay of a case's family; ValueError if it belongs to none.

    The replay is None for a family that is not implemented. Families of the two backbones share
    names; their sidecars have different keys for the description.
    """
    known = next((families for key, families in FAMILIES.items() if key in case.sidecar), {})
    names = [name for name in known if f"{case.name}_".startswith(f"{name}_")]
    if not names:
        raise ValueError("unknown family")
    family = max(names, key=len)
    return family, known[family]


def replay(path: Path) -> Result:
    """Replays the case of one sidecar; any exception becomes a FAIL with its message."""

    def result(status: Status, note: str = "", **numbers: float) -> Result:
        return Result(name=path.stem, path=str(path), status=status, note=note, **numbers)

    try:
        case = load_case(path)
        if case.sidecar.get("replay") is False:
            return result("info", case.sidecar.get("replay_note", ""))
        if isinstance(tolerance := case.sidecar.get("tolerance"), str):
            return result("info", tolerance)
        family, run_family = family_of(case)
        if run_family is None:
            return result("not yet", f"{family} is not implemented")
        with torch.no_grad():
            worst = [case.worst(comparison) for comparison in run_family(case)]
    except Exception as error:  # a case that cannot be run must not hide the others
        return result("FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}")
    failed = [pair for pair in worst if pair[0] > pair[1]]
    error, tolerance = max(failed or worst, key=lambda pair: pair[0] / (pair[1] or 1.0))
    return result("FAIL" if failed else "ok", error=error, tolerance=tolerance)


def verify(directory: str | Path) -> Iterator[Result]:
    """Yields the result of every case below a directory; ValueError if there is none."""
    paths = sorted(Path(directory).rglob("*.json"))
    if not paths:
        raise ValueError(f"no test vectors (NAME.json) below {directory}")
    return map(replay, paths)


def run(directory: str | Path, as_json: bool = False) -> int:
    """Replays the cases below a directory and prints a line for each, or one JSON object.

    Returns 1 if a case fails, else 0. ValueError if there is no case.
    """
    results = []
    for result in verify(directory):
        results.append(result)
        if not as_json:
            sys.stdout.write(f"{result}\n")
            sys.stdout.flush()
    failed = any(result.status == "FAIL" for result in results)
    if as_json:
        json.dump({"ok": not failed, "cases": [asdict(r) for r in results]}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    return int(failed)
