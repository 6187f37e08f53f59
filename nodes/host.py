"""Between the host's types and the core's."""

import comfy.model_management as mm
import comfy.utils
from torch import Tensor


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
