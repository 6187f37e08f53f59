"""`plan`: what a run will take, and how it fits."""

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .arguments import MEMORY, SIZE, add_compute, add_json, add_size

if TYPE_CHECKING:
    from ..planning.duration import Machine


SMALL = "small"  # in place of a decoder's file: the size of one that is not trained yet


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--frame-count", type=int, required=True, metavar="N", help="frames of the input"
    )
    parser.add_argument(
        "--size", type=SIZE, required=True, metavar="WxH", help="size of the input in pixels"
    )
    add_size(parser)
    parser.add_argument(
        "--memory",
        type=MEMORY,
        metavar="M",
        help="memory of the device, such as 12G for 12 GiB (default: plan without a memory limit)",
    )
    parser.add_argument(
        "--no-offload",
        action="store_true",
        help="keep all weights and skip connections on the device",
    )
    parser.add_argument(
        "--fast", action="store_true", help="plan for the shortcuts of upscale --fast"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="plan for upscale --solver-mode normal --steps N"
    )
    parser.add_argument("--cfg", type=float, metavar="X", help="plan for upscale --cfg X")
    parser.add_argument("--reference", action="store_true", help="plan for upscale --reference")
    parser.add_argument(
        "--chunk-frames",
        type=int,
        metavar="N",
        help="most frames that are denoised together (default: the model's own)",
    )
    parser.add_argument(
        "--model",
        default="i2vgenxl",
        metavar="FILE",
        help="i2vgenxl (default), cogvideox-5b or cogvideox-2b, STAR's full sizes, which need no "
        "files; tiny, or a file",
    )
    parser.add_argument(
        "--vae", metavar="FILE", help="a VAE of another size than the published one"
    )
    parser.add_argument(
        "--decoder",
        metavar="FILE",
        help="plan for upscale --decoder FILE; small, for a decoder of the size that train "
        "--trains decoder makes for the VAE",
    )
    add_compute(parser)
    parser.add_argument(
        "--plot",
        metavar="FILE.svg",
        help="draw how memory and work grow with frames and size instead; this takes minutes",
    )
    add_json(parser)


def run_plan(args: argparse.Namespace) -> None:
    import torch

    from ..backbones import backbone_of
    from ..devices import best_device
    from ..diffusion.shortcuts import FAST, Shortcuts
    from ..parity import DEFAULT
    from ..planning.duration import duration
    from ..planning.plan import Task
    from ..planning.plot import growth
    from ..planning.predict import fitting, predict
    from ..planning.report import report
    from ..plots import write_figure
    from ..windows.geometry import output_size

    model = _model(args.model, args.vae, args.decoder)
    given = {"cfg": args.cfg, "steps": args.steps, "solver_mode": args.steps and "normal"}
    given = {name: value for name, value in given.items() if value is not None}
    model["sampling"] = replace(model["sampling"], **given)
    scale = args.scale if args.scale is not None else None if args.out_size else 4.0
    backbone = backbone_of(model["config"])
    device = best_device().type if args.device == "auto" else args.device
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    if dtype is None and device != "cpu":
        dtype = backbone.network_dtype
    # As on a CPU, which has all types: the device may be that of another machine.
    precision = backbone.precision("cpu", dtype)
    task = Task(
        frames=args.frame_count,
        size=output_size(args.size[0], args.size[1], scale, args.out_size),
        dtype=precision.network,
        vae_dtype=precision.vae,
        behaviour=backbone.reference if args.reference else DEFAULT,
        shortcuts=FAST if args.fast else Shortcuts(),
        **model,
    )
    if args.plot:
        if args.memory is None:
            raise ValueError("a plot compares with plans for the memory given: add --memory 12G")
        write_figure(growth(task, args.memory), args.plot)
        return
    chunk = task.usual_chunk(args.chunk_frames)
    plan = fitting(task, args.memory, offload=not args.no_offload, chunk=chunk, gpu=device != "cpu")
    prediction = predict(plan)
    seconds = duration(prediction, task, _machine(device))
    if not args.json:
        print(report(plan, prediction, args.memory, seconds=seconds))
        return
    tera = {stage: flops / 1e12 for stage, flops in prediction.flops.items()}
    answer = {
        "fits": args.memory is None or prediction.peak <= args.memory,
        "memory_bytes": args.memory,
        "peak_bytes": prediction.peak,
        "tflop": sum(tera.values()),
        **{f"tflop_{stage}": value for stage, value in tera.items()},
        "passes": prediction.passes,
        "seconds": seconds,
        "chunk_frames": plan.chunk.length,
        "chunk_overlap": plan.chunk.overlap,
        "windows": plan.window_frames,
        "tile": plan.tile and plan.tile.size,
        "latent_tile": plan.latent_tile and plan.latent_tile.size,
        "slices": {
            "spatial_pixels": plan.slicing.spatial_pixels,
            "temporal_pixels": plan.slicing.temporal_pixels,
        },
        "offload": plan.offload,
        "stages": {
            stage: {"device_bytes": held.device, "host_bytes": held.host}
            for stage, held in prediction.memory.items()
        },
    }
    print(json.dumps(answer))


def _machine(name: str) -> "Machine | None":
    """Returns the stored speed of a device, None if none is stored or there is no such device."""
    import torch

    from ..planning.duration import stored_machine

    try:
        return stored_machine(torch.device(name))
    except (RuntimeError, AssertionError):
        return None


def _model(name: str, vae: str | None, decoder: str | None) -> dict[str, Any]:
    """Fields of `Task` about the model."""
    from ..backbones import BACKBONES, I2VGENXL, SIZES, backbone_of
    from ..file_info import describe
    from ..model import BUILT_IN, PUBLISHED_MODELS
    from ..sampling_defaults import SamplingDefaults
    from ..training.decoder import small_decoder
    from ..vae.frame_vae import FrameGeometry
    from ..vae.load import geometry_of
    from ..vae.small_decoder import SmallDecodedGeometry, with_decoder

    path, own_vae = BUILT_IN.get(name, (name, None))
    if name in (*SIZES, *PUBLISHED_MODELS):
        config = SIZES.get(name) or BACKBONES.get(name, I2VGENXL).config()
        text_encoder = True
        sampling, _ = backbone_of(config).published(config)
    else:
        info = describe(path)
        if info.config is None or info.sampling is None:
            raise ValueError(
                f"{path} seems to be a {info.title}: --model takes {', '.join(SIZES)}, "
                f"{', '.join(BUILT_IN)} or the file of a STAR network"
            )
        config, text_encoder = info.size, not info.presets
        sampling = SamplingDefaults(**info.sampling)
    vae_path = vae or own_vae
    geometry = geometry_of(vae_path) if vae_path else backbone_of(config).geometry
    if decoder == SMALL and isinstance(geometry, SmallDecodedGeometry):
        geometry = geometry.vae
    if decoder == SMALL and isinstance(geometry, FrameGeometry):
        geometry = SmallDecodedGeometry(vae=geometry, decoder=small_decoder(geometry))
    elif decoder is not None:
        geometry = with_decoder(geometry, decoder)
    return {
        "config": config,
        "sampling": sampling,
        "text_encoder": text_encoder,
        "vae": geometry,
    }
