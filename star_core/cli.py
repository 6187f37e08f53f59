"""The command line: parses, calls, prints. Everything heavy is imported by the command run."""

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

SUCCESS, CAN_BE_MENDED, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. 0 on success, 2 for what the user can mend, 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return args.run(args) or SUCCESS
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except MemoryError:
        reason = "not enough memory"
    except (ValueError, OSError) as error:
        reason = str(error)
    except RuntimeError as error:  # torch has no class of its own for a full main memory
        if not re.search(r"out of memory|not enough memory|can't allocate memory", str(error)):
            raise
        reason = "not enough memory: try --tile 256, a smaller --chunk-frames or a smaller --scale"
    return _complain(f"error: {reason}", CAN_BE_MENDED)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(" ".join(message.split()) + "\n")
    return code


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(CAN_BE_MENDED, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m star_core", description="STAR video super-resolution.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, run, add, text in (
        ("upscale", _upscale, _add_upscale, "restore and enlarge a video"),
        ("demo", _demo, _add_demo, "restore the clip that comes along and measure the result"),
        ("info", _info, _add_info, "tell what a model file is"),
        ("convert", _convert, _add_convert, "write a checkpoint as safetensors"),
        ("verify", _verify, _add_verify, "replay test vectors of the reference implementation"),
        ("manifest", _manifest, _add_manifest, "print a network's keys and shapes as JSON"),
        ("bench", _bench, _add_bench, "measure how fast the network runs on this machine"),
        ("train", _train, _add_train, "train a model"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        add(command)
        command.set_defaults(run=run)
    return parser


# Arguments in the notation of the command line -------------------------------------------------


def _numbers(pattern: str, example: str) -> Any:
    def parse(text: str) -> tuple[int | None, ...]:
        match = re.fullmatch(pattern, text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form {example}")
        return tuple(int(number) if number else None for number in match.groups())

    return parse


_SIZE = _numbers(r"(\d+)x(\d+)", "WIDTHxHEIGHT, such as 1920x1080")
_CROP = _numbers(r"(\d+)x(\d+)\+(\d+)\+(\d+)", "WxH+X+Y, such as 320x180+100+50")
_FRAMES = _numbers(r"(\d*):(\d*)", "A:B, such as 10:20, 10: or :20")
_TILE = _numbers(r"(\d+)(?::(\d+))?", "SIZE or SIZE:OVERLAP, such as 512 or 512:64")


def _add_compute(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", default="auto", help="where to compute: auto (default), cpu, cuda, cuda:1 ..."
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision; auto (default) is float16 on a GPU, float32 otherwise",
    )


def _compute(args: argparse.Namespace) -> "tuple[torch.device, torch.dtype]":
    import torch

    from .offload import keep_freed_memory

    keep_freed_memory()
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name} cannot be used ({reason}): try --device cpu") from None
    if args.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.float16
    return device, getattr(torch, args.dtype)


def _add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


# upscale ---------------------------------------------------------------------------------------


def _add_upscale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="IN", help="a video, images numbered like %%05d.png, or a folder of them"
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help=".mkv (lossless), .mp4, .mov, a folder or %%05d.png for PNG",
    )

    group = parser.add_argument_group("size and part")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--scale", type=float, metavar="S", help="how much larger, any number from 1 (default 4)"
    )
    size.add_argument("--out-size", type=_SIZE, metavar="WxH", help="or the exact size")
    group.add_argument(
        "--frames", type=_FRAMES, metavar="A:B", help="preview of frames A to B-1, counted from 0"
    )
    group.add_argument(
        "--crop",
        type=_CROP,
        metavar="WxH+X+Y",
        help="preview of this part of the picture, in pixels of the input as displayed",
    )

    group = parser.add_argument_group("look (what is not given, the model file says)")
    group.add_argument(
        "--strength",
        type=float,
        default=1.0,
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
        "--steps", type=int, metavar="N", help="evaluations of the network in solver mode normal"
    )
    group.add_argument(
        "--solver-mode",
        choices=("fast", "normal"),
        help="fast takes STAR's 14 evaluations, normal takes --steps",
    )
    group.add_argument("--sampler", choices=("dpmpp_2m_sde", "heun"), help="the solver")
    group.add_argument(
        "--chunk-frames",
        type=int,
        default=32,
        metavar="N",
        help="most frames that the network sees together (default 32)",
    )
    group.add_argument(
        "--chunk-overlap",
        type=int,
        metavar="N",
        help="frames shared by neighbouring chunks (default half of --chunk-frames)",
    )
    group.add_argument(
        "--tile",
        type=_TILE,
        metavar="N[:OVERLAP]",
        help="VAE in squares of N pixels of the result (overlap a quarter), for little memory",
    )
    _add_compute(group)

    group = parser.add_argument_group("models")
    group.add_argument(
        "--model", default="tiny", metavar="FILE", help="tiny (built in, default) or a file"
    )
    group.add_argument("--vae", metavar="FILE", help="the VAE of Stable Video Diffusion")
    group.add_argument("--text-encoder", metavar="FILE", help="OpenCLIP ViT-H-14")
    group.add_argument(
        "--models-dir",
        metavar="FOLDER",
        help="where VAE and text encoder are sought, besides beside the model and in ComfyUI",
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
        "--reference",
        action="store_true",
        help="do what the original implementation does, quirks included; --frames and --crop are "
        "then restored as clips of their own",
    )
    _add_json(group)


def _upscale(args: argparse.Namespace) -> None:
    from .backbones import SamplingDefaults
    from .behaviour import DEFAULT, REFERENCE
    from .chunking import ChunkConfig
    from .pipeline import Settings
    from .tiling import Tile
    from .upscale import Job, find_model, load, upscale

    start = time.monotonic()
    device, dtype = _compute(args)
    files = find_model(
        args.model, vae=args.vae, text_encoder=args.text_encoder, models_dir=args.models_dir
    )
    prompts = {name: getattr(args, name) for name in ("prompt", "positive", "negative")}
    defaults = SamplingDefaults(**(files.info.sampling or {}))
    names = ("steps", "solver_mode", "sampler", "cfg", "cfg_rescale", "noise_level", "color_fix")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampling = replace(defaults, **given)
    if sampling.solver_mode == "fast" and "steps" in given and not args.reference:
        raise ValueError(
            "solver mode fast has steps of its own: leave out --steps, or add --solver-mode normal"
        )
    overlap = args.chunk_overlap
    tile = args.tile and (args.tile[0], args.tile[0] // 4 if args.tile[1] is None else args.tile[1])
    settings = Settings(
        sampling=sampling,
        strength=args.strength,
        seed=args.seed,
        chunk=ChunkConfig(
            length=args.chunk_frames,
            overlap=max(args.chunk_frames // 2, 0) if overlap is None else overlap,
        ),
        tile=tile and Tile(size=tile[0], overlap=tile[1]),
        behaviour=REFERENCE if args.reference else DEFAULT,
        device=device,
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
    )
    result = upscale(
        job,
        settings,
        lambda: load(files, **prompts, behaviour=settings.behaviour, device=device, dtype=dtype),
        on_progress=Progress(),
    )
    if args.json:
        report = {
            "input": args.source,
            "output": args.out,
            **result,
            "model": str(files.model),
            "sampling": asdict(sampling),
            "strength": args.strength,
            "seed": args.seed,
            "behaviour": settings.behaviour.name,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "seconds": round(time.monotonic() - start, 3),
        }
        print(json.dumps(report))


class Progress:
    """What is being done and the time that it will still take, on stderr.

    One line that is rewritten in a terminal; elsewhere a line every ten seconds.
    """

    STAGES = ("encode", "denoise", "decode")

    def __init__(self) -> None:
        self.began = self.shown = 0.0
        self.terminal = sys.stderr.isatty()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self.began = now
        elif now - self.shown < (0.2 if self.terminal else 10) and done < total:
            return
        self.shown = now
        line = f"{self.STAGES.index(stage) + 1}/{len(self.STAGES)} {stage} {done}/{total}"
        if done:
            line += f", {_clock((now - self.began) / done * (total - done))} left"
        end = "\n" if done == total or not self.terminal else ""
        sys.stderr.write(("\r\x1b[K" if self.terminal else "") + line + end)
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# demo ------------------------------------------------------------------------------------------


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="restore a few frames only")
    parser.add_argument(
        "--out", default="out", metavar="FOLDER", help="where the results go (default out)"
    )
    parser.add_argument(
        "--remake",
        metavar="CITYCC0.MPG",
        help="make the shipped clips again from the film that they were cut from",
    )
    _add_compute(parser)
    _add_json(parser)


def _demo(args: argparse.Namespace) -> None:
    from . import demo

    if args.remake:
        demo.remake(Path(args.remake), Path(args.out))
        return
    device, dtype = _compute(args)
    result = demo.demo(
        Path(args.out), quick=args.quick, device=device, dtype=dtype, on_progress=Progress()
    )
    print(json.dumps(asdict(result)) if args.json else result)


# model files -----------------------------------------------------------------------------------


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a checkpoint, or tiny")
    _add_json(parser)


def _info(args: argparse.Namespace) -> None:
    from .checkpoints import describe
    from .upscale import BUILT_IN

    info = describe(BUILT_IN[args.file][0] if args.file in BUILT_IN else args.file)
    print(json.dumps(asdict(info)) if args.json else info)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a checkpoint: .pt, .pth, .ckpt, .bin ...")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of the weights (default: as they are)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def _convert(args: argparse.Namespace) -> None:
    import torch

    from .checkpoints import convert

    dtype = args.dtype and getattr(torch, args.dtype)
    convert(args.source, args.out, dtype, overwrite=args.overwrite)


def _add_manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", choices=("i2vgenxl",), help="whose")


def _manifest(args: argparse.Namespace) -> None:
    from .models.unet import ControlledVideoUNet, UNetConfig

    network = ControlledVideoUNet(UNetConfig(), device="meta")
    print(json.dumps({key: list(value.shape) for key, value in network.state_dict().items()}))


# measuring and training ------------------------------------------------------------------------


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="every case below it is replayed")
    _add_json(parser)


def _verify(args: argparse.Namespace) -> int:
    from .verify import run

    return run(args.folder, args.json)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="how often to repeat (default 5)"
    )
    _add_compute(parser)
    _add_json(parser)


def _bench(args: argparse.Namespace) -> None:
    from .bench import run
    from .checkpoints import describe
    from .models.unet import UNetConfig
    from .upscale import BUILT_IN

    device, dtype = _compute(args)
    tiny = UNetConfig(**(describe(BUILT_IN["tiny"][0]).config or {}))
    run(tiny, rounds=args.rounds, device=str(device), dtype=dtype, as_json=args.json)


def _add_train(parser: argparse.ArgumentParser) -> None:
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


def _train(args: argparse.Namespace) -> None:
    from .training.tiny import train_tiny

    logging.getLogger(__package__).setLevel(logging.INFO)
    start = time.monotonic()
    first = 0

    def on_step(step: int, steps: int, parts: dict[str, float]) -> None:
        nonlocal first
        first = first or step - 1
        if step % 50 and step < steps:
            return
        left = (time.monotonic() - start) / (step - first) * (steps - step)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
        sys.stderr.write(f"step {step}/{steps}, {losses}, {_clock(left)} left\n")

    train_tiny(
        Path(args.data),
        Path(args.out),
        steps=args.steps,
        seed=args.seed,
        start=Path(args.start) if args.start else None,
        on_step=on_step,
    )
