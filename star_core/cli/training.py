"""`train`."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_metric_folder, add_parts, add_sample, sample_size
from .degrading import RECIPES
from .progress import Progress, StepReport

if TYPE_CHECKING:
    from ..training.distillation import DistillConfig


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
        "--lora",
        metavar="FILE",
        help="continue from the LoRA in FILE, which was trained with the same --rank, "
        "--lora-layers and --no-lora-controlnet (default: a new LoRA)",
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
    add_sample(group)
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
        "--adversarial",
        type=float,
        metavar="X",
        help="weight of an adversarial loss, for a second stage: heads on the ControlNet's "
        "features learn to tell the LoRA's results from clean clips (default 0)",
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
            on_step=StepReport(),
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
    distill, teacher = _complete(args)
    small = args.trains == "decoder"
    config = TrainConfig(
        steps=args.steps,
        batch=args.batch,
        trains="all" if small else args.trains,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        decay_from=args.decay_from,
        weight_decay=args.weight_decay,
        noise_level=1000,
        early=0.0,
        ema=0.999,
        seed=args.seed,
        bf16=args.bf16,
        checkpointing=args.checkpointing,
        df=DFLossConfig(alpha=args.df_alpha, beta=args.df_beta),
        df_space=args.df_space,
    )
    data = DataConfig(
        data=Path(args.data),
        recipe=degradation.PRESETS[args.recipe],
        sample=sample_size(args),
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
        "on_step": StepReport(),
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
        lora_layers=args.lora_layers,
        lora_controlnet=not args.no_lora_controlnet,
        lora=Path(args.lora) if args.lora else None,
        distill=distill,
        teacher=teacher,
        **running,
    )


def _complete(args: argparse.Namespace) -> "tuple[DistillConfig | None, dict[str, float]]":
    """Fills in the options whose defaults depend on what is trained.

    Returns the settings of a distillation, None without one, and those of its teacher that replace
    the model's. ValueError for options that do not belong together.
    """
    from ..training.distillation import DistillConfig

    teacher = {name: getattr(args, name) for name in ("cfg", "cfg_rescale")}
    options = {
        name: getattr(args, name) for name in ("solver_steps", "pixels", "adversarial", "sampler")
    }
    teacher, options = (
        {name: value for name, value in given.items() if value is not None}
        for given in (teacher, options)
    )
    distills, small = args.distill is not None, args.trains == "decoder"
    if not distills and (given := next(iter((*teacher, *options)), None)):
        raise ValueError(
            f"--{given.replace('_', '-')} belongs to --distill: add it, or leave it out"
        )
    if small and (distills or args.lora):
        raise ValueError("--distill and --lora are for the network: leave out --trains decoder")
    defaults = {
        "trains": "lora" if distills else "star",
        "lora_layers": "all" if distills else "attention",
        "df_beta": 0.0 if distills else 1.0,
        "df_space": "latents" if distills or small else "pixels",
        "learning_rate": 5e-4 if small else 5e-5,
        "decay_from": args.steps // 2 if small and args.steps else None,
    }
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return DistillConfig(evaluations=args.distill, **options) if distills else None, teacher


def _print_plan(args: argparse.Namespace) -> None:
    from ..backbones import I2VGENXL, SIZES, backbone_of
    from ..checkpoints.tensors import open_tensors
    from ..model import find_model
    from ..training.finetune import check_sample
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
    sample, (distill, _) = sample_size(args), _complete(args)
    in_pixels = args.df_space == "pixels" and args.df_beta
    check_sample(sample.size, config, vae.factor)
    height, width = (side // vae.factor for side in sample.size)
    plan = plan_training(
        config,
        frames=(sample.frames - 1) // vae.latent_frames + 1,
        height=height,
        width=width,
        trains=args.trains,
        rank=args.rank,
        lora_layers=args.lora_layers,
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
