"""`dataset`, `train`, `ablation`."""

import argparse
import logging
import sys
import time
from pathlib import Path

from .arguments import SIZE, add_weights
from .degrading import PRESETS
from .progress import Progress, clock


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="videos, with captions in NAME.txt beside each or in a CSV file (video, caption as "
        "OpenVid-1M has them, or path, text)",
    )
    parser.add_argument("out", metavar="OUT", help="where shards of clips go (webdataset)")
    parser.add_argument(
        "--frames",
        nargs=2,
        type=int,
        default=(32, 64),
        metavar=("A", "B"),
        help="least and most frames of a clip (default 32 64)",
    )
    parser.add_argument(
        "--side", type=int, default=256, metavar="N", help="least width and height (default 256)"
    )
    parser.add_argument(
        "--detail", type=float, default=1.0, metavar="X", help="least detail (default 1)"
    )
    parser.add_argument(
        "--single-shots", action="store_true", help="do not look for cuts (OpenVid-1M is cut)"
    )
    parser.add_argument("--per-shard", type=int, default=256, metavar="N", help="default 256")


def run_dataset(args: argparse.Namespace) -> None:
    from ..shots import find_cuts
    from ..training.dataset import ClipFilter, make_dataset

    progress = Progress(["videos"])
    counts = make_dataset(
        Path(args.folder),
        Path(args.out),
        ClipFilter(length=tuple(args.frames), side=args.side, detail=args.detail),
        find_cuts=None if args.single_shots else find_cuts,
        per_shard=args.per_shard,
        on_video=lambda done, total: progress("videos", done, total),
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()))


def add_train(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=("tiny",), help="make the built-in model")
    what.add_argument(
        "--model",
        metavar="FILE",
        help="train a model with official key names; a ControlNet or LIEM that it lacks is added",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="shards of the command dataset; for --preset tiny clean videos and pictures",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="weights, checkpoints, curves; training goes on where it stopped",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps in all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument(
        "--start",
        metavar="DIR",
        help="with --preset tiny: go on from the model and VAE in DIR, such as star_core/weights",
    )
    parser.add_argument(
        "--sharp",
        type=float,
        default=0.0,
        metavar="X",
        help="with --start: share of the samples that learn the preset sharp (default 0)",
    )
    add_weights(parser)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    group = parser.add_argument_group("with --model")
    group.add_argument("--vae", metavar="FILE", help="the VAE that belongs to the model")
    group.add_argument("--text-encoder", metavar="FILE", help="OpenCLIP ViT-H-14")
    group.add_argument(
        "--trains",
        choices=("star", "all", "lora"),
        default="star",
        help="star (default): ControlNet and LIEM, the rest is frozen; all; or a LoRA",
    )
    group.add_argument("--rank", type=int, default=16, metavar="N", help="of a LoRA (default 16)")
    group.add_argument("--recipe", choices=PRESETS, default="heavy", help="default heavy")
    group.add_argument(
        "--frames", type=int, default=32, metavar="N", help="of a sample (default 32)"
    )
    group.add_argument(
        "--size", type=SIZE, default=(1280, 720), metavar="WxH", help="default 1280x720"
    )
    group.add_argument("--interval", type=int, default=2, metavar="N", help="default 2")
    group.add_argument("--batch", type=int, default=1, metavar="N", help="of a process (default 1)")
    group.add_argument("--learning-rate", type=float, default=5e-5, metavar="X", help="(5e-5)")
    group.add_argument("--validate", metavar="FOLDER", help="shards kept apart")
    group.add_argument("--every", type=int, default=500, metavar="N", help="checkpoints (500)")
    group.add_argument(
        "--checkpointing", action="store_true", help="less memory, a third more to compute"
    )
    group.add_argument(
        "--df-space",
        choices=("pixels", "latents"),
        default="pixels",
        help="where DF loss compares: in pixels of a decoded part (default), or in latents",
    )
    group.add_argument("--df-alpha", type=float, default=2.0, metavar="X", help="default 2")
    group.add_argument("--df-beta", type=float, default=1.0, metavar="X", help="0 is none (1)")
    group.add_argument(
        "--plan", action="store_true", help="print the memory and work that it takes, and stop"
    )


def run_train(args: argparse.Namespace) -> None:
    if args.plan:
        _print_plan(args)
        return
    if missing := [f"--{name}" for name in ("data", "out", "steps") if not getattr(args, name)]:
        raise ValueError(f"train needs {', '.join(missing)}")
    logging.getLogger(__name__.partition(".cli")[0]).setLevel(logging.INFO)
    if args.preset == "tiny":
        from ..training.tiny import train_tiny

        train_tiny(
            Path(args.data),
            Path(args.out),
            steps=args.steps,
            seed=args.seed,
            start=Path(args.start) if args.start else None,
            sharp=args.sharp,
            metric_weights=Path(args.weights) if args.weights else None,
            bf16=args.bf16,
            on_step=_Report(),
        )
        return
    if args.start or args.sharp:
        raise ValueError("--start and --sharp are for --preset tiny: leave them out with --model")
    from ..degradation import PRESETS as RECIPES
    from ..losses import DFLossConfig
    from ..model import BUILT_IN
    from ..training.finetune import DataConfig, finetune
    from ..training.objective import TrainConfig

    path, built_in_vae = BUILT_IN.get(args.model, (Path(args.model), None))
    vae = args.vae or built_in_vae
    if vae is None:
        raise ValueError("name the VAE of the model with --vae FILE")
    config = TrainConfig(
        steps=args.steps,
        batch=args.batch,
        trains=args.trains,
        learning_rate=args.learning_rate,
        noise_level=1000,
        early=0.0,
        ema=0.999,
        seed=args.seed,
        bf16=args.bf16,
        checkpointing=args.checkpointing,
        df=DFLossConfig(alpha=args.df_alpha, beta=args.df_beta),
        df_space=args.df_space,
    )
    material = DataConfig(
        data=Path(args.data),
        recipe=RECIPES[args.recipe],
        frames=args.frames,
        size=(args.size[1], args.size[0]),
        interval=args.interval,
        validation_set=Path(args.validate) if args.validate else None,
    )
    finetune(
        Path(path),
        Path(vae),
        material,
        Path(args.out),
        config,
        text_encoder=Path(args.text_encoder) if args.text_encoder else None,
        rank=args.rank,
        every=args.every,
        on_step=_Report(),
    )


def add_ablation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pairs", metavar="PAIRS", help="the folder `pairs` that train --preset tiny leaves in DIR"
    )
    parser.add_argument("out", metavar="OUT", help="results; started again, it goes on there")
    parser.add_argument(
        "--clips", nargs="+", required=True, metavar="FILE", help="clean videos kept apart"
    )
    parser.add_argument(
        "--steps", type=int, default=250, metavar="N", help="of each run (default 250)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument(
        "--only", metavar="WORD", help="variants with this in their name, such as LIEM"
    )
    add_weights(parser)


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
        clips=[Path(clip) for clip in args.clips],
        out=Path(args.out),
        steps=args.steps,
        seeds=args.seeds,
        bf16=args.bf16,
        metric_weights=Path(args.weights) if args.weights else None,
    )
    vae = load_frame_vae(BUILT_IN["tiny"][1])
    print(ablate(settings, vae, variants=variants, on_run=on_run, on_step=_Report()), end="")


def _print_plan(args: argparse.Namespace) -> None:
    from ..model import BUILT_IN
    from ..models.encoder import UNetConfig
    from ..star_checkpoint import open_model
    from ..training.plan import plan_training

    path = BUILT_IN[args.model][0] if args.model in BUILT_IN else args.model
    config, frames, factor = UNetConfig(), args.frames, 4 if args.model in BUILT_IN else 8
    if path and Path(path).exists():
        file = open_model(path)
        config, frames = file.config, -(-args.frames // file.latents.frames)
    plan = plan_training(
        config,
        frames=frames,
        height=args.size[1] // factor,
        width=args.size[0] // factor,
        trains=args.trains,
        rank=args.rank,
        checkpointing=args.checkpointing,
    )
    print(f"{plan}\n{plan.table()}")


class _Report:
    """A line on stderr every 50 steps. Time left is that of the run at hand."""

    def __init__(self) -> None:
        self.start, self.first, self.last = 0.0, 0, -1

    def __call__(self, step: int, steps: int, parts: dict[str, float]) -> None:
        if step != self.last + 1:  # another run, or one that goes on
            self.start, self.first = time.monotonic(), step
        self.last = step
        if step % 50 and step < steps:
            return
        left = (time.monotonic() - self.start) / max(step - self.first, 1) * (steps - step)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
        sys.stderr.write(f"step {step}/{steps}, {losses}, {clock(left)} left\n")
