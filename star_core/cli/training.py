"""`train`."""

import argparse
import logging
import sys
import time
from pathlib import Path

from .progress import clock


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", choices=("tiny",), required=True, help="what to train: the built-in model"
    )
    parser.add_argument("--data", required=True, metavar="FOLDER", help="clean videos and pictures")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="weights and checkpoints; training goes on where it stopped",
    )
    parser.add_argument(
        "--steps", type=int, required=True, metavar="N", help="optimiser steps in all"
    )
    parser.add_argument(
        "--start",
        metavar="DIR",
        help="go on from the model and VAE in DIR, such as star_core/weights",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")


def run_train(args: argparse.Namespace) -> None:
    from ..training.tiny import train_tiny

    logging.getLogger(__name__.partition(".cli")[0]).setLevel(logging.INFO)
    start = time.monotonic()
    first = 0

    def on_step(step: int, steps: int, parts: dict[str, float]) -> None:
        nonlocal first
        first = first or step - 1
        if step % 50 and step < steps:
            return
        left = (time.monotonic() - start) / (step - first) * (steps - step)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
        sys.stderr.write(f"step {step}/{steps}, {losses}, {clock(left)} left\n")

    train_tiny(
        Path(args.data),
        Path(args.out),
        steps=args.steps,
        seed=args.seed,
        start=Path(args.start) if args.start else None,
        on_step=on_step,
    )
