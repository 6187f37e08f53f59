"""`upscale`: from file to file."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    CROP,
    FRAMES,
    MEMORY,
    TILE,
    add_compute,
    add_json,
    add_lora,
    add_parts,
    add_size,
    compute,
)
from .progress import Progress
from .shots import RunOptions, add_shots, report_of

if TYPE_CHECKING:
    import torch

    from ..diffusion.shortcuts import Shortcuts
    from ..upscale import RunSpec
    from ..windows.tiling import Tile

SOLVERS = ("dpmpp_2m_sde", "dpmpp_2m_sde_renewed", "dpmpp_2m", "heun", "euler", "lcm")


def add_upscale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="IN",
        help="a video, a folder of frames, or numbered frames such as %%05d.png",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help=".mkv (lossless), .mp4, .mov, .webm, or a folder, %%05d.png or %%05d.exr for frames",
    )
    add_options(parser)
    add_json(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how to restore, whichever files."""
    group = parser.add_argument_group("size and part")
    add_size(group)
    group.add_argument(
        "--frames",
        type=FRAMES,
        metavar="A:B",
        help="restore only frames A to B-1, counted from 0, as they are in the whole result",
    )
    group.add_argument(
        "--crop",
        type=CROP,
        metavar="WxH+X+Y",
        help="restore only this part of the picture, in pixels of the input as displayed",
    )

    add_shots(group)

    group = parser.add_argument_group("look (defaults come from the model file)")
    group.add_argument(
        "--auto",
        action="store_true",
        help="measure blur, noise and compression of the input, and choose the options that are "
        "not given",
    )
    group.add_argument(
        "--shrink",
        type=float,
        metavar="X",
        help="reduce the input by X, 1 (default) or more, before it is enlarged; the size of the "
        "result stays. For clips that are blurred far below their size",
    )
    group.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="0 gives the bicubic enlargement, 1 the full result. Values between pull every "
        "prediction towards the input (default 1, less where the model file says so)",
    )
    group.add_argument(
        "--prompt", metavar="TEXT", help='what the video shows (default "a good video")'
    )
    group.add_argument(
        "--positive",
        metavar="TEXT",
        help="words for good quality, added to the prompt (default STAR's)",
    )
    group.add_argument(
        "--negative", metavar="TEXT", help="words for what to avoid (default STAR's)"
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="which learned prompt to use, for models that have them: faithful (default) or sharp "
        "with tiny",
    )
    group.add_argument(
        "--cfg",
        type=float,
        metavar="X",
        help="guidance scale; 1 switches guidance off and halves the work",
    )
    group.add_argument(
        "--cfg-rescale",
        type=float,
        metavar="X",
        help="0 to 1, by how much the contrast that guidance adds is reduced",
    )
    group.add_argument(
        "--noise-level",
        type=int,
        metavar="N",
        help="timestep where denoising starts, 0 to 1000: the higher, the freer the model is "
        "(900 for STAR)",
    )
    group.add_argument(
        "--color-fix",
        choices=("adain", "wavelet", "none"),
        help="match the input's colours by the statistics of each frame, by its low frequencies, "
        "or not at all",
    )
    group.add_argument(
        "--seed", type=int, default=666, metavar="N", help="of the noise, 0 to 2^64-1 (default 666)"
    )

    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--memory",
        type=MEMORY,
        metavar="M",
        help="choose chunks, tiles, slices and offloading to fit into this much memory, such as "
        "12G for 12 GiB (default on a GPU, unless one of them is given: nine tenths of its memory)",
    )
    group.add_argument(
        "--steps", type=int, metavar="N", help="evaluations of the network in solver mode normal"
    )
    group.add_argument(
        "--solver-mode",
        choices=("fast", "normal"),
        help="fast: STAR's own 14 evaluations; normal: as many as --steps says",
    )
    group.add_argument("--sampler", choices=SOLVERS, help="which solver to use")
    group.add_argument(
        "--cfg-mode",
        choices=("constant", "dynamic"),
        help="dynamic varies the guidance scale between 1 and 1 + cfg, as CogVideoX does",
    )
    group.add_argument(
        "--spacing",
        choices=("star", "diffusers"),
        help="timestep spacing on CogVideoX: the original's or that of diffusers' scheduler",
    )
    group.add_argument(
        "--fade",
        action="store_true",
        help="on CogVideoX: blend neighbouring chunks only, and do not hold the shared frames "
        "to those of the chunk before",
    )
    group.add_argument(
        "--chunk-frames",
        type=int,
        metavar="N",
        help="most frames that are denoised together (default 32; on CogVideoX 25, and 4k+1)",
    )
    group.add_argument(
        "--chunk-overlap",
        type=int,
        metavar="N",
        help="frames that neighbouring chunks share (default 3 of 16, with --reference half)",
    )
    group.add_argument(
        "--merge-up-to",
        type=int,
        default=128,
        metavar="N",
        help="merge the chunks of shots of up to N frames (default 128) at every step; in longer "
        "shots one chunk follows the other and starts from the frames that they share",
    )
    group.add_argument(
        "--segment",
        type=int,
        metavar="N",
        help="restore shots in independent segments of N frames, so that batch can spread a long "
        "shot over several workers",
    )
    group.add_argument(
        "--tile",
        type=TILE,
        metavar="N[:OVERLAP]",
        help="run the VAE in tiles of N pixels of the result (overlap: a quarter of N)",
    )
    group.add_argument(
        "--latent-tile",
        type=TILE,
        metavar="N[:OVERLAP]",
        help="run the network in tiles of N pixels of the result (overlap: a quarter of N), "
        "blended at every step, so that memory does not grow with the frame",
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="keep idle weights and skip connections in system memory to save that of the GPU",
    )
    group.add_argument(
        "--fast",
        action="store_true",
        help="use the three shortcuts below with settings made for speed; their effect on the "
        "published weights is not known yet",
    )
    group.add_argument(
        "--guidance",
        type=FRAMES,
        metavar="A:B",
        help="use guidance only from timestep A to B, of 0 to 1000",
    )
    group.add_argument(
        "--attention-window",
        type=int,
        metavar="N",
        help="limit full-resolution attention to windows of N x N latents, shifted in every other "
        "layer",
    )
    group.add_argument(
        "--reuse",
        type=int,
        metavar="N",
        help="reuse deep features for up to N timesteps, 0 (default) to 1000",
    )
    group.add_argument(
        "--cache",
        type=float,
        metavar="X",
        help="leave out evaluations where the prediction is expected to change by at most this "
        "fraction, such as 0.02; 0 (default) computes all",
    )
    group.add_argument(
        "--attention",
        choices=("sdpa", "flash", "sage"),
        default="sdpa",
        help="torch's own attention (sdpa, default), or that of the package flash-attn or "
        "sageattention, on GPUs and in 16 bits; sage rounds to 8 bit within",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="let torch compile the network's blocks, which takes minutes before the first frame "
        "and needs a C++ compiler or Triton; for long runs",
    )
    add_compute(group)

    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        default="tiny",
        metavar="MODEL",
        help="tiny (built in, default), light_deg, heavy_deg, or a file",
    )
    add_lora(group)
    add_parts(group)
    group.add_argument(
        "--decoder",
        metavar="FILE",
        help="a small decoder in place of the VAE's own: of train --trains decoder, or TAESD's",
    )

    group = parser.add_argument_group("files")
    group.add_argument(
        "--stills",
        action="store_true",
        help="restore a folder of unrelated pictures, each by itself, into the folder OUT",
    )
    group.add_argument(
        "--deinterlace",
        choices=("auto", "off"),
        default="auto",
        help="turn frames that are marked as interlaced into whole frames (default auto)",
    )
    group.add_argument(
        "--codec",
        choices=("h264", "h265"),
        help="of an .mp4 file (default h264, for sources of more than 8 bits h265)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    group.add_argument(
        "--keep-work",
        action="store_true",
        help="keep the intermediate results when OUT is done. A run that is stopped always keeps "
        "them, and the same command continues from there",
    )
    group.add_argument(
        "--reference",
        action="store_true",
        help="reproduce the original implementation with its quirks; --frames and --crop are then "
        "restored as clips of their own",
    )


def run_upscale(args: argparse.Namespace) -> None:
    from ..model import load
    from ..upscale import upscale

    start, first = time.monotonic(), []
    run, options = run_spec(args)
    result = upscale(
        run.job,
        run.whole,
        lambda prompts: load(run.files, prompts, **run.computing, **run.loading),
        get_shots=run.get_shots,
        on_progress=Progress(),
        on_frame=lambda frame: first.append(time.monotonic() - start) if not first else None,
    )
    if args.compile:
        sys.stderr.write(f"the first frame was ready after {first[0]:.0f} seconds\n")
    if args.json:
        settings = run.whole.settings
        shots = options.report or [report_of(options.shot(None))]
        report = {
            "input": args.source,
            "output": args.out,
            **result,
            "model": str(run.files.model),
            **{name: value for name, value in shots[0].items() if name != "start"},
            "shots": shots,
            "seed": args.seed,
            "behaviour": settings.behaviour.name,
            "device": str(run.whole.execution.device),
            "dtype": str(run.precision.network).removeprefix("torch."),
            "vae_dtype": str(run.precision.vae).removeprefix("torch."),
            "seconds": round(time.monotonic() - start, 3),
            "seconds_to_first_frame": round(first[0], 3),
        }
        print(json.dumps(report))


def run_spec(args: argparse.Namespace) -> "tuple[RunSpec, RunOptions]":
    """Returns the run that the options describe, and the options for each shot.

    Raises ValueError for everything that can be refused without opening the video.
    """
    from ..model import check_prompts, find_model
    from ..models.attention import attention_of
    from ..models.slicing import Slicing
    from ..parity import DEFAULT
    from ..pipeline import Execution, Settings
    from ..planning.duration import stored_machine
    from ..upscale import Job, RunSpec
    from ..windows.chunking import ChunkConfig, usual_overlap

    device, dtype = compute(args)
    machine = stored_machine(device)
    attention_of(args.attention)
    files = find_model(
        args.model,
        vae=args.vae,
        text_encoder=args.text_encoder,
        models_dir=args.models_dir,
        loras=args.lora,
        decoder=args.decoder,
    )
    job = Job(
        source=Path(args.source),
        out=Path(args.out),
        scale=args.scale if args.scale is not None else None if args.out_size else 4.0,
        out_size=args.out_size,
        frames=args.frames and (args.frames[0] or 0, args.frames[1]),
        crop=args.crop,
        stills=args.stills,
        deinterlace=args.deinterlace,
        codec=args.codec,
        overwrite=args.overwrite,
        keep_work=args.keep_work,
    )
    if args.stills and args.auto:
        raise ValueError("stills may have suffered differently: leave out --auto or --stills")
    backbone = files.backbone
    memory = _memory(args, device)
    behaviour = backbone.reference if args.reference else DEFAULT
    own, latents = files.sampling, files.info.latents or {}
    length, overlap = args.chunk_frames, args.chunk_overlap
    latent_frames = latents.get("frames", 1)
    length = own.chunk_frames if length is None else length
    if overlap is None:
        overlap = usual_overlap(length, behaviour.overlap, latent_frames)
    common = Settings(
        seed=args.seed,
        chunk=ChunkConfig(
            length=length,
            overlap=overlap,
            latent_frames=latent_frames,
            hold=not args.fade,
            merged=args.merge_up_to,
            segment=args.segment,
        ),
        tile=_tile(args.tile),
        latent_tile=_tile(args.latent_tile),
        shortcuts=_shortcuts(args),
        behaviour=behaviour,
    )
    execution = Execution(device=device, slicing=Slicing(offload=args.offload))
    options = RunOptions(
        args,
        files,
        common,
        execution,
        backbone.precision(device, dtype),
        memory,
        add_options,
    )
    whole = options.shot(None)
    check_prompts(files, whole.prompts)
    sampling = whole.settings.sampling
    if sampling.solver_mode == "fast" and args.steps is not None and not args.reference:
        raise ValueError(
            "solver mode fast has steps of its own: leave out --steps, or add --solver-mode normal"
        )
    run = RunSpec(
        job=job,
        files=files,
        whole=whole,
        dtype=dtype,
        attention=args.attention,
        compiled=args.compile,
        channels_last=machine is not None and machine.channels_last,
        get_shots=lambda source: options.shot_settings(source, job),
    )
    return run, options


def _memory(args: argparse.Namespace, device: "torch.device") -> int | None:
    """Bytes to plan for; None where the user chooses, or where memory is not the device's own."""
    from ..devices import usable_memory

    names = ("chunk_frames", "chunk_overlap", "tile", "latent_tile")
    given = [n for n in names if getattr(args, n) is not None] + ["offload"] * args.offload
    if args.memory is not None and given:
        raise ValueError(f"--memory chooses --{given[0].replace('_', '-')}: leave one of them out")
    return usable_memory(device) if args.memory is None and not given else args.memory


def _shortcuts(args: argparse.Namespace) -> "Shortcuts":
    from ..diffusion.shortcuts import FAST, Shortcuts

    shortcuts = FAST if args.fast else Shortcuts()
    if args.guidance is not None:
        low, high = args.guidance
        shortcuts = replace(shortcuts, guidance=(low or 0, 1000 if high is None else high))
    switches = {name: getattr(args, name) for name in ("attention_window", "reuse", "cache")}
    return replace(shortcuts, **{k: v for k, v in switches.items() if v is not None})


def _tile(given: tuple[int, int | None] | None) -> "Tile | None":
    from ..windows.tiling import Tile

    if given is None:
        return None
    size, overlap = given
    return Tile(size=size, overlap=size // 4 if overlap is None else overlap)
