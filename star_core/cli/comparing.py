"""`compare`, `votes`: clips side by side in a browser, and what viewers say of them."""

import argparse
import sys
from pathlib import Path

from .arguments import FRAMES
from .progress import Progress


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "clips",
        metavar="CLIP",
        nargs="+",
        type=Path,
        help="videos of one scene, or folders with equally named videos of several scenes",
    )
    parser.add_argument(
        "--truth", metavar="GT", type=Path, help="the ground truth: a video, or a folder of them"
    )
    parser.add_argument(
        "--out",
        default="comparison.html",
        metavar="PAGE.html",
        type=Path,
        help="the page to write (default comparison.html)",
    )
    parser.add_argument(
        "--names", metavar="NAME", nargs="+", default=[], help="titles of the clips"
    )
    parser.add_argument(
        "--frames", type=FRAMES, metavar="A:B", help="only frames A to B-1, counted from 0"
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME",
        nargs="*",
        help="what to measure, no name for nothing (default: what can be measured with the ground "
        "truth, or without)",
    )
    parser.add_argument("--title", default="Comparison", help="heading of the page")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order of clips in the blind mode"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")


def run_compare(args: argparse.Namespace) -> None:
    from ..compare import find_scenes, write_page

    if len(args.clips) + (args.truth is not None) < 2:
        raise ValueError("there is one clip only: give at least two, or --truth GT")
    scenes = find_scenes(args.clips, reference=args.truth, names=args.names, frames=args.frames)
    for note in dict.fromkeys(note for scene in scenes for note in scene.notes):
        sys.stderr.write(f"note: {note}\n")
    missing = write_page(
        scenes,
        args.out,
        title=args.title,
        metrics=_metrics(args.metrics, has_reference=args.truth is not None),
        seed=args.seed,
        overwrite=args.overwrite,
        on_progress=Progress(("measure", "encode")),
    )
    for why in missing:
        sys.stderr.write(f"note: {why}\n")
    print(f"{args.out}: open it in a browser")


def _metrics(names: list[str] | None, *, has_reference: bool) -> list[str]:
    """Those asked for, or what there is to measure by default."""
    from ..metrics import DEFAULT_METRICS

    if names is not None:
        return names
    return list(DEFAULT_METRICS) if has_reference else ["own_warping_error"]


def add_votes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="votes that a page saved"
    )


def run_votes(args: argparse.Namespace) -> None:
    from ..compare import pool

    shares = pool(args.files)
    width = max(len(share.clip) for share in shares)
    for question in dict.fromkeys(share.question for share in shares):
        of = next(share.of for share in shares if share.question == question)
        print(f"{question}: {of} votes (95 % Wilson score interval)")
        for share in shares:
            if share.question == question:
                percent = f"{share.votes / of:7.1%}" if of else "      –"
                print(
                    f"  {share.clip:{width}} {share.votes:4} {percent}  "
                    f"({share.low:.1%} to {share.high:.1%})"
                )
