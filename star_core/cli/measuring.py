"""`demo`, `verify`, `bench`: how well and how fast it works here."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from .arguments import add_compute, add_json, compute
from .progress import Progress


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="restore a few frames only")
    parser.add_argument(
        "--out", default="out", metavar="FOLDER", help="the folder for the results (default out)"
    )
    parser.add_argument(
        "--remake",
        metavar="CITYCC0.MPG",
        help="make the shipped clips again from the film that they were cut from",
    )
    add_compute(parser)
    add_json(parser)


def run_demo(args: argparse.Namespace) -> None:
    from .. import demo

    if args.remake:
        demo.remake(Path(args.remake), Path(args.out))
        return
    device, dtype = compute(args)
    result = demo.demo(
        Path(args.out), quick=args.quick, device=device, dtype=dtype, on_progress=Progress()
    )
    print(json.dumps(asdict(result)) if args.json else result)


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="DIR", help="the folder of test vectors; all below it are replayed"
    )
    add_json(parser)


def run_verify(args: argparse.Namespace) -> int:
    from ..verify import run

    return run(args.folder, args.json)


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="how often each measurement is repeated (default 5)",
    )
    parser.add_argument(
        "--weight-types",
        action="store_true",
        help="measure what each type of weights costs: error of the output, and memory",
    )
    parser.add_argument(
        "--report",
        metavar="FILE.md",
        help="check and measure the device with networks of full size (small ones on a CPU), and "
        "write the table to FILE.md and its figures beside it as JSON; takes minutes",
    )
    add_compute(parser)
    add_json(parser)


def run_bench(args: argparse.Namespace) -> None:
    if args.weight_types:
        from ..bench.weight_types import measure, table

        measured = measure()
        print(json.dumps([asdict(each) for each in measured]) if args.json else table(measured))
        return
    if args.report:
        from ..bench.device import measure as measure_device
        from ..bench.device import table as table_of

        path = Path(args.report)
        report = measure_device(
            compute(args)[0], on_result=lambda row: sys.stderr.write(f"{row}\n")
        )
        path.write_text(f"{table_of(report)}\n", encoding="utf-8")
        path.with_suffix(".json").write_text(f"{json.dumps(report, indent=1)}\n", encoding="utf-8")
        print(json.dumps(report) if args.json else table_of(report))
        return
    from ..backbones import I2VGENXL
    from ..bench.machine import measure as measure_machine
    from ..bench.speed import run
    from ..file_info import describe
    from ..model import BUILT_IN
    from ..models.unet import UNetConfig
    from ..planning.duration import store_machine

    device, chosen = compute(args)
    dtype = I2VGENXL.precision(device, chosen).network
    tiny = UNetConfig(**(describe(BUILT_IN["tiny"][0]).config or {}))
    run(tiny, rounds=args.rounds, device=str(device), dtype=dtype, as_json=args.json)
    file = store_machine(device, measure_machine(device, chosen))
    sys.stderr.write(f"plan and upscale now tell how long a run takes: {file}\n")
