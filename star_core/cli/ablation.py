"""`ablation`."""

import argparse
import sys
from pathlib import Path

from .arguments import add_metric_folder
from .progress import Progress, StepReport


def add_ablation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pairs", metavar="PAIRS", help="the folder `pairs` that train --built-in leaves in DIR"
    )
    parser.add_argument(
        "out", metavar="OUT", help="the folder for results; a run that was stopped continues there"
    )
    parser.add_argument(
        "--validate",
        nargs="+",
        required=True,
        metavar="FILE",
        help="clean videos that were not trained on",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=250,
        metavar="N",
        help="optimiser steps of each run (default 250)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="one run for each (default 0 1 2)",
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument(
        "--only",
        metavar="WORD",
        help="run only variants with this word in their names, such as LIEM",
    )
    add_metric_folder(parser)


def run_ablation(args: argparse.Namespace) -> None:
    from ..model import BUILT_IN
    from ..training.ablation import VARIANTS, Ablation, ablate
    from ..vae.load import load_frame_vae

    variants = [v for v in VARIANTS if not args.only or args.only in v.name]
    if not variants:
        raise ValueError(f"no variant is called {args.only}: {', '.join(v.name for v in VARIANTS)}")
    progress = Progress(["runs"])

    def on_run(done: int, total: int, name: str) -> None:
        progress("runs", done, total)
        sys.stderr.write(f"{name}\n")

    settings = Ablation(
        pairs=Path(args.pairs),
        clips=[Path(clip) for clip in args.validate],
        out=Path(args.out),
        steps=args.steps,
        seeds=args.seeds,
        bf16=args.bf16,
        metric_weights=Path(args.metric_folder) if args.metric_folder else None,
    )
    vae = load_frame_vae(BUILT_IN["tiny"][1])
    print(ablate(settings, vae, variants=variants, on_run=on_run, on_step=StepReport()), end="")
