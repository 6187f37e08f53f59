"""Arguments that several commands share: notations, the device, JSON output."""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from ..training.videos import SampleSize


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


def LORA(text: str) -> tuple[str, float]:
    """few.safetensors:0.8 is a file and its strength; without a strength it is 1."""
    path, _, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if path else (text, 1.0)
    except ValueError:  # the colon is part of the path
        return text, 1.0


def add_size(parser: argparse._ActionsContainer) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--scale", type=float, metavar="S", help="enlarge by S, 1 or more (default 4)"
    )
    size.add_argument("--out-size", type=SIZE, metavar="WxH", help="enlarge to this size in pixels")


def add_parts(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--vae", metavar="FILE", help="the model's VAE (default: searched)")
    parser.add_argument(
        "--text-encoder", metavar="FILE", help="the model's text encoder (default: searched)"
    )
    parser.add_argument(
        "--models-dir",
        metavar="FOLDER",
        help="a further folder to search for model files, besides that of the model and ComfyUI's",
    )


def add_lora(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--lora",
        type=LORA,
        nargs="+",
        default=(),
        metavar="FILE[:STRENGTH]",
        help="add LoRA files to the network, each with a strength (default 1). A file may carry "
        "settings, such as few evaluations, that replace the model's",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="where to compute: cpu, cuda, cuda:1, mps or xpu; auto (default) is the first of "
        "cuda (ROCm too), mps, xpu and cpu that this machine has",
    )


def device_of(args: argparse.Namespace) -> "torch.device":
    import torch

    from ..devices import best_device

    name = args.device
    try:
        device = best_device() if name == "auto" else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name} cannot be used ({reason}): try --device cpu") from None
    torch.backends.cudnn.benchmark = True  # a run has few sizes: the fastest algorithm of each
    return device


def add_compute(parser: argparse._ActionsContainer) -> None:
    add_device(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision of the network; auto (default) is the original's on a GPU, float16 or "
        "bfloat16 (CogVideoX), and float32 on a CPU. The VAE has it too, except for float16",
    )


def compute(args: argparse.Namespace) -> "tuple[torch.device, torch.dtype | None]":
    """The device, and the type of the network or None for the one that suits it there."""
    import torch

    return device_of(args), None if args.dtype == "auto" else getattr(torch, args.dtype)


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_flow(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--flow",
        choices=("dis", "raft"),
        default="dis",
        help="optical flow by OpenCV's DIS (default) or by RAFT, whose weights must be fetched",
    )


def add_metric_folder(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--metric-folder",
        metavar="FOLDER",
        help="where the weights of metrics are (default: STAR_METRIC_WEIGHTS, else "
        "models/star_metrics of ComfyUI, else a folder in the user's cache)",
    )


def read_list(path: Path, what: str) -> list[Any]:
    """Returns the list in a JSON file, which may begin with a byte-order mark.

    what: what the list holds, for messages. ValueError if the file cannot be read or holds anything
    else than a list with at least one entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of {what}, with at least one")
    return entries


class _Raising(argparse.ArgumentParser):
    """Raises ValueError instead of ending the program, and accepts no abbreviated names."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument \S+: (?!not allowed)", "", message))


def options_from_json(
    add_options: Callable[[argparse.ArgumentParser], None], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Checks and converts values from JSON as if they were options of the command line.

    add_options: adds the options to a parser. values: by the options' names, with - or _. where:
    the place in the file, for messages. ValueError, such as "jobs.json, job 2, steps: ...", for an
    unknown name, a value of another JSON type than the option's, or one that the option refuses.
    """
    parser = _Raising()
    add_options(parser)
    actions = {action.dest: action for action in parser._actions}
    result, everything = {}, []
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in actions:
            raise ValueError(f"{where}: there is no option {name}")
        action = actions[key]
        expected = _JSON_TYPES.get(action.type, ("a string", str))
        if action.nargs == 0:
            expected = ("true or false", bool)
        if action.nargs == "+":
            expected = ("a string or a list of strings", (str, list))
        if not isinstance(value, expected[1]) or isinstance(value, bool) != (action.nargs == 0):
            raise ValueError(f"{where}, {name}: must be {expected[0]}, not {json.dumps(value)}")
        option = f"--{key.replace('_', '-')}"
        arguments = [option] * value if action.nargs == 0 else [f"{option}={value}"]
        if isinstance(value, list):
            arguments = [option, *map(str, value)]
        everything += arguments
        try:
            result[key] = getattr(parser.parse_args(arguments), key)
        except ValueError as error:
            raise ValueError(f"{where}, {name}: {error}") from None
    try:
        parser.parse_args(everything)
    except ValueError as error:  # options that exclude each other
        raise ValueError(f"{where}: {error}") from None
    return result


_JSON_TYPES: dict[Any, tuple[str, Any]] = {
    int: ("an integer", int),
    float: ("a number", (int, float)),
}


def add_sample(parser: argparse._ActionsContainer) -> None:
    """Adds the options about the samples of a training."""
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


def sample_size(args: argparse.Namespace) -> "SampleSize":
    """Returns the size of samples by the options of `add_sample`."""
    from ..training.videos import SampleSize

    return SampleSize(
        frames=args.clip_frames, interval=args.interval, size=(args.size[1], args.size[0])
    )
