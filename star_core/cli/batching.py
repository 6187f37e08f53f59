"""`batch`: many videos, on one machine or many."""

import argparse
import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .arguments import add_json
from .progress import Progress, clock
from .upscale import add_options, ordered

if TYPE_CHECKING:
    from ..batch import Outcome, Status
    from ..upscale import RunSpec

SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts"),
    *(".wmv", ".flv", ".ogv", ".gif", ".y4m"),
)
# Options whose values are places on this machine, where they name one.
_PLACES = ("source", "out", "model", "vae", "text_encoder", "models_dir", "shots")


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "jobs",
        metavar="JOBS",
        help="a folder of videos, or a .json file: a list of jobs such as "
        '{"input": "a.mp4", "output": "a.mkv", "scale": 2}, with the options of upscale, which '
        "count for this job; those given here count for all",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="for results that are not named in JOBS: called like the input, in this folder",
    )
    parser.add_argument(
        "--format",
        choices=("mp4", "mkv", "mov"),
        default="mp4",
        help="of results in --out (default mp4)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="share the work out over a Ray cluster: its address, auto, or local for the GPUs of "
        "this machine (default where there are several and Ray is installed). The videos and "
        "models must be found in the same places on all machines",
    )
    add_options(parser)
    add_json(parser)


def run_batch(args: argparse.Namespace) -> int:
    from ..batch import on_ray, one_by_one

    jobs = _jobs(args)
    names = [Path(job["source"]).name for job in jobs]
    address = args.ray or _several_gpus()
    if address:
        sys.stderr.write(f"on the Ray cluster {address}, videos: {len(jobs)}\n")
        told = Progress(("restore",), unit=" frames")

        before: list[Status] = []

        def on_status(standing: "Status") -> None:
            if standing.total and before != [standing]:
                before[:] = [standing]
                told("restore", standing.done, standing.total)

        def on_worker(where: str) -> None:
            sys.stderr.write(f"worker on {where}\n")

        coming = on_ray(
            jobs,
            order_of,
            address=address,
            on_worker=on_worker,
            on_status=on_status,
        )
    else:
        sys.stderr.write(
            f"videos one after the other: {len(jobs)}; --ray shares them out over GPUs and "
            f"machines{'' if importlib.util.find_spec('ray') else ' (pip install ray)'}\n"
        )

        def begin(number: int) -> Progress:
            sys.stderr.write(f"{number + 1}/{len(jobs)} {names[number]}\n")
            return Progress()

        coming = one_by_one(jobs, order_of, begin)
    outcomes = []
    for outcome in coming:
        outcomes.append(outcome)
        line = f"{len(outcomes)} of {len(jobs)}: {names[outcome.number]} {outcome.state}"
        sys.stderr.write(f"{line} {outcome.reason}".strip() + "\n")
    outcomes.sort(key=lambda outcome: outcome.number)
    if args.json:
        print(json.dumps([_last_report(jobs[o.number], o) for o in outcomes]))
    else:
        print(_table(jobs, outcomes))
    return 2 if any(outcome.state == "failed" for outcome in outcomes) else 0


def order_of(job: dict[str, Any]) -> "RunSpec":
    """What a job asks for; its options are those of `upscale`, parsed."""
    run, _ = ordered(argparse.Namespace(**job))
    return run


def _several_gpus() -> str | None:
    """Whether Ray is there for the GPUs of this machine."""
    if importlib.util.find_spec("ray") is None:
        return None
    import torch

    return "local" if torch.cuda.device_count() > 1 else None


def _jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The options of each job, with places that mean the same on every machine."""
    place = Path(args.jobs)
    if place.is_dir():
        videos = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
        if not videos:
            raise ValueError(f"there is no video in {place}")
        if args.out is None:
            raise ValueError("say where the results are to go: --out FOLDER")
        said: list[Any] = [{"input": str(video)} for video in videos]
    else:
        said = _from_file(place)
    if args.out is not None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    jobs, results = [], {}
    for number, job in enumerate(said, 1):
        name = f"job {number}"
        if not isinstance(job, dict) or not isinstance(job.get("input"), str):
            raise ValueError(f'{name} must be like {{"input": "a.mp4", "output": "b.mkv"}}')
        name += f" ({Path(job['input']).name})"
        if "output" not in job and args.out is None:
            raise ValueError(f"{name} names no output: add one, or --out FOLDER")
        named = Path(args.out or "") / f"{Path(job['input']).stem}.{args.format}"
        options = _parsed(name, args, {"output": str(named), **job})
        if (before := results.setdefault(options["out"], name)) is not name:
            raise ValueError(f"{before} and {name} have the same result, {options['out']}")
        jobs.append(options)
    return jobs


def _from_file(path: Path) -> list[Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} is no folder and cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(said, list) or not said:
        raise ValueError(f"{path} must be a list of jobs, at least one")
    return said


class _Strict(argparse.ArgumentParser):
    """Raises ValueError, and takes no shortened names."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parsed(name: str, common: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """The options of a job, as `upscale` gets them; those that it does not name are the common."""
    parser = _Strict()
    add_options(parser)
    switches = {action.dest for action in parser._actions if action.nargs == 0}
    given = []
    said = {key.replace("-", "_"): value for key, value in job.items()}
    for key, value in said.items():
        if key in ("input", "output"):
            continue
        option = f"--{key.replace('_', '-')}"
        no_number = isinstance(value, list | dict) or value is None
        if no_number or (value is False and key not in switches):
            raise ValueError(f"{name}: {key} cannot be {json.dumps(value)}")
        if value is not False:
            given.append(option if value is True else f"{option}={value}")
    options = copy.copy(common)
    if "out_size" in said:
        options.scale = None
    if "scale" in said:
        options.out_size = None
    try:
        parser.parse_args(given, options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    result: dict[str, Any] = vars(options)
    result |= {key: False for key, value in said.items() if value is False}
    result |= {"source": job["input"], "out": job["output"]}
    for key in ("jobs", "ray", "format", "json", "run"):
        result.pop(key, None)
    for place in _PLACES:
        path = result[place] and Path(result[place])
        if path and (place in ("source", "out") or path.exists()):
            result[place] = str(path.absolute())
    return result


def _last_report(job: dict[str, Any], outcome: "Outcome") -> dict[str, Any]:
    return {
        "input": job["source"],
        "output": job["out"],
        "state": outcome.state,
        **({"reason": outcome.reason} if outcome.reason else {}),
        **outcome.result,
        "seconds": round(outcome.seconds, 3),
    }


def _table(jobs: list[dict[str, Any]], outcomes: "list[Outcome]") -> str:
    rows = [("video", "result", "frames", "size", "time", "")]
    for outcome in outcomes:
        job, result = jobs[outcome.number], outcome.result
        rows.append(
            (
                Path(job["source"]).name,
                Path(job["out"]).name,
                str(result.get("frames", "")),
                f"{result['width']}x{result['height']}" if result else "",
                clock(outcome.seconds) if result else "",
                outcome.state if result else f"{outcome.state} {outcome.reason}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
