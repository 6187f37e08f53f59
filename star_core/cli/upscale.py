"""`upscale`: from file to file."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import CROP, FRAMES, MEMORY, SIZE, TILE, add_compute, add_json, compute
from .progress import Progress
from .shots import RunOptions, add_shots, told

if TYPE_CHECKING:
    import torch

    from ..diffusion.shortcuts import Shortcuts
    from ..upscale import RunSpec
    from ..windows.tiling import Tile

SOLVERS = ("dpmpp_2m_sde", "dpmpp_2m_sde_renewed", "heun")


def add_upscale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="IN", help="a video, images numbered like %%05d.png, or a folder of them"
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help=".mkv (lossless), .mp4, .mov, .webm, a folder or %%05d.png for PNG",
    )
    add_options(parser)
    add_json(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """How to restore, whichever files."""
    group = parser.add_argument_group("size and part")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--scale", type=float, metavar="S", help="how much larger, any number from 1 (default 4)"
    )
    size.add_argument("--out-size", type=SIZE, metavar="WxH", help="or the exact size")
    group.add_argument(
        "--frames", type=FRAMES, metavar="A:B", help="preview of frames A to B-1, counted from 0"
    )
    group.add_argument(
        "--crop",
        type=CROP,
        metavar="WxH+X+Y",
        help="preview of this part of the picture, in pixels of the input as displayed",
    )

    add_shots(group)

    group = parser.add_argument_group("look (what is not given, the model file says)")
    group.add_argument(
        "--auto",
        action="store_true",
        help="measure blur, noise and compression of the input and choose what is not given here",
    )
    group.add_argument(
        "--shrink",
        type=float,
        metavar="X",
        help="make the input smaller by X first, from 1 (default); the result's size stays. For "
        "a clip that is blurred far below its size",
    )
    group.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="0 is the bicubic input, 1 (default) the full result; between them each prediction "
        "of the model is pulled towards the input's latents",
    )
    group.add_argument("--prompt", metavar="TEXT", help='what the video shows ("a good video")')
    group.add_argument(
        "--positive", metavar="TEXT", help="what makes it good, added to the prompt (STAR's words)"
    )
    group.add_argument(
        "--negative", metavar="TEXT", help="what it must not look like (STAR's words)"
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="of a model with learned prompts; tiny has faithful (default) and sharp",
    )
    group.add_argument(
        "--cfg", type=float, metavar="X", help="guidance scale; 1 is none and twice as fast"
    )
    group.add_argument(
        "--cfg-rescale", type=float, metavar="X", help="0 to 1, tames the contrast of guidance"
    )
    group.add_argument(
        "--noise-level",
        type=int,
        metavar="N",
        help="0 to 1000, how much of the input is forgotten before it is restored (STAR: 900)",
    )
    group.add_argument(
        "--color-fix",
        choices=("adain", "wavelet", "none"),
        help="keep the input's colours by frame statistics, by low frequencies, or not",
    )
    group.add_argument(
        "--seed", type=int, default=666, metavar="N", help="0 to 2^64-1 (default 666)"
    )

    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--memory",
        type=MEMORY,
        metavar="M",
        help="choose chunks, tiles, slices and offloading for so much memory, 12G is 12 GiB. On a "
        "GPU, where none of them is given, nine tenths of what it has",
    )
    group.add_argument(
        "--steps", type=int, metavar="N", help="evaluations of the network in solver mode normal"
    )
    group.add_argument(
        "--solver-mode",
        choices=("fast", "normal"),
        help="fast takes STAR's 14 evaluations, normal takes --steps",
    )
    group.add_argument("--sampler", choices=SOLVERS, help="the solver")
    group.add_argument(
        "--cfg-mode",
        choices=("constant", "dynamic"),
        help="dynamic lets --cfg swing as on CogVideoX",
    )
    group.add_argument(
        "--levels",
        choices=("star", "diffusers"),
        help="on CogVideoX: the noise levels of the original, or of diffusers' scheduler",
    )
    group.add_argument(
        "--fade",
        action="store_true",
        help="on CogVideoX: chunks only fade into each other and do not hold what they share",
    )
    group.add_argument(
        "--chunk-frames",
        type=int,
        metavar="N",
        help="most frames that the network sees together (default 32; on CogVideoX 25, and 4k+1)",
    )
    group.add_argument(
        "--chunk-overlap",
        type=int,
        metavar="N",
        help="frames shared by neighbouring chunks (default 3 of 16, with --reference half)",
    )
    group.add_argument(
        "--merge-up-to",
        type=int,
        default=128,
        metavar="N",
        help="shots of up to N frames (default 128) merge their chunks at every step; those of "
        "longer ones come one after the other, with what they share handed on",
    )
    group.add_argument(
        "--segment",
        type=int,
        metavar="N",
        help="shots in segments of N frames, each as if the others were not there, so that batch "
        "can share out a long shot",
    )
    group.add_argument(
        "--tile",
        type=TILE,
        metavar="N[:OVERLAP]",
        help="VAE in squares of N pixels of the result (overlap a quarter), for little memory",
    )
    group.add_argument(
        "--latent-tile",
        type=TILE,
        metavar="N[:OVERLAP]",
        help="network in squares of N pixels of the result (overlap a quarter), joined at every "
        "step: memory then does not depend on the size",
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="what the network keeps for later waits in main memory: for GPUs",
    )
    group.add_argument(
        "--fast",
        action="store_true",
        help="the three below as set for speed; how real weights take it is not yet known",
    )
    group.add_argument(
        "--guidance",
        type=FRAMES,
        metavar="A:B",
        help="the negative prompt counts from noise level A to B only, of 0 to 1000",
    )
    group.add_argument(
        "--attention-window",
        type=int,
        metavar="N",
        help="the finest attention in space stays in squares of N latents",
    )
    group.add_argument(
        "--reuse",
        type=int,
        metavar="N",
        help="what the coarser levels found counts for N noise levels more (0 to 1000)",
    )
    add_compute(group)

    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        default="tiny",
        metavar="FILE",
        help="tiny (built in, default), light_deg, heavy_deg, or a file",
    )
    group.add_argument("--vae", metavar="FILE", help="the VAE of Stable Video Diffusion")
    group.add_argument("--text-encoder", metavar="FILE", help="OpenCLIP ViT-H-14")
    group.add_argument(
        "--models-dir",
        metavar="FOLDER",
        help="where models are sought, besides beside the model and in ComfyUI",
    )

    group = parser.add_argument_group("files")
    group.add_argument(
        "--stills", action="store_true", help="IN is a folder of unrelated pictures, OUT a folder"
    )
    group.add_argument(
        "--deinterlace",
        choices=("auto", "off"),
        default="auto",
        help="whole frames from those marked as two fields (auto, default)",
    )
    group.add_argument("--codec", choices=("h264", "h265"), help="for .mp4 (default h264)")
    group.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    group.add_argument(
        "--keep-work",
        action="store_true",
        help="keep the finished parts when OUT is done; a run that is stopped always keeps them, "
        "and the same command goes on from there",
    )
    group.add_argument(
        "--reference",
        action="store_true",
        help="do what the original implementation does, quirks included; --frames and --crop are "
        "then restored as clips of their own",
    )


def run_upscale(args: argparse.Namespace) -> None:
    from ..model import load
    from ..upscale import upscale

    start = time.monotonic()
    run, wanted = ordered(args)
    result = upscale(
        run.job,
        run.whole,
        lambda prompts: load(run.files, prompts, **run.loading),
        get_shots=run.get_shots,
        on_progress=Progress(),
    )
    if args.json:
        settings = run.whole.settings
        shots = wanted.report or [told(wanted.shot(None))]
        report = {
            "input": args.source,
            "output": args.out,
            **result,
            "model": str(run.files.model),
            **{name: value for name, value in shots[0].items() if name != "start"},
            "shots": shots,
            "seed": args.seed,
            "behaviour": settings.behaviour.name,
            "device": str(settings.device),
            "dtype": str(run.dtype).removeprefix("torch."),
            "seconds": round(time.monotonic() - start, 3),
        }
        print(json.dumps(report))


def ordered(args: argparse.Namespace) -> "tuple[RunSpec, RunOptions]":
    """What the options ask for, with all that can be checked without the video checked."""
    from ..backbones import BACKBONES, I2VGENXL
    from ..model import check_prompts, find_model
    from ..models.slicing import Slicing
    from ..parity import DEFAULT
    from ..pipeline import Settings
    from ..sampling_defaults import SamplingDefaults
    from ..upscale import Job, RunSpec
    from ..windows.chunking import ChunkConfig, usual_overlap

    device, dtype = compute(args)
    files = find_model(
        args.model, vae=args.vae, text_encoder=args.text_encoder, models_dir=args.models_dir
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
    backbone = BACKBONES[files.info.backbone or I2VGENXL.name]
    memory = _memory(args, device)
    behaviour = backbone.reference if args.reference else DEFAULT
    own, latents = SamplingDefaults(**(files.info.sampling or {})), files.info.latents or {}
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
        slicing=Slicing(offload=args.offload),
        shortcuts=_shortcuts(args),
        behaviour=behaviour,
        device=device,
    )
    wanted = RunOptions(args, files, common, dtype, memory)
    whole = wanted.shot(None)
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
        get_shots=lambda source: wanted.shot_settings(source, job),
    )
    return run, wanted


def _memory(args: argparse.Namespace, device: "torch.device") -> int | None:
    """Bytes to plan for; None where the user chooses, or where memory is not the device's own."""
    import torch

    names = ("chunk_frames", "chunk_overlap", "tile", "latent_tile")
    given = [n for n in names if getattr(args, n) is not None] + ["offload"] * args.offload
    if args.memory is not None and given:
        raise ValueError(f"--memory chooses --{given[0].replace('_', '-')}: leave one of them out")
    if args.memory is None and not given and device.type == "cuda":
        # Not what is free: the same command must find the same plan again.
        return int(0.9 * torch.cuda.get_device_properties(device).total_memory)
    return args.memory


def _shortcuts(args: argparse.Namespace) -> "Shortcuts":
    from ..diffusion.shortcuts import FAST, Shortcuts

    shortcuts = FAST if args.fast else Shortcuts()
    if args.guidance is not None:
        low, high = args.guidance
        shortcuts = replace(shortcuts, guidance=(low or 0, 1000 if high is None else high))
    switches = {name: getattr(args, name) for name in ("attention_window", "reuse")}
    return replace(shortcuts, **{k: v for k, v in switches.items() if v is not None})


def _tile(given: tuple[int, int | None] | None) -> "Tile | None":
    from ..windows.tiling import Tile

    if given is None:
        return None
    size, overlap = given
    return Tile(size=size, overlap=size // 4 if overlap is None else overlap)
