"""`degrade`."""

import argparse
from pathlib import Path

from .arguments import FRAMES
from .progress import Progress

RECIPES = ("light", "heavy", "reference", "fixed-mild", "fixed-heavy", "compression", "training")


def add_degrade(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a clean video, or a folder of frames")
    parser.add_argument(
        "out",
        metavar="OUT",
        help="the degraded clip: .mkv (lossless), .mp4, .mov or a folder; OUT.json records how it "
        "was made",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="heavy",
        help="heavy (default) and light are real-world recipes; reference is heavy as it was "
        "released, every frame by itself; fixed-mild and fixed-heavy are those of the benchmark; "
        "compression is H.264 alone; training is that of the built-in model",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the random draws, 0 to 2^64-1 (default 0)",
    )
    parser.add_argument(
        "--frames", type=FRAMES, metavar="A:B", help="only frames A to B-1, counted from 0"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def run_degrade(args: argparse.Namespace) -> None:
    from .. import degradation
    from ..degradation.files import degrade_file

    progress = Progress(["degrade"])
    degrade_file(
        Path(args.source),
        Path(args.out),
        degradation.PRESETS[args.recipe],
        args.seed,
        frames=args.frames,
        overwrite=args.overwrite,
        on_progress=lambda done, total: progress("degrade", done, total),
    )
