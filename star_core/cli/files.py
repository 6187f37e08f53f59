"""`download`, `info`, `convert`, `manifest`: model files."""

import argparse
import json
import os
from dataclasses import asdict

from .arguments import add_json
from .progress import Progress


def add_download(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("names", metavar="NAME", nargs="*", default=[], help="such as light_deg")
    what.add_argument("--list", action="store_true", help="print the names and what they are")
    parser.add_argument(
        "--models-dir",
        metavar="FOLDER",
        help="the folder for them (default: ComfyUI's models folder)",
    )


def run_download(args: argparse.Namespace) -> None:
    from ..checkpoints.download import PUBLISHED, download, published
    from ..checkpoints.find import comfyui_folder

    if args.list:
        for name, file in PUBLISHED.items():
            print(f"{name}: {file.title}, {file.source}, stored as {file.folder}/{file.file}")
        return
    for name in args.names:
        published(name)  # before any of them is fetched
    models_dir = args.models_dir
    if models_dir is None:
        root = comfyui_folder()
        if root is None:
            raise ValueError("no ComfyUI found: say where the files go with --models-dir FOLDER")
        models_dir = root / "models"
    # Its bars would be drawn over ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    progress = Progress(args.names, unit=" MB")
    for name in args.names:

        def on_progress(done: int, total: int, name: str = name) -> None:
            progress(name, done // 10**6, total // 10**6)

        print(download(name, models_dir, on_progress=on_progress))


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a checkpoint, or tiny")
    add_json(parser)


def run_info(args: argparse.Namespace) -> None:
    from ..file_info import describe
    from ..model import BUILT_IN

    info = describe(BUILT_IN[args.file][0] if args.file in BUILT_IN else args.file)
    print(json.dumps(asdict(info)) if args.json else info)


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a checkpoint: .pt, .pth, .ckpt, .bin ...")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--dtype",
        # The last are `quantization.WRITTEN`, without torch.
        choices=("float32", "float16", "bfloat16", "fp8_scaled", "int8", "nvfp4"),
        help="type of the weights (default: unchanged); the last three quantise the linear "
        "layers of a STAR network as ComfyUI does",
    )
    parser.add_argument(
        "--shift",
        type=float,
        metavar="S",
        help="SNR shift of the schedule of a STAR network on CogVideoX (default: by its size)",
    )
    parser.add_argument(
        "--latent-scale",
        type=float,
        metavar="S",
        help="scale of the latents of a STAR network on CogVideoX (default: by its size)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def run_convert(args: argparse.Namespace) -> None:
    import torch

    from ..checkpoints.quantization import WRITTEN
    from ..conversion import convert

    dtype = args.dtype and (WRITTEN.get(args.dtype) or getattr(torch, args.dtype))
    convert(
        args.source,
        args.out,
        dtype,
        shift=args.shift,
        latent_scale=args.latent_scale,
        overwrite=args.overwrite,
    )


def add_manifest(parser: argparse.ArgumentParser) -> None:
    networks = ("i2vgenxl", "cogvideox-5b", "cogvideox-2b")  # `networks.SIZES`, without torch
    parser.add_argument(
        "network", choices=networks, help="the network whose published keys are printed"
    )


def run_manifest(args: argparse.Namespace) -> None:
    from ..backbones import I2VGENXL, SIZES, build_network
    from ..models.cogvideox_weights import in_sat_naming

    weights = build_network(SIZES[args.network], device="meta").state_dict()
    if args.network != I2VGENXL.name:
        weights = in_sat_naming(weights)
    print(json.dumps({key: list(value.shape) for key, value in weights.items()}))
