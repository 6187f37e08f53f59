"""`degrade`."""

import argparse
from pathlib import Path

from .arguments import FRAMES
from .progress import Progress

PRESETS = ("light", "heavy", "reference", "fixed-mild", "fixed-heavy", "compression", "training")


def add_degrade(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a clean video, or a folder of frames")
    parser.add_argument(
        "out",
        metavar="OUT",
        help="the small, bad one: .mkv (lossless), .mp4, .mov or a folder; OUT.json says how",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="heavy",
        help="heavy (default) and light: real-world recipes; reference: heavy as it was released, "
        "every frame on its own; fixed-mild, fixed-heavy: what results are judged by; compression: "
        "H.264 alone; training: what the built-in model learned from",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0 to 2^64-1 (default 0)")
    parser.add_argument("--frames", type=FRAMES, metavar="A:B", help="only these frames")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def run_degrade(args: argparse.Namespace) -> None:
    from .. import degradation
    from ..degradation.files import degrade_file

    progress = Progress(["degrade"])
    degrade_file(
        Path(args.source),
        Path(args.out),
        degradation.PRESETS[args.preset],
        args.seed,
        frames=args.frames,
        overwrite=args.overwrite,
        on_progress=lambda done, total: progress("degrade", done, total),
    )
