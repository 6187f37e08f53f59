"""A plan in plain words: what it takes, and what each of its choices costs."""

from .plan import Plan
from .predict import Prediction, traffic

GIB = 2**30
PETA = 10**15


def report(plan: Plan, prediction: Prediction, memory: int | None = None) -> str:
    """memory: bytes that the plan was made for."""
    task = plan.task
    (width, height), (rows, columns) = task.size, task.padded
    dtype = str(task.dtype).removeprefix("torch.")
    peak, total = prediction.peak, sum(prediction.flops.values())
    if memory is None:
        verdict = f"Takes {gib(peak)}"
    elif peak <= memory:
        verdict = f"Fits into {gib(memory)}: takes {gib(peak)}"
    else:
        verdict = f"Does not fit into {gib(memory)}: takes at least {gib(peak)}"
    lines = [
        f"{task.frames} frames of {width}x{height} in {dtype}, computed at {columns}x{rows}.",
        f"{verdict}, weights included; what drivers and libraries take is not counted.",
        f"{peta(total)} in {prediction.passes} passes of the network.",
        "",
    ]
    stages = [("", "device", "main memory", "compute")]
    for stage in ("prompt", "encode", "denoise", "decode"):
        if (held := prediction.memory.get(stage)) is not None:
            compute = peta(prediction.flops[stage]) if stage in prediction.flops else ""
            stages.append((stage, gib(held.device), gib(held.host), compute))
    choices = [("choice", "what it costs"), *_choices(plan)]
    return "\n".join([*lines, *_table(stages), "", *_table(choices)])


def _choices(plan: Plan) -> list[tuple[str, str]]:
    task, windows, slicing = plan.task, plan.window_frames, plan.slicing
    frames = sum(windows)
    rows = [("all frames in one window", "nothing")]
    if len(windows) > 1:
        what = f"{len(windows)} windows of up to {max(windows)} frames"
        times = f"{frames / task.frames:.2f} times the frames"
        rows = [(f"{what}, at least {plan.chunk.overlap} shared", times)]
    pixels = f"{slicing.spatial_pixels} pixels in space, {slicing.temporal_pixels} in time"
    rows.append((f"slices of {pixels}", "nothing: the same numbers"))
    if plan.offload:
        what, cost = "offload: idle weights in main memory", "the same numbers"
        if count := traffic(plan):
            what = "offload: skips and idle weights in main memory"
            cost += f"; {gib(count)} go there and back in each pass"
        rows.append((what, cost))
    for what, tiles, (height, width), pixels in (
        ("network", plan.network_tiles, task.latents, task.vae.factor),
        ("VAE", plan.vae_tiles, task.padded, 1),
    ):
        if len(tiles) > 1:
            times = sum(h * w for h, w in tiles) / (height * width)
            rows_high, columns_wide = (pixels * max(side) for side in zip(*tiles, strict=True))
            rows.append(
                (
                    f"{what} in {len(tiles)} tiles of at most {columns_wide}x{rows_high} pixels",
                    f"{times:.2f} times the pixels; tiles see only themselves and are blended",
                )
            )
        else:
            rows.append((f"{what} on whole frames", "nothing"))
    shortcuts, usual = task.shortcuts, type(task.shortcuts)()
    for name in ("guidance", "attention_window", "reuse"):
        if (value := getattr(shortcuts, name)) != getattr(usual, name):
            rows.append((f"{name.replace('_', ' ')} {value}", "not yet known on real weights"))
    return rows


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def peta(flops: int) -> str:
    return f"{flops / PETA:.2f} PFLOP"
