"""Conversions between the host's types and the core's, and inputs that several nodes share."""

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

# Stands for the value of the model file in choices; in numbers it is -1.
AUTO = "auto"

# Carries a `star_core.degradation.recommend.Recommendation`.
DegradationType = io.Custom("STAR_DEGRADATION")


def video_from_images(images: Tensor) -> Tensor:
    """Converts IMAGE (f h w c) in [0, 1] to frames (f c h w), float32; a view if possible."""
    return images.movedim(-1, 1).float()


def images_from_video(frames: Tensor) -> Tensor:
    """Converts frames (f c h w) in [0, 1] to IMAGE (f h w c) on the host's intermediate device."""
    return frames.movedim(1, -1).float().to(mm.intermediate_device())


class Progress:
    """The host's progress bar; each call sets it.

    A call raises the host's interruption if the user has asked for one.
    """

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(done, total)


def free_memory() -> int:
    """Returns how many bytes of the device the host could free for a model."""
    check_host(mm, "current_loaded_models", "get_free_memory", "extra_reserved_memory")
    device = mm.get_torch_device()
    loaded = (each for each in mm.current_loaded_models if each.device == device)
    cleared = sum(each.model_loaded_memory() for each in loaded)
    return int(mm.get_free_memory(device) + cleared - mm.extra_reserved_memory())


def memory_limit(gib: float) -> int:
    """Converts GiB to bytes; 0 stands for nine tenths of what the host can free now."""
    return int(gib * 2**30) if gib else int(0.9 * free_memory())


def report_ui(report: str, picture: Tensor | None = None) -> dict[str, Any]:
    """Returns the `ui` of a node with a `report` output, which `web/report.js` shows in the node.

    picture: an IMAGE to show with it.
    """
    preview = {} if picture is None else ui.PreviewImage(picture).as_dict()
    return {"text": (report,), **preview}


@contextmanager
def node_errors(node: str) -> Iterator[None]:
    """Puts the node's name before the message of a ValueError from the core."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error


def model_default(kind: Any, id: str, *, tooltip: str, **options: Any) -> io.Input:
    """Returns an input whose default, -1 or auto, stands for the value of the model file.

    kind: `io.Int`, `io.Float` or `io.Combo`, which also gets `options`.
    """
    default = AUTO if "options" in options else -1
    if default == AUTO:
        options["options"] = [AUTO, *options["options"]]
    else:
        options["min"] = default
    tooltip = f"{tooltip} {default}: the model's default."
    return kind.Input(id, default=default, tooltip=tooltip, **options)


def overrides(**values: Any) -> dict[str, Any]:
    """Returns the values of `model_default` inputs that the user has set."""
    return {name: value for name, value in values.items() if value != AUTO and not _below_0(value)}


def _below_0(value: Any) -> bool:
    return isinstance(value, int | float) and value < 0


def scale_input() -> io.Input:
    """Returns the input `scale`."""
    return io.Float.Input(
        "scale",
        default=4.0,
        min=1.0,
        max=8.0,
        step=0.01,
        tooltip="Factor by which the video is enlarged; 1 restores it at the same size.",
    )


def size_inputs() -> list[io.Input]:
    """Returns the inputs `scale`, `width` and `height`, which set the size of the result."""
    return [
        scale_input(),
        io.Int.Input(
            "width",
            default=0,
            min=0,
            max=16384,
            tooltip="Width of the result in pixels, instead of scale. 0: follows from height or "
            "scale.",
        ),
        io.Int.Input(
            "height",
            default=0,
            min=0,
            max=16384,
            tooltip="Height of the result in pixels, instead of scale. 0: follows from width or "
            "scale.",
        ),
    ]


def strength_input(
    tooltip: str = "How far each prediction moves away from the input: 0 keeps the enlarged input, "
    "1 gives the full restoration.",
) -> io.Input:
    """Returns the input `strength`, from 0 to 1."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.05,
        tooltip=tooltip,
    )


def preset_input() -> io.Input:
    """Returns the input `preset`, which chooses among learned prompts."""
    return io.Combo.Input(
        "preset",
        options=[FAITHFUL, SHARP],
        default=FAITHFUL,
        tooltip="For models with learned prompts, such as tiny: faithful adds little, sharp shows "
        "more detail. Other models use text instead.",
    )


def degradation_input(use: str) -> io.Input:
    """Returns the optional input `degradation`; use: what the node does with it, a sentence."""
    return DegradationType.Input(
        "degradation",
        optional=True,
        tooltip=f"degradation from STAR Analyze Degradation. {use}",
    )


def seed_input(
    default: int = 666,
    *,
    control: bool = True,
    tooltip: str = "The same seed gives the same result.",
) -> io.Input:
    """Returns the input `seed`; control: show the host's choice to change it after each run."""
    return io.Int.Input(
        "seed",
        default=default,
        min=0,
        max=2**64 - 1,
        control_after_generate=control,
        tooltip=tooltip,
    )


def steps_inputs() -> list[io.Input]:
    """Returns the inputs `steps` and `noise_level`."""
    return [
        model_default(
            io.Int,
            "steps",
            max=1000,
            tooltip="Number of evenly spaced sampling steps. By default, STAR's published models "
            "run 14 steps at noise levels of their own.",
        ),
        model_default(
            io.Int,
            "noise_level",
            max=1000,
            tooltip="Noise added to the input before sampling, as a timestep from 0 to 1000. STAR "
            "uses 900. Lower values invent less.",
        ),
    ]


def chunk_inputs() -> list[io.Input]:
    """Returns the inputs `chunk_frames` and `chunk_overlap`, the windows of the network."""
    return [
        model_default(
            io.Int,
            "chunk_frames",
            max=1024,
            tooltip="Maximum number of frames that the network processes together. More frames "
            "give a steadier result and need more memory. STAR uses 32.",
        ),
        io.Int.Input(
            "chunk_overlap",
            default=-1,
            min=-1,
            max=1023,
            tooltip="Number of frames that neighbouring windows share, fewer than chunk_frames. "
            "More frames hide the transitions better and take longer. -1: 3 of every 16.",
        ),
    ]


def tile_inputs(
    size: int = 0,
    overlap: int = 64,
    *,
    note: str = "If memory runs out, smaller tiles are tried automatically.",
) -> list[io.Input]:
    """Returns the inputs `tile_size` and `tile_overlap`; the defaults are those of VAE nodes.

    note: the end of the tooltip of `tile_size`.
    """
    return [
        io.Int.Input(
            "tile_size",
            default=size,
            min=0,
            max=8192,
            step=32,
            tooltip="Maximum side of a tile in pixels; 0 processes whole frames. Smaller tiles "
            f"need less memory and more time. {note}",
        ),
        io.Int.Input(
            "tile_overlap",
            default=overlap,
            min=0,
            max=4096,
            step=8,
            tooltip="Number of pixels that neighbouring tiles share and blend. Too few leave "
            "visible seams.",
        ),
    ]


def tile_of(size: int, overlap: int) -> Tile | None:
    """Returns the tile of the values of `tile_inputs`, None for whole frames."""
    return Tile(size=size, overlap=overlap) if size else None
