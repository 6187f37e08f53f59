"""`dataset`."""

import argparse
from pathlib import Path

from .arguments import add_sample, sample_size
from .progress import Progress


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="videos, with their captions in NAME.txt beside each or in a CSV file (columns video "
        "and caption as in OpenVid-1M, or path and text)",
    )
    parser.add_argument("out", metavar="OUT", help="the folder for shards of clips (webdataset)")
    add_sample(parser)
    parser.add_argument(
        "--min-detail",
        type=float,
        default=1.0,
        metavar="X",
        help="leave out clips whose neighbouring pixels differ by less on average, in levels of "
        "255 (default 1)",
    )
    parser.add_argument(
        "--single-shots",
        action="store_true",
        help="do not search for cuts, because every video is one shot, as in OpenVid-1M",
    )
    parser.add_argument(
        "--per-shard",
        type=int,
        default=16,
        metavar="N",
        help="videos whose clips are in one shard (default 16)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that make a shard each (default 1)",
    )


def run_dataset(args: argparse.Namespace) -> None:
    from ..shots import find_cuts
    from ..training.dataset import ClipFilter, make_dataset

    progress, sample = Progress(["videos"]), sample_size(args)
    counts = make_dataset(
        Path(args.folder),
        Path(args.out),
        ClipFilter(
            length=(sample.length, 2 * sample.length), size=sample.size, detail=args.min_detail
        ),
        find_cuts=None if args.single_shots else find_cuts,
        per_shard=args.per_shard,
        workers=args.workers,
        on_video=lambda done, total: progress("videos", done, total),
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
