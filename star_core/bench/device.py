"""Checks and measures a device: `python -m star_core bench --device cuda --report FILE`.

Full-size networks with random weights on a GPU, small ones on a CPU. Every case that fails is a row
with its error, so that one run shows everything that is wrong.

Each pass runs once before it is measured: the first one chooses the algorithms of convolutions, by
trying some that take more time and memory.
"""

import gc
import logging
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..demo import DATA, DEGRADED
from ..devices import check_compiler, device_name, release_cached_memory, synchronize, total_memory
from ..memory import DevicePlacement, MemoryLimits, retry_on_oom
from ..model import BUILT_IN, find_model, load
from ..models.slicing import Slicing
from ..models.unet import ControlledVideoUNet, UNetConfig
from ..parity import DEFAULT
from ..planning.meta_memory import LiveTensors
from ..planning.plan import Task
from ..planning.predict import fitting, predict
from ..settings import Execution
from ..star_checkpoint import load_model
from ..upscale import Job, Settings, ShotSettings, upscale
from ..vae.frame_vae import FrameGeometry
from ..vae.svd import SVDGeometry
from .speed import Case
from .weight_types import random_network

_LOG = logging.getLogger(__name__)
GIB = 2**30
T = TypeVar("T")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDE = UNetConfig(dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5))
# Named by their place between the slices of a CPU and whole layers.
SLICES = {
    "small": Slicing(),
    "medium": Slicing(spatial_pixels=2**17, temporal_pixels=2**13),
    "whole layers": Slicing(spatial_pixels=2**40, temporal_pixels=2**40),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of everything that is measured.

    forward: the network whose time and memory are measured. vae: sizes of the VAE, and size (width,
    height) of its frames. caps: memory limits in bytes. clip: size and frames of the run that is
    planned for them. parity: the size of its latents (frames, height, width). job: frames of the
    bundled clip.
    """

    forward: Case
    vae: FrameGeometry
    frame: tuple[int, int]
    caps: tuple[int, ...]
    clip: tuple[tuple[int, int], int]
    parity: tuple[int, int, int]
    job: int


FULL = Sizes(
    forward=Case(name="STAR", config=UNetConfig(), frames=32, height=122, width=216),
    vae=SVDGeometry(),
    frame=(1152, 640),  # in float32 it fits into 24 GiB
    caps=(8 * GIB, 12 * GIB, 16 * GIB, 24 * GIB),
    clip=((1704, 960), 32),
    parity=(8, 34, 32),
    job=24,
)
_NARROW = UNetConfig(
    dim=32, context_dim=16, dim_mult=(1, 2), num_heads=1, head_dim=32, num_res_blocks=1,
    attn_scales=(1.0,), norm_groups=16,
)  # fmt: skip
SMALL = Sizes(
    forward=Case(name="narrow", config=_NARROW, frames=2, height=10, width=8),
    vae=SVDGeometry(block_out_channels=(32, 32), layers_per_block=1),
    frame=(32, 32),
    caps=(GIB,),
    clip=((32, 32), 2),
    parity=(2, 10, 8),
    job=2,
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row of the report. figures: by name and unit. error: why there are none."""

    check: str
    case: str
    figures: Mapping[str, float | bool | str]
    error: str | None = None


def measure(
    device: torch.device,
    sizes: Sizes | None = None,
    *,
    on_result: Callable[[str], object] = lambda row: None,
) -> dict[str, Any]:
    """Does all checks; returns the machine and the results, ready for JSON.

    sizes: None for full sizes, and small ones on a CPU. on_result: called with each row of `table`
    as soon as it is known.
    """
    sizes = sizes or (SMALL if device.type == "cpu" else FULL)
    results: list[dict[str, Any]] = []
    for check in CHECKS:
        rows = check(device, sizes)
        while row := _row(check.__name__, "", lambda rows=rows: next(rows, None)):
            results.append(asdict(row))
            on_result(_line(results[-1]))
            if row.error:
                gc.collect()  # what failed may be part of circles
            release_cached_memory()
        gc.collect()
    return {**machine(device), "results": results}


def _row(check: str, case: str, work: Callable[[], T]) -> T | Result:
    """Returns what a function returns, or a row with the error that it raises."""
    try:
        return work()
    except Exception as error:  # the report shows it beside the other results
        # As text: a record of the error itself would keep the tensors of its frames.
        _LOG.warning("%s %s failed\n%s", check, case, traceback.format_exc())
        text = " ".join(str(error).split())
        text = f"{type(error).__name__}: {text[:200]}"
        return Result(check=check, case=case, figures={}, error=text)


def _result(check: str, case: str, work: Callable[[], Mapping[str, Any]]) -> Result:
    """Returns the row with the figures that a function measures, or with its error."""
    return _row(check, case, lambda: Result(check=check, case=case, figures=work()))


def machine(device: torch.device) -> dict[str, Any]:
    """Returns the names and versions by which figures are compared."""
    memory = total_memory(device)
    return {
        "device": str(device),
        "name": device_name(device),
        "memory_gib": memory and round(memory / GIB, 2),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(report: dict[str, Any]) -> str:
    """Returns the report of `measure` as a table in Markdown."""
    title = "{name} ({device}), torch {torch}, {date}".format(**report)
    head = ["| check | case | result |", "| --- | --- | --- |"]
    return "\n".join([title, "", *head, *map(_line, report["results"])])


def _line(result: Mapping[str, Any]) -> str:
    figures = ", ".join(f"{name} {_text(value)}" for name, value in result["figures"].items())
    return f"| {result['check']} | {result['case']} | {result['error'] or figures} |"


def _text(value: float | bool | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _error_of(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of the expected tensor."""
    expected = expected.cpu().float()
    return float((found.cpu().float() - expected).norm() / expected.norm())


@torch.inference_mode()
def _measured(device: torch.device, work: Callable[[], Tensor]) -> tuple[Tensor, float, int]:
    """Returns a result, seconds, and the most bytes beyond those in use before.

    The work is done twice and the second time is measured.
    """
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        return result, seconds, torch.cuda.max_memory_allocated(device) - before
    with LiveTensors(device.type) as live:  # again, because counting takes time
        work()
    return result, seconds, live.peak


def parity(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Compares the device with the CPU in float32, and its other types with that."""
    networks = {
        "tiny": load_model(BUILT_IN["tiny"][0], dtype=torch.float32).network,
        "random": random_network(sizes.forward.config if sizes is SMALL else WIDE),
    }
    for name, network in networks.items():
        config, generator = network.config, torch.Generator().manual_seed(1)
        x, hint = torch.randn(2, 1, config.in_dim, *sizes.parity, generator=generator)
        y = torch.randn(1, config.context_length, config.context_dim, generator=generator)
        with torch.inference_mode():
            expected = network(x, torch.tensor([500]), y, hint)
        measured = partial(_parity, network, (x, y, hint), expected, device)
        for dtype in TYPES:
            yield _result("parity", f"{name}, {_type_name(dtype)}", partial(measured, dtype))


def _parity(
    network: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    expected: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Measures a pass on a device in a type against the expected velocity; inputs: x, y, hint."""
    network = deepcopy(network).to(device, dtype)  # of weights that were not rounded before
    x, y, hint = (each.to(device, dtype) for each in inputs)
    # In full: convolutions of GPUs shorten float32 (TF32) unless they are told not to.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        found, seconds, _ = _measured(device, lambda: network(x, torch.tensor([500]), y, hint))
    return {"relative error": _error_of(found, expected), "seconds": seconds}


def _network(case: Case, device: torch.device, dtype: torch.dtype) -> ControlledVideoUNet:
    return case.network(str(device), dtype)


def _type_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.float16


def slices(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Measures one forward pass at three sizes of slices."""
    case, dtype = sizes.forward, _type_on(device)
    network, inputs = _network(case, device, dtype), case.inputs(str(device), dtype)

    def measured(slicing: Slicing) -> dict[str, float]:
        with network.working(slicing=slicing):
            _, seconds, peak = _measured(device, lambda: network(*inputs))
        return {"seconds": seconds, "GiB beside weights": peak / GIB}

    for name, slicing in SLICES.items():
        yield _result("slices", f"{case.name}, {name}", partial(measured, slicing))


@contextmanager
def _capped(device: torch.device, cap: int) -> Iterator[None]:
    """Lets torch allocate at most `cap` bytes of a CUDA device within the block."""
    if device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    release_cached_memory()
    # The device's number, or None for the present one: "cuda" alone is refused.
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / whole), device.index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def plans(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Compares the bytes of a forward pass with those predicted, under memory limits."""
    (size, frames), dtype, case = sizes.clip, _type_on(device), sizes.forward
    task = Task(
        frames=frames,
        size=size,
        config=case.config,
        vae=sizes.vae,
        text_encoder=False,
        dtype=dtype,
    )

    def measured(cap: int) -> dict[str, float | bool | str]:
        # A tenth is left to what torch does not count.
        plan = fitting(task, int(0.9 * cap), gpu=device.type != "cpu")
        height, width = task.latents
        part = replace(case, frames=max(plan.windows), height=height, width=width)
        with _capped(device, cap):
            network, inputs = _network(part, device, dtype), part.inputs(str(device), dtype)
            with network.working(slicing=plan.slicing, tile=plan.network_tile):
                _, seconds, peak = _measured(device, lambda: network(*inputs))
        weights = sum(each.nbytes for each in network.parameters())
        return {
            "GiB predicted": predict(plan).memory["denoise"].device / GIB,
            "GiB measured": (weights + peak) / GIB,
            "seconds": seconds,
            "frames": part.frames,
            "tile": plan.latent_tile.size if plan.latent_tile else "none",
            "temporal pixels of a slice": plan.slicing.temporal_pixels,
            "offload": plan.offload,
        }

    for cap in sizes.caps:
        yield _result("plan", f"{cap / GIB:g} GiB", partial(measured, cap))


def out_of_memory(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Runs a forward pass out of memory, and checks that it goes on and gives the same result."""
    case, dtype = sizes.forward, _type_on(device)
    network, inputs = _network(case, device, dtype), case.inputs(str(device), dtype)
    large = Slicing(temporal_pixels=2**40)  # the result does not depend on its size
    with network.working(slicing=Slicing()):
        expected, _, least = _measured(device, lambda: network(*inputs))
    with DevicePlacement(device) as placement:
        limits = MemoryLimits(
            slicing=large,
            vae_tile=None,
            latent_tile=None,
            vae_factor=8,
            downsamplings=case.config.downsamplings,
            placement=placement,
        )
        changes: list[str] = []

        def forward() -> Tensor:
            if device.type != "cuda" and not changes:  # nothing limits the memory of others
                raise torch.cuda.OutOfMemoryError("a forced error: out of memory")
            with network.working(slicing=limits.slicing, tile=limits.network_tile):
                return network(*inputs)

        def shrink() -> str | None:
            change = limits.shrink_network(8 * max(case.height, case.width))
            changes.append(change or "nothing is left to save")
            return change

        in_use = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        with _capped(device, int(1.2 * (in_use + least))), torch.inference_mode():
            found = retry_on_oom(forward, shrink)
    figures = {
        "changes": "; ".join(changes) or "none",
        "relative error": _error_of(found, expected),
    }
    yield Result(check="out of memory", case=case.name, figures=figures)


def offloading(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Measures loading weights, and a forward pass with skip connections here and there."""
    case, dtype = sizes.forward, _type_on(device)
    network, inputs = _network(case, device, dtype).cpu(), case.inputs(str(device), dtype)
    size = sum(each.nbytes for each in network.parameters()) / GIB
    with DevicePlacement(device) as placement:
        for name in ("load", "load again"):
            synchronize(device)
            start = time.perf_counter()
            placement.load(network)
            synchronize(device)
            seconds = time.perf_counter() - start
            figures = {"seconds": seconds, "GiB per second": size / max(seconds, 1e-9)}
            yield Result(check="offloading", case=f"{name} {size:.2f} GiB", figures=figures)
            if name == "load":
                placement.unload(network)

        def measured(offload: bool) -> dict[str, float]:
            with network.working(slicing=Slicing(offload=offload)):
                _, seconds, peak = _measured(device, lambda: network(*inputs))
            return {"seconds": seconds, "GiB beside weights": peak / GIB}

        for offload, place in ((False, "the device"), (True, "main memory")):
            yield _result("offloading", f"skips in {place}", partial(measured, offload))


def vae(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Measures encoding of a frame and decoding of three, in three types."""
    generator, (width, height) = torch.Generator().manual_seed(0), sizes.frame
    model = sizes.vae.build()
    weights = model.model.eval().requires_grad_(False)
    frame = torch.rand(1, 3, height, width, generator=generator) * 2 - 1
    factor, channels = model.factor, model.latent_channels
    latents = torch.randn(1, channels, 3, height // factor, width // factor, generator=generator)
    latents = 0.2 * latents
    expected: dict[str, Tensor] = {}
    works = {
        "encode": lambda: model.encode_frame(frame),
        "decode": lambda: model.decode_window(latents),
    }

    def measured(dtype: torch.dtype, name: str) -> dict[str, float | bool]:
        model.model = nn.Module.to(deepcopy(weights), device, dtype)  # its own `to` warns
        result, seconds, peak = _measured(device, works[name])
        result = result.cpu()
        expected.setdefault(name, result)
        return {
            "seconds": seconds,
            "GiB beside weights": peak / GIB,
            "relative error": _error_of(result, expected[name]),
            "finite": bool(result.isfinite().all()),
        }

    for dtype, name in product(TYPES, works):
        yield _result("VAE", f"{name}, {_type_name(dtype)}", partial(measured, dtype, name))


def job(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Restores the beginning of the bundled clip with tiny, from file to file."""
    files = find_model("tiny")
    sampling = files.sampling
    settings = Settings(sampling=sampling, behaviour=replace(DEFAULT, previews="alone"))
    frames: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        upscale(
            Job(
                source=DATA / DEGRADED,
                out=Path(folder) / "restored.mkv",
                scale=4,
                frames=(0, sizes.job),
            ),
            ShotSettings(settings=settings, execution=Execution(device=device)),
            lambda prompts: load(files, prompts, behaviour=settings.behaviour, device=device),
            on_frame=frames.append,
        )
        seconds = time.perf_counter() - start
    figures = {
        "seconds": seconds,
        "frames": len(frames),
        "finite": all(math.isfinite(frame.sum()) for frame in frames),
    }
    yield Result(check="job", case="tiny, with loading and writing", figures=figures)


def compiled(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Compares tiny with and without compiled blocks; on a CPU that takes too long."""
    if device.type == "cpu":
        return
    network = load_model(BUILT_IN["tiny"][0], dtype=_type_on(device)).network.to(device)
    config, generator = network.config, torch.Generator().manual_seed(1)
    x = torch.randn(1, config.in_dim, *sizes.parity, generator=generator)
    y = torch.randn(1, config.context_length, config.context_dim, generator=generator)
    x, y = (each.to(device, _type_on(device)) for each in (x, y))

    def forward() -> Tensor:
        with network.working(slicing=Slicing()):
            return network(x, torch.tensor([500]), y, x)

    def measured() -> dict[str, float]:
        expected, before, _ = _measured(device, forward)
        check_compiler(device)
        network.compile_blocks()
        start = time.perf_counter()
        with torch.inference_mode():
            forward()
        synchronize(device)
        first = time.perf_counter() - start
        found, after, _ = _measured(device, forward)
        return {
            "seconds without": before,
            "seconds of the first pass": first,
            "seconds": after,
            "relative error": _error_of(found, expected),
        }

    yield _result("compile", "tiny", measured)


CHECKS: tuple[Callable[[torch.device, Sizes], Iterator[Result]], ...] = (
    parity,
    slices,
    plans,
    out_of_memory,
    offloading,
    vae,
    job,
    compiled,
)
