"""What several commands share: notations, where to compute, JSON."""

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _numbers(pattern: str, example: str) -> Any:
    def parse(text: str) -> tuple[int | None, ...]:
        match = re.fullmatch(pattern, text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form {example}")
        return tuple(int(number) if number else None for number in match.groups())

    return parse


SIZE = _numbers(r"(\d+)x(\d+)", "WIDTHxHEIGHT, such as 1920x1080")
CROP = _numbers(r"(\d+)x(\d+)\+(\d+)\+(\d+)", "WxH+X+Y, such as 320x180+100+50")
FRAMES = _numbers(r"(\d*):(\d*)", "A:B, such as 10:20, 10: or :20")
TILE = _numbers(r"(\d+)(?::(\d+))?", "SIZE or SIZE:OVERLAP, such as 512 or 512:64")


def MEMORY(text: str) -> int:
    """12G and 12GiB are 12 * 2^30 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 12G, such as 7.5G or 800M")
    number, unit = match.groups()
    return int(float(number) * 1024 ** " KMGT".index(unit.upper() or " "))


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", default="auto", help="where to compute: auto (default), cpu, cuda, cuda:1 ..."
    )


def device_of(args: argparse.Namespace) -> "torch.device":
    import torch

    from ..memory import keep_freed_memory

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
    return device


def add_compute(parser: argparse._ActionsContainer) -> None:
    add_device(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision; auto (default) is float16 on a GPU, float32 otherwise",
    )


def compute(args: argparse.Namespace) -> "tuple[torch.device, torch.dtype]":
    import torch

    device = device_of(args)
    if args.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.float16
    return device, getattr(torch, args.dtype)


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_flow(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--flow",
        choices=("dis", "raft"),
        default="dis",
        help="what finds motion: OpenCV's DIS (default), or RAFT, which needs its weights",
    )


def add_weights(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--weights",
        metavar="FOLDER",
        help="where the weights of metrics lie (default STAR_METRIC_WEIGHTS, else "
        "models/star_metrics of ComfyUI, else a folder in the user's cache)",
    )
