"""`batch`: many videos, on one machine or many."""

import argparse
import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_json, options_from_json, read_list
from .progress import Progress, clock
from .upscale import add_options, run_spec

if TYPE_CHECKING:
    from ..batch import Outcome, Status
    from ..upscale import RunSpec

SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts"),
    *(".wmv", ".flv", ".ogv", ".gif", ".y4m"),
)
# Options whose values are places on this machine, where they name one.
_PLACES = ("source", "out", "model", "vae", "decoder", "text_encoder", "models_dir", "shots")


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "jobs",
        metavar="JOBS",
        help="a folder of videos, or a .json file with a list of jobs such as "
        '{"input": "a.mp4", "output": "a.mkv", "scale": 2}, which may set any option of upscale '
        "for one job; options on the command line apply to all jobs",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="the folder for results that JOBS does not name; they are named like their inputs",
    )
    parser.add_argument(
        "--format",
        choices=("mp4", "mkv", "mov"),
        default="mp4",
        help="file format of the results in --out (default mp4)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="spread the work over a Ray cluster: its address, auto, or local for the GPUs of "
        "this machine (default where there are several and Ray is installed). Videos and models "
        "must have the same paths on all machines",
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
        reported = Progress(("restore",), unit=" frames")

        before: list[Status] = []

        def on_status(status: "Status") -> None:
            if status.total and before != [status]:
                before[:] = [status]
                reported("restore", status.done, status.total)

        def on_worker(where: str) -> None:
            sys.stderr.write(f"worker on {where}\n")

        coming = on_ray(
            jobs,
            open_run,
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

        coming = one_by_one(jobs, open_run, begin)
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


def open_run(job: dict[str, Any]) -> "RunSpec":
    """Returns the run that a job describes by the parsed options of `upscale`."""
    run, _ = run_spec(argparse.Namespace(**job))
    return run


def _several_gpus() -> str | None:
    """Returns "local" if Ray can spread work over several GPUs of this machine, else None."""
    if importlib.util.find_spec("ray") is None:
        return None
    import torch

    return "local" if torch.cuda.device_count() > 1 else None


def _jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The options of each job, with places that mean the same on every machine."""
    place = Path(args.jobs)
    if place.is_dir():
        videos = sorted(
            path
            for path in place.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not videos:
            raise ValueError(f"there is no video in {place}")
        if args.out is None:
            raise ValueError("say where the results are to go: --out FOLDER")
        entries: list[Any] = [{"input": str(video)} for video in videos]
    else:
        entries = read_list(place, "jobs")
    if args.out is not None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    jobs, results = [], {}
    for number, job in enumerate(entries, 1):
        name = f"{place.name}, job {number}"
        if not isinstance(job, dict) or not isinstance(job.get("input"), str):
            raise ValueError(f'{name} must be like {{"input": "a.mp4", "output": "b.mkv"}}')
        name += f" ({Path(job['input']).name})"
        if "output" not in job and args.out is None:
            raise ValueError(f"{name} names no output: add one, or --out FOLDER")
        named = Path(args.out or "") / f"{Path(job['input']).stem}.{args.format}"
        options = _with_options(name, args, {"output": str(named), **job})
        if (before := results.setdefault(options["out"], name)) is not name:
            raise ValueError(f"{before} and {name} have the same result, {options['out']}")
        jobs.append(options)
    return jobs


def _with_options(where: str, common: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """The options of a job as `upscale` gets them: its own, else the common ones."""
    own = {key: value for key, value in job.items() if key not in ("input", "output")}
    overrides = options_from_json(add_options, own, where)
    result: dict[str, Any] = vars(copy.copy(common))
    if "out_size" in overrides:
        result["scale"] = None
    if "scale" in overrides:
        result["out_size"] = None
    result |= overrides | {"source": job["input"], "out": job["output"]}
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
