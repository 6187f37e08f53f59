"""`dataset`, `train`, `ablation`."""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import SIZE, add_metric_folder, add_parts
from .degrading import RECIPES
from .progress import Progress, clock

if TYPE_CHECKING:
    from ..training.distillation import DistillConfig
    from ..training.videos import SampleSize


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="videos, with their captions in NAME.txt beside each or in a CSV file (columns video "
        "and caption as in OpenVid-1M, or path and text)",
    )
    parser.add_argument("out", metavar="OUT", help="the folder for shards of clips (webdataset)")
    _add_sample(parser)
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


def _add_sample(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--clip-frames", type=int, default=32, metavar="N", help="frames of a sample (default 32)"
    )
    parser.add_argument(
        "--interval",
        type=int,
        default=2,
        metavar="N",
        help="take every Nth frame of a clip for a sample (default 2)",
    )
    parser.add_argument(
        "--size",
        type=SIZE,
        default=(1280, 720),
        metavar="WxH",
        help="pixels of a sample (default 1280x720); smaller clips are left out",
    )


def _sample(args: argparse.Namespace) -> "SampleSize":
    from ..training.videos import SampleSize

    return SampleSize(
        frames=args.clip_frames, interval=args.interval, size=(args.size[1], args.size[0])
    )


def run_dataset(args: argparse.Namespace) -> None:
    from ..shots import find_cuts
    from ..training.dataset import ClipFilter, make_dataset

    progress, sample = Progress(["videos"]), _sample(args)
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
        choices=("star", "all", "lora", "decoder"),
        help="what is trained: ControlNet and LIEM (star, default), everything, a LoRA (default "
        "with --distill), or a small decoder for the VAE (decoder)",
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
        "--decoder-share",
        type=float,
        default=0.1,
        metavar="X",
        help="most compute of a decoder, as a share of that of the VAE's own (default 0.1)",
    )
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="heavy",
        help="how clips are degraded, see the command degrade (default heavy)",
    )
    _add_sample(group)
    group.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="samples of a step in each process (default 1)",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="batches whose gradients are added up for a step, for less memory (default 1)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=4,
        metavar="N",
        help="processes with one thread each that read and degrade clips ahead, for each training "
        "process (default 4)",
    )
    group.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="adamw (default), or muon for large matrices and adamw for the rest",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help="step size of the optimiser (default 5e-5, of a decoder 5e-4)",
    )
    group.add_argument(
        "--warmup",
        type=int,
        default=0,
        metavar="N",
        help="steps in which the learning rate rises from 0 (default 0)",
    )
    group.add_argument(
        "--decay-from",
        type=int,
        metavar="N",
        help="step from which the learning rate falls to 0 along a cosine (default: it does not, "
        "with a decoder from the middle on)",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        default=0.01,
        metavar="X",
        help="decay of the weights (default 0.01)",
    )
    group.add_argument(
        "--shard",
        action="store_true",
        help="spread weights, gradients and optimizer over all processes (FSDP2)",
    )
    group.add_argument(
        "--average-on-cpu",
        action="store_true",
        help="keep the moving average of the weights in main memory",
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
        "--keep", type=int, default=2, metavar="N", help="states that are kept (default 2)"
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
        "--plan",
        action="store_true",
        help="print the memory and the work of a step, and stop; MODEL may then be i2vgenxl, "
        "cogvideox-5b or cogvideox-2b, STAR's full sizes, which need no files",
    )
    group.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="with --plan and --steps: what a GPU computes, in TFLOP a second, to tell the hours",
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
        from ..training.tiny import STAGES, train_tiny

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
            on_progress=Progress(STAGES),
        )
        return
    if args.start or args.sharp:
        raise ValueError("--start and --sharp belong to --built-in: leave them out with --model")
    from .. import degradation
    from ..losses import DFLossConfig
    from ..model import find_model
    from ..training.finetune import STAGES, DataConfig, finetune
    from ..training.objective import TrainConfig
    from ..training.trainer import TrainExecution

    files = find_model(
        args.model, vae=args.vae, text_encoder=args.text_encoder, models_dir=args.models_dir
    )
    distill, teacher = _distillation(args)
    small = args.trains == "decoder"
    if small and distill:
        raise ValueError("--distill is for the network: leave out --trains decoder")
    config = TrainConfig(
        steps=args.steps,
        batch=args.batch,
        trains="all" if small else args.trains or ("lora" if distill else "star"),
        optimizer=args.optimizer,
        learning_rate=_default(args.learning_rate, 5e-4 if small else 5e-5),
        warmup=args.warmup,
        decay_from=args.steps // 2 if small and args.decay_from is None else args.decay_from,
        weight_decay=args.weight_decay,
        noise_level=1000,
        early=0.0,
        ema=0.999,
        seed=args.seed,
        bf16=args.bf16,
        checkpointing=args.checkpointing,
        df=DFLossConfig(alpha=args.df_alpha, beta=_default(args.df_beta, 0.0 if distill else 1.0)),
        df_space=args.df_space or ("latents" if distill or small else "pixels"),
    )
    data = DataConfig(
        data=Path(args.data),
        recipe=degradation.PRESETS[args.recipe],
        sample=_sample(args),
        validation_set=Path(args.validate) if args.validate else None,
    )
    execution = TrainExecution(
        workers=args.workers,
        accumulate=args.accumulate,
        average_on_cpu=args.average_on_cpu,
        shard=args.shard,
        keep=args.keep,
    )
    running = {
        "every": args.every,
        "on_step": _Report(),
        "on_progress": Progress(STAGES),
        "execution": execution,
    }
    if small:
        from ..training.decoder import distil_decoder

        latents = files.info.latents or {}
        distil_decoder(
            files.vae,
            data,
            Path(args.out),
            config,
            scale=latents.get("scale"),
            share=args.decoder_share,
            upsampling=files.sampling.upsample,
            **running,
        )
        return
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
        **running,
    )


def _distillation(args: argparse.Namespace) -> "tuple[DistillConfig | None, dict[str, float]]":
    """What is distilled, None for nothing, and settings of the teacher that replace the model's."""
    from ..training.distillation import DistillConfig

    teacher = {name: getattr(args, name) for name in ("cfg", "cfg_rescale")}
    options = {name: getattr(args, name) for name in ("solver_steps", "pixels", "sampler")}
    teacher, options = (
        {name: value for name, value in given.items() if value is not None}
        for given in (teacher, options)
    )
    if args.distill is not None:
        return DistillConfig(evaluations=args.distill, **options), teacher
    if given := next(iter((*teacher, *options)), None):
        raise ValueError(
            f"--{given.replace('_', '-')} belongs to --distill: add it, or leave it out"
        )
    return None, {}


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
    from ..backbones import I2VGENXL, SIZES, backbone_of
    from ..checkpoints.tensors import open_tensors
    from ..model import find_model
    from ..training.loading import AHEAD
    from ..training.pixels import PixelCrop
    from ..training.plan import GIB, plan_training
    from ..vae.load import geometry_of

    if args.trains == "decoder":
        raise ValueError("--plan counts the training of networks: leave out --trains decoder")
    if args.model is None:
        raise ValueError("--plan is for --model: --built-in trains a small network of its own")
    for name in ("data", "validate"):
        if (folder := getattr(args, name)) and not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder: correct --{name}")
    text_encoder = 0
    if args.model in SIZES:
        config = SIZES[args.model]
        vae = geometry_of(args.vae) if args.vae else backbone_of(config).geometry
    else:
        files = find_model(
            args.model, vae=args.vae, text_encoder=args.text_encoder, models_dir=args.models_dir
        )
        config, vae = files.info.size, geometry_of(files.vae)
        if files.text_encoder:
            each = 4 if files.backbone is I2VGENXL else 2  # T5 is loaded in bfloat16
            text_encoder = each * sum(x.numel() for x in open_tensors(files.text_encoder).values())
    sample, (distill, _) = _sample(args), _distillation(args)
    df_space = args.df_space or ("latents" if distill else "pixels")
    in_pixels = df_space == "pixels" and _default(args.df_beta, 0.0 if distill else 1.0)
    height, width = (side // vae.factor for side in sample.size)
    plan = plan_training(
        config,
        frames=(sample.frames - 1) // vae.latent_frames + 1,
        height=height,
        width=width,
        trains=args.trains or ("lora" if distill else "star"),
        rank=args.rank,
        lora_layers=args.lora_layers or ("all" if distill else "attention"),
        lora_controlnet=not args.no_lora_controlnet,
        distill=distill,
        checkpointing=args.checkpointing,
        bf16=args.bf16,
        optimizer=args.optimizer,
        batch=args.batch,
        accumulate=args.accumulate,
        average_on_cpu=args.average_on_cpu,
        shard=args.shard,
        vae=vae,
        crop=PixelCrop() if in_pixels or (distill and distill.pixels) else None,
        text_encoder=text_encoder,
    )
    table = plan.table(steps=args.steps, rate=args.tflops and args.tflops * 1e12)
    print(f"{plan}\n{table}")
    pair = sample.frames * 3 * sample.size[0] * sample.size[1] * 17 / 16
    waiting = AHEAD * args.workers * args.batch * pair / GIB
    print(
        f"data, for each GPU: {args.workers} cores, {waiting:.1f} GiB of samples that wait"
        + ("" if text_encoder or args.model not in SIZES else "; the text encoder is not counted")
    )


class _Report:
    """A line on stderr every 50 steps or 30 seconds. Time left is that of the run at hand."""

    def __init__(self) -> None:
        self.start, self.first, self.last, self.shown = 0.0, 0, -1, 0.0

    def __call__(self, step: int, steps: int, parts: dict[str, float]) -> None:
        if step != self.last + 1:  # another run, or one that goes on
            self.start, self.first = time.monotonic(), step
            self.shown = self.start
        self.last, now = step, time.monotonic()
        if step % 50 and step < steps and now < self.shown + 30:
            return
        self.shown = now
        left = (time.monotonic() - self.start) / max(step - self.first, 1) * (steps - step)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
        sys.stderr.write(f"step {step}/{steps}, {losses}, {clock(left)} left\n")
