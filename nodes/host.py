"""Between the host's types and the core's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..star_core.star_checkpoint import FAITHFUL, SHARP
from ..star_core.windows.tiling import Tile
from .host_features import check_host

# What choices call "as the model file says"; numbers say it with -1.
AUTO = "auto"

# Recommended settings: `star_core.degradation.recommend.Recommendation`.
DegradationType = io.Custom("STAR_DEGRADATION")


def video_from_images(images: Tensor) -> Tensor:
    """IMAGE (f h w c) in [0, 1] -> frames (f c h w), float32; a view where it can be."""
    return images.movedim(-1, 1).float()


def images_from_video(frames: Tensor) -> Tensor:
    """Frames (f c h w) in [0, 1] -> IMAGE (f h w c), where the host keeps its intermediates."""
    return frames.movedim(1, -1).float().to(mm.intermediate_device())


class Progress:
    """The host's progress bar: call it with what is done and the total.

    Raises the host's interruption if the user asked for it.
    """

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(done, total)


def free_memory() -> int:
    """Bytes of the device that the host could clear for a model."""
    check_host(mm, "current_loaded_models", "get_free_memory", "extra_reserved_memory")
    device = mm.get_torch_device()
    loaded = (each for each in mm.current_loaded_models if each.device == device)
    cleared = sum(each.model_loaded_memory() for each in loaded)
    return int(mm.get_free_memory(device) + cleared - mm.extra_reserved_memory())


def memory_limit(gib: float) -> int:
    """Bytes to plan for: so many GiB, or, for 0, what the host can clear now less a tenth."""
    return int(gib * 2**30) if gib else int(0.9 * free_memory())


def report_ui(report: str, picture: Tensor | None = None) -> dict[str, Any]:
    """What a node with a `report` output gives as `ui`: the report, and an IMAGE to show with it.

    `web/report.js` shows the report in the node.
    """
    shown = {} if picture is None else ui.PreviewImage(picture).as_dict()
    return {"text": (report,), **shown}


@contextmanager
def named(node: str) -> Iterator[None]:
    """Puts the node's name before what the core says is wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error


def as_the_model_says(kind: Any, id: str, *, tooltip: str, **options: Any) -> io.Input:
    """An input that the model file answers where the user does not: -1 in numbers, auto in choices.

    kind: `io.Int`, `io.Float` or `io.Combo`, whose other arguments are `options`.
    """
    default = AUTO if "options" in options else -1
    if default == AUTO:
        options["options"] = [AUTO, *options["options"]]
    else:
        options["min"] = default
    tooltip = f"{tooltip} {default}: as the model file says."
    return kind.Input(id, default=default, tooltip=tooltip, **options)


def told(**values: Any) -> dict[str, Any]:
    """Those values of `as_the_model_says` inputs that the user has set."""
    return {name: value for name, value in values.items() if value != AUTO and not _below_0(value)}


def _below_0(value: Any) -> bool:
    return isinstance(value, int | float) and value < 0


def size_inputs() -> list[io.Input]:
    """How large the result is."""
    return [
        io.Float.Input(
            "scale",
            default=4.0,
            min=1.0,
            max=8.0,
            step=0.01,
            tooltip="How much larger the result is; 1 restores at the same size.",
        ),
        io.Int.Input(
            "width",
            default=0,
            min=0,
            max=16384,
            tooltip="Width of the result, instead of scale. 0: follows from the height or from "
            "scale.",
        ),
        io.Int.Input(
            "height",
            default=0,
            min=0,
            max=16384,
            tooltip="Height of the result, instead of scale. 0: follows from the width or from "
            "scale.",
        ),
    ]


def strength_input() -> io.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.05,
        tooltip="How far each prediction goes from the input: 0 stays at the enlarged input, 1 is "
        "the full result.",
    )


def preset_input() -> io.Input:
    return io.Combo.Input(
        "preset",
        options=[FAITHFUL, SHARP],
        default=FAITHFUL,
        tooltip="For a model with learned prompts, such as tiny: faithful keeps to what is "
        "certain, sharp shows more detail. Other models take text instead.",
    )


def degradation_input(use: str) -> io.Input:
    """use: what this node does with the recommended settings."""
    return DegradationType.Input(
        "degradation",
        optional=True,
        tooltip=f"degradation from STAR Analyze Degradation: {use}",
    )


def seed_input() -> io.Input:
    return io.Int.Input(
        "seed",
        default=666,
        min=0,
        max=2**64 - 1,
        control_after_generate=True,
        tooltip="Same seed, same result.",
    )


def steps_inputs() -> list[io.Input]:
    return [
        as_the_model_says(
            io.Int,
            "steps",
            max=1000,
            tooltip="Number of evenly spaced steps. STAR's published models have 14 fast ones of "
            "their own.",
        ),
        as_the_model_says(
            io.Int,
            "noise_level",
            max=1000,
            tooltip="How much of the input is forgotten before it is restored, 0 to 1000; STAR "
            "takes 900. Lower invents less.",
        ),
    ]


def chunk_inputs() -> list[io.Input]:
    """Windows of frames."""
    return [
        as_the_model_says(
            io.Int,
            "chunk_frames",
            max=1024,
            tooltip="Most frames that the network sees together. More is steadier and needs more "
            "memory. STAR takes 32.",
        ),
        io.Int.Input(
            "chunk_overlap",
            default=-1,
            min=-1,
            max=1023,
            tooltip="Frames that neighbouring windows share, fewer than chunk_frames. More hides "
            "the joints and takes longer. -1: 3 of every 16.",
        ),
    ]


def tile_inputs() -> list[io.Input]:
    """Spatial tiles of the VAE."""
    return [
        io.Int.Input(
            "tile_size",
            default=0,
            min=0,
            max=8192,
            step=32,
            tooltip="Largest side of a tile in pixels, 0 for whole frames. Smaller tiles take less "
            "memory and more time. Where memory runs out, smaller ones are tried by themselves.",
        ),
        io.Int.Input(
            "tile_overlap",
            default=64,
            min=0,
            max=4096,
            step=8,
            tooltip="Pixels that neighbouring tiles share and blend. Too few show as seams.",
        ),
    ]


def tile_of(size: int, overlap: int) -> Tile | None:
    return Tile(size=size, overlap=overlap) if size else None
