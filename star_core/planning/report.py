"""Describes a plan in words: what it takes, and what each of its choices costs."""

from .plan import Plan
from .predict import Prediction, skip_traffic

GIB, PETA = 2**30, 10**15


def report(
    plan: Plan,
    prediction: Prediction,
    memory: int | None = None,
    *,
    seconds: float | None = None,
) -> str:
    """Returns the plan as text: totals, a table of stages and a table of choices.

    memory: bytes that the plan was made for, None for no limit. seconds: how long it takes, None
    if that is not known.
    """
    task, peak, flops = plan.task, prediction.peak, prediction.flops
    (width, height), (rows, columns) = task.size, task.padded
    verdict = f"Takes {_gib(peak)}"
    if memory is not None and peak <= memory:
        verdict = f"Fits into {_gib(memory)}: takes {_gib(peak)}"
    elif memory is not None:
        verdict = f"Does not fit into {_gib(memory)}: takes at least {_gib(peak)}"
    stages = [("", "device", "main memory", "compute")]
    for stage in ("prompt", "encode", "denoise", "decode"):
        if stage in prediction.memory:
            compute = _peta(flops[stage]) if stage in flops else ""
            device, host = map(_gib, prediction.memory[stage])
            stages.append((stage, device, host, compute))
    lines = [
        f"{task.frames} frames of {width}x{height} in {str(task.dtype).removeprefix('torch.')}, "
        f"computed at {columns}x{rows}.",
        f"{verdict}, weights included; what drivers and libraries take is not counted.",
        f"{_peta(sum(flops.values()))} in {prediction.passes} passes of the network.",
        f"{time_text(seconds)}.",
    ]
    return "\n".join([*lines, "", *_table(stages), "", *_table(_choices(plan))])


def time_text(seconds: float | None) -> str:
    """Returns how long a run takes, in words, or how that can be found out."""
    if seconds is None:
        return (
            "How long it takes is known after `python -m star_core bench` has measured the device"
        )
    if seconds < 90:
        return f"Takes about {seconds:.0f} seconds"
    if seconds < 5400:
        return f"Takes about {seconds / 60:.0f} minutes"
    return f"Takes about {seconds / 3600:.1f} hours"


def _choices(plan: Plan) -> list[tuple[str, str]]:
    task, windows, slicing = plan.task, plan.window_frames, plan.slicing
    rows = [("choice", "what it costs")]
    if len(windows) > 1:
        what = f"{len(windows)} windows of up to {max(windows)} frames"
        times = f"{sum(windows) / task.frames:.2f} times the frames"
        rows.append((f"{what}, at least {plan.chunk.overlap} shared", times))
    else:
        rows.append(("all frames in one window", "nothing"))
    pixels = f"{slicing.spatial_pixels} pixels in space, {slicing.temporal_pixels} in time"
    rows.append((f"slices of {pixels}", "nothing: the same numbers"))
    if plan.offload:
        count = skip_traffic(plan)
        what = "skips and idle weights" if count else "idle weights"
        times = f"; {_gib(count)} go there and back in each pass" if count else ""
        rows.append((f"offload: {what} in main memory", f"the same numbers{times}"))
    for what, tiles, (height, width), pixels in (
        ("network", plan.network_tiles, task.latents, task.vae.factor),
        ("VAE", plan.vae_tiles, task.padded, 1),
    ):
        if len(tiles) > 1:
            times = f"{sum(h * w for h, w in tiles) / (height * width):.2f} times the pixels"
            high, wide = (pixels * max(sides) for sides in zip(*tiles, strict=True))
            size = f"{len(tiles)} tiles of at most {wide}x{high} pixels"
            rows.append((f"{what} in {size}", f"{times}; tiles are independent and blended"))
        else:
            rows.append((f"{what} on whole frames", "nothing"))
    for name, default in vars(type(task.shortcuts)()).items():
        if (value := getattr(task.shortcuts, name)) != default:
            rows.append((f"{name.replace('_', ' ')} {value}", "not yet known on real weights"))
    return rows


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def _peta(flops: int) -> str:
    return f"{flops / PETA:.2f} PFLOP"
