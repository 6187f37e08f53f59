"""Measures the speed of this machine for `planning.duration`, which tells how long a run takes."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Precision
from ..devices import put_channels_last
from ..model import Model, ModelFiles, Prompts, find_model, load
from ..models.slicing import Slicing
from ..models.unet import UNetConfig
from ..planning.cost import Cost, Pass, decoding, encoding, pass_cost
from ..planning.duration import Machine, duration, fitted
from ..planning.plan import Task
from ..planning.predict import Work, fitting, predict
from ..sampling_defaults import SamplingDefaults
from ..settings import Execution, Settings
from ..upscale import Job, ShotSettings, upscale
from ..vae.load import geometry_of
from ..vae.svd import SVDGeometry
from ..video_io import open_sink
from .speed import Case, cases, seconds

# On a GPU: STAR's network and VAE, as large as fits into 8 GiB.
FULL = Case(name="STAR", config=UNetConfig(), frames=8, height=66, width=128)
FRAME = 512, 1024
FEW = Slicing(spatial_pixels=2**17, temporal_pixels=2**12)
ROUNDS = 3  # the shortest counts
# Frames and (width, height) of two runs: what differs between them, pixels take.
RUNS = (1, (48, 32)), (6, (128, 96))
Measured = Iterator[tuple[torch.dtype, Cost, Callable[[], object]]]


def measure(device: torch.device, dtype: torch.dtype | None) -> Machine:
    """Returns the speed of a device in the types of network and VAE.

    dtype: see `Backbone.precision`.
    """
    files = find_model("tiny")
    precision = files.backbone.precision(device, dtype)
    channels_last = device.type != "cpu" and _faster_with_channels_last(device, precision.network)
    works = _on_gpu(device, precision, channels_last)
    if device.type == "cpu":
        works = _on_cpu(files, precision)
    measured: dict[torch.dtype, list[tuple[Work, float]]] = {}
    with torch.inference_mode():
        for kind, cost, work in works:
            time = _shortest(work, device)
            measured.setdefault(kind, []).append((Work(cost.flops, cost.traffic), time))
    machine = Machine(
        speeds={kind: fitted(each) for kind, each in measured.items()},
        start=0.0,
        pixel=0.0,
        channels_last=channels_last,
    )
    # Two runs tell what each takes beside its work, and what each pixel.
    (pixels, rest), (more_pixels, more_rest) = (
        _run(files, device, dtype, machine, frames, size) for frames, size in RUNS
    )
    pixel = max(0.0, (more_rest - rest) / (more_pixels - pixels))
    return replace(machine, start=max(0.0, rest - pixel * pixels), pixel=pixel)


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    work()  # warms up
    return min(seconds(work, str(device)) for _ in range(ROUNDS))


@torch.inference_mode()
def _faster_with_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether STAR's network is clearly faster with that memory layout."""
    times = [_shortest(_pass(FULL, device, dtype, FEW, each)[2], device) for each in (False, True)]
    return times[1] < 0.95 * times[0]


def _run(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype | None,
    machine: Machine,
    frames: int,
    size: tuple[int, int],
) -> tuple[int, float]:
    """Restores frames of a size by the built-in model.

    Returns the pixels of the result, and the seconds beyond those that encoding, denoising and
    decoding should take.
    """
    width, height = size
    settings = Settings(sampling=SamplingDefaults(**(files.info.sampling or {})))
    precision = files.backbone.precision(device, dtype)
    task = Task(
        frames=frames,
        size=(4 * width, 4 * height),
        config=files.info.size,
        vae=geometry_of(files.vae),
        text_encoder=False,
        dtype=precision.network,
        vae_dtype=precision.vae,
        sampling=settings.sampling,
    )
    plan = fitting(task)
    settings = replace(settings, **plan.settings())
    shot = ShotSettings(settings=settings, execution=Execution(device=device, slicing=plan.slicing))

    def get_model(prompts: Sequence[Prompts]) -> Model:
        return load(
            files,
            prompts,
            behaviour=settings.behaviour,
            device=device,
            dtype=dtype,
            channels_last=machine.channels_last,
        )

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "clip.mkv"
        with open_sink(source, width=width, height=height, fps=Fraction(25)) as sink:
            for frame in torch.rand(frames, 3, height, width):
                sink.write(frame)
        job = Job(source=source, out=Path(folder) / "out.mp4", scale=4.0, overwrite=True)
        times = [seconds(lambda: upscale(job, shot, get_model), str(device)) for _ in range(ROUNDS)]
    expected = duration(predict(plan), task, machine)
    assert expected is not None
    return frames * 16 * width * height, min(times) - expected


def _on_cpu(files: ModelFiles, precision: Precision) -> Measured:
    tiny, device = files.info.size, torch.device("cpu")
    assert isinstance(tiny, UNetConfig)
    small = Case(name="tiny", config=tiny, frames=4, height=34, width=32)
    for case in (small, *cases(tiny)):
        yield _pass(case, device, precision.network, Slicing())
    yield from _vae(geometry_of(files.vae), (256, 256), device, precision.vae)


def _on_gpu(device: torch.device, precision: Precision, channels_last: bool) -> Measured:
    for case in (FULL, replace(FULL, height=FULL.height // 2 + 1, width=FULL.width // 2)):
        yield _pass(case, device, precision.network, FEW, channels_last)
    yield from _vae(SVDGeometry(), FRAME, device, precision.vae)


def _pass(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    slicing: Slicing,
    channels_last: bool = False,
) -> tuple[torch.dtype, Cost, Callable[[], object]]:
    network, inputs = case.network(str(device), dtype), case.inputs(str(device), dtype)
    if channels_last:
        put_channels_last(network)
    size = {"frames": case.frames, "height": case.height, "width": case.width}
    cost, _ = pass_cost(Pass(config=case.config, dtype=dtype, **size))

    def forward() -> Tensor:
        with network.working(slicing=slicing):
            return network(*inputs)

    return dtype, cost, forward


def _vae(
    geometry: Any, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Measured:
    vae, (height, width), frames = geometry.build(), size, 3
    nn.Module.to(vae.model, device, dtype).eval().requires_grad_(False)  # its own `to` warns
    frame = torch.zeros(1, 3, height, width)
    yield dtype, encoding(geometry, dtype, 1, height, width), lambda: vae.encode_frame(frame)
    sides = frames, height // vae.factor, width // vae.factor
    latents = torch.zeros(1, vae.latent_channels, *sides)
    decoded = decoding(geometry, dtype, frames, height, width)
    yield dtype, decoded, lambda: vae.decode_window(latents)
