"""`dataset`, `train`, `ablation`."""

import argparse
import logging
import sys
import time
from pathlib import Path

from .arguments import SIZE, add_metric_folder, add_parts
from .degrading import RECIPES
from .progress import Progress, clock


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="videos, with their captions in NAME.txt beside each or in a CSV file (columns video "
        "and caption as in OpenVid-1M, or path and text)",
    )
    parser.add_argument("out", metavar="OUT", help="the folder for shards of clips (webdataset)")
    parser.add_argument(
        "--clip-frames",
        nargs=2,
        type=int,
        default=(32, 64),
        metavar=("MIN", "MAX"),
        help="shortest and longest clip, in frames (default 32 64)",
    )
    parser.add_argument(
        "--min-side",
        type=int,
        default=256,
        metavar="N",
        help="leave out videos of which a side is shorter, in pixels (default 256)",
    )
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
        "--per-shard", type=int, default=256, metavar="N", help="clips in a shard (default 256)"
    )


def run_dataset(args: argparse.Namespace) -> None:
    from ..shots import find_cuts
    from ..training.dataset import ClipFilter, make_dataset

    progress = Progress(["videos"])
    counts = make_dataset(
        Path(args.folder),
        Path(args.out),
        ClipFilter(length=tuple(args.clip_frames), side=args.min_side, detail=args.min_detail),
        find_cuts=None if args.single_shots else find_cuts,
        per_shard=args.per_shard,
        on_video=lambda done, total: progress("videos", done, total),
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()))


def add_train(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--built-in", action="store_true", help="make the built-in model anew")
    what.add_argument(
        "--model",
        metavar="MODEL",
        help="train tiny, light_deg, heavy_deg or a file; a ControlNet or LIEM that the file lacks "
        "is added",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="shards that the command dataset wrote; for --built-in clean videos and pictures",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="the folder for weights, state and curves; training continues from a state in it",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps in all")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of samples and noise (default 0)"
    )
    add_metric_folder(parser)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    group = parser.add_argument_group("with --built-in")
    group.add_argument(
        "--start",
        metavar="DIR",
        help="continue from the model and the VAE in DIR, such as star_core/weights",
    )
    group.add_argument(
        "--sharp",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the samples that train the preset sharp, 0 (default) to 1; needs --start",
    )
    group = parser.add_argument_group("with --model")
    add_parts(group)
    group.add_argument(
        "--trains",
        choices=("star", "all", "lora"),
        help="what is trained: ControlNet and LIEM (star, default), everything, or a LoRA (default "
        "with --distill)",
    )
    group.add_argument(
        "--rank", type=int, default=16, metavar="N", help="rank of the LoRA (default 16)"
    )
    group.add_argument(
        "--lora-layers",
        choices=("attention", "all"),
        help="which layers get a LoRA: the linear layers of the transformers (attention, default) "
        "or all linear layers and convolutions (default with --distill)",
    )
    group.add_argument(
        "--no-lora-controlnet",
        action="store_true",
        help="the ControlNet gets no LoRA",
    )
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="heavy",
        help="how clips are degraded, see the command degrade (default heavy)",
    )
    group.add_argument(
        "--clip-frames", type=int, default=32, metavar="N", help="frames of a sample (default 32)"
    )
    group.add_argument(
        "--size",
        type=SIZE,
        default=(1280, 720),
        metavar="WxH",
        help="pixels of a sample (default 1280x720)",
    )
    group.add_argument(
        "--interval", type=int, default=2, metavar="N", help="take every Nth frame (default 2)"
    )
    group.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="samples of a step in each process (default 1)",
    )
    group.add_argument(
        "--learning-rate", type=float, default=5e-5, metavar="X", help="default 5e-5"
    )
    group.add_argument(
        "--validate", metavar="FOLDER", help="shards that are not trained on, to measure the model"
    )
    group.add_argument(
        "--every",
        type=int,
        default=500,
        metavar="N",
        help="steps between two states that are saved (default 500)",
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute activations again instead of keeping them: less memory, a third more work",
    )
    group.add_argument(
        "--df-space",
        choices=("pixels", "latents"),
        help="where DF loss compares spectra: in a decoded part of the video (default) or in "
        "latents (default with --distill)",
    )
    group.add_argument(
        "--df-alpha",
        type=float,
        default=2.0,
        metavar="X",
        help="how fast DF loss moves from low to high frequencies (default 2)",
    )
    group.add_argument(
        "--df-beta",
        type=float,
        metavar="X",
        help="weight of DF loss, 0 for none (default 1, with --distill 0)",
    )
    add_distillation(parser)
    group.add_argument(
        "--plan", action="store_true", help="print the memory and the work of a step, and stop"
    )


def add_distillation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --model: distillation into few evaluations")
    group.add_argument(
        "--distill",
        type=int,
        metavar="N",
        help="train a LoRA with which N evaluations without guidance, such as 1, 2 or 4, give what "
        "the model gives with guidance and many evaluations",
    )
    group.add_argument(
        "--solver-steps",
        type=int,
        metavar="N",
        help="steps of the teacher over all noise levels, a multiple of --distill (default 16)",
    )
    group.add_argument(
        "--cfg", type=float, metavar="X", help="the teacher's guidance scale (default: the model's)"
    )
    group.add_argument(
        "--cfg-rescale", type=float, metavar="X", help="of the teacher (default: the model's)"
    )
    group.add_argument(
        "--pixels",
        type=float,
        metavar="X",
        help="weight of a loss in pixels of a decoded part in the last phase (default 0)",
    )
    group.add_argument(
        "--sampler",
        choices=("euler", "lcm"),
        help="sampler that the LoRA asks for: euler (default) keeps the noise of the start, lcm "
        "draws it anew after each evaluation",
    )


def run_train(args: argparse.Namespace) -> None:
    if args.plan:
        _print_plan(args)
        return
    if missing := [f"--{name}" for name in ("data", "out", "steps") if not getattr(args, name)]:
        raise ValueError(f"train needs {', '.join(missing)}")
    logging.getLogger(__name__.partition(".cli")[0]).setLevel(logging.INFO)
    if args.built_in:
        from ..training.tiny import train_tiny

        train_tiny(
            Path(args.data),
            Path(args.out),
            steps=args.steps,
            seed=args.seed,
            start=Path(args.start) if args.start else None,
            sharp=args.sharp,
            metric_weights=Path(args.metric_folder) if args.metric_folder else None,
            bf16=args.bf16,
            on_step=_Report(),
        )
        return
    if args.start or args.sharp:
        raise ValueError("--start and --sharp belong to --built-in: leave them out with --model")
    from .. import degradation
    from ..losses import DFLossConfig
    from ..model import find_model
    from ..training.distillation import DistillConfig
    from ..training.finetune import DataConfig, finetune
    from ..training.objective import TrainConfig

    files = find_model(
        args.model, vae=args.vae, text_encoder=args.text_encoder, models_dir=args.models_dir
    )
    teacher = {name: getattr(args, name) for name in ("cfg", "cfg_rescale")}
    options = {name: getattr(args, name) for name in ("solver_steps", "pixels", "sampler")}
    teacher, options = (
        {name: value for name, value in given.items() if value is not None}
        for given in (teacher, options)
    )
    if args.distill is None and (given := next(iter((*teacher, *options)), None)):
        raise ValueError(
            f"--{given.replace('_', '-')} belongs to --distill: add it, or leave it out"
        )
    distill = None if args.distill is None else DistillConfig(evaluations=args.distill, **options)
    config = TrainConfig(
        steps=args.steps,
        batch=args.batch,
        trains=args.trains or ("lora" if distill else "star"),
        learning_rate=args.learning_rate,
        noise_level=1000,
        early=0.0,
        ema=0.999,
        seed=args.seed,
        bf16=args.bf16,
        checkpointing=args.checkpointing,
        df=DFLossConfig(alpha=args.df_alpha, beta=_default(args.df_beta, 0.0 if distill else 1.0)),
        df_space=args.df_space or ("latents" if distill else "pixels"),
    )
    data = DataConfig(
        data=Path(args.data),
        recipe=degradation.PRESETS[args.recipe],
        frames=args.clip_frames,
        size=(args.size[1], args.size[0]),
        interval=args.interval,
        validation_set=Path(args.validate) if args.validate else None,
    )
    finetune(
        files.model,
        files.vae,
        data,
        Path(args.out),
        config,
        text_encoder=files.text_encoder,
        rank=args.rank,
        lora_layers=args.lora_layers or ("all" if distill else "attention"),
        lora_controlnet=not args.no_lora_controlnet,
        distill=distill,
        teacher=teacher,
        every=args.every,
        on_step=_Report(),
    )


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


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
    print(ablate(settings, vae, variants=variants, on_run=on_run, on_step=_Report()), end="")


def _print_plan(args: argparse.Namespace) -> None:
    from ..model import BUILT_IN
    from ..models.encoder import UNetConfig
    from ..star_checkpoint import open_model
    from ..training.plan import plan_training

    path = BUILT_IN[args.model][0] if args.model in BUILT_IN else args.model
    config, frames, factor = UNetConfig(), args.clip_frames, 4 if args.model in BUILT_IN else 8
    if path and Path(path).exists():
        file = open_model(path)
        config, frames = file.config, -(-args.clip_frames // file.latents.frames)
    plan = plan_training(
        config,
        frames=frames,
        height=args.size[1] // factor,
        width=args.size[0] // factor,
        trains=args.trains or "star",
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
