"""`info`, `convert`, `manifest`: model files."""

import argparse
import json
from dataclasses import asdict

from .arguments import add_json


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a checkpoint, or tiny")
    add_json(parser)


def run_info(args: argparse.Namespace) -> None:
    from ..checkpoints import describe
    from ..upscale import BUILT_IN

    info = describe(BUILT_IN[args.file][0] if args.file in BUILT_IN else args.file)
    print(json.dumps(asdict(info)) if args.json else info)


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a checkpoint: .pt, .pth, .ckpt, .bin ...")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of the weights (default: as they are)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def run_convert(args: argparse.Namespace) -> None:
    import torch

    from ..checkpoints import convert

    dtype = args.dtype and getattr(torch, args.dtype)
    convert(args.source, args.out, dtype, overwrite=args.overwrite)


def add_manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", choices=("i2vgenxl",), help="whose")


def run_manifest(args: argparse.Namespace) -> None:
    from ..models.unet import ControlledVideoUNet, UNetConfig

    network = ControlledVideoUNet(UNetConfig(), device="meta")
    print(json.dumps({key: list(value.shape) for key, value in network.state_dict().items()}))
