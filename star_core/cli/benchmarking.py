"""`benchmark`: methods beside each other on public clips."""

import argparse
import importlib.util
import sys
from pathlib import Path

from .progress import Progress


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        metavar="NAME",
        nargs="+",
        help="bicubic, lanczos, animevideov3, x4plus, tiny, tiny-sharp (default: all)",
    )
    parser.add_argument(
        "--clips",
        metavar="NAME",
        nargs="+",
        help="city, bikes, carphone (the default), goldengate, bigbuckbunny; the built-in model "
        "was trained on the last two",
    )
    parser.add_argument(
        "--recipes",
        metavar="NAME",
        nargs="+",
        help="light, heavy, compression; light-3 to light-1 and heavy-3 to heavy-1, which are "
        "enlarged by less than 4 (default: all)",
    )
    parser.add_argument("--metrics", metavar="NAME", nargs="+", help="what to measure")
    parser.add_argument(
        "--out",
        default="out/benchmark",
        metavar="DIR",
        type=Path,
        help="the folder for films, clips and results (default out/benchmark); a run that was "
        "stopped continues there",
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        help="the folder for benchmark.md and its figures (default: as --out)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="processor threads (default 1)"
    )


def run_benchmark(args: argparse.Namespace) -> None:
    from ..benchmark import HELD_OUT, METHODS, METRICS, RECIPES, run, write_report

    if args.threads < 1:
        raise ValueError(f"threads must be 1 or more, got {args.threads}")

    def note(line: str) -> None:
        sys.stderr.write(f"note: {line}\n")

    draw = importlib.util.find_spec("matplotlib") is not None
    if not draw:
        note("there will be no pictures: pip install matplotlib")
    results = run(
        args.out,
        clips=args.clips or HELD_OUT,
        methods=args.methods or tuple(METHODS),
        recipes=args.recipes or tuple(RECIPES),
        metrics=args.metrics or METRICS,
        threads=args.threads,
        on_progress=Progress(("restore",)),
        on_missing=note,
    )
    if not results:
        raise ValueError("no method is left: install what is named above")
    for path in write_report(results, args.out, args.report or args.out, draw=draw):
        print(path)
