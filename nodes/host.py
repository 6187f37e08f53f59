"""Between the host's types and the core's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..star_core.checkpoints import FAITHFUL, SHARP
from ..star_core.tiling import Tile

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
    device = mm.get_torch_device()
    loaded = (each for each in mm.current_loaded_models if each.device == device)
    cleared = sum(each.model_loaded_memory() for each in loaded)
    return int(mm.get_free_memory(device) + cleared - mm.extra_reserved_memory())


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
            tooltip="Width of the result, instead of scale. 0: follows from the height, "
            "or from scale.",
        ),
        io.Int.Input(
            "height",
            default=0,
            min=0,
            max=16384,
            tooltip="Height of the result, instead of scale. 0: follows from the width, "
            "or from scale.",
        ),
    ]


def preset_input() -> io.Input:
    return io.Combo.Input(
        "preset",
        options=[FAITHFUL, SHARP],
        default=FAITHFUL,
        optional=True,
        tooltip="Of a model with learned prompts, such as tiny: faithful keeps to what is certain, "
        "sharp shows more detail. Other models take text instead.",
    )


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
