"""Families of prompts, VAE, frames and colour on I2VGen-XL, and of the whole method."""

import re
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from ..color_fix import COLOR_FIXES
from ..parity import REFERENCE
from ..pipeline import Settings, ShotJob, restore
from ..sampling_defaults import SamplingDefaults
from ..star_checkpoint import StarModel
from ..text.prompts import DEFAULT_PROMPT, NEGATIVE_PROMPT, POSITIVE_PROMPT, join_prompt
from ..vae.frame_vae import VideoVAE
from ..vae.svd import svd_vae
from ..video_io.encoding import quantize
from ..video_io.planes import PlanarFormat
from ..windows.canvas import Canvas, FrameSpan
from ..windows.chunking import ChunkConfig
from ..windows.geometry import Padding, output_size, pad, reference_padding, upsample
from .case import Case, Comparison, Comparisons
from .networks import network_of


def prompts(case: Case) -> Comparisons:
    """Replays the prompts."""
    theirs = case.sidecar["data"]
    yield Comparison(POSITIVE_PROMPT, theirs["positive"])
    yield Comparison(NEGATIVE_PROMPT, theirs["negative"])
    caption = join_prompt(DEFAULT_PROMPT, POSITIVE_PROMPT, REFERENCE.prompt_separator)
    yield Comparison(caption, DEFAULT_PROMPT + theirs["positive"])


def vae_of(case: Case) -> VideoVAE:
    """Returns the VAE of a case with its weights."""
    vae = svd_vae(case.config)
    case.fill(vae.model)
    return vae


def vae_chunking(case: Case) -> Comparisons:
    """Replays decoding in windows and encoding."""
    vae, noise = vae_of(case), case["encode_noise"]
    window = int(case.in_text("what", r"vae_decode_chunk\(z, (\d+)\)"))
    decoded = vae.decode(case["z"], window=window, overlap=0)
    yield Comparison(rearrange(decoded, "b c f h w -> (b f) c h w"), case["decoded"])
    pixels = rearrange(case["pixels"], "b f c h w -> b c f h w")
    yield Comparison(vae.encode(pixels, noise=lambda i: noise[i : i + 1]), case["latents"])


def preprocess(case: Case) -> Comparisons:
    """Replays up-sampling, padding and 8-bit output.

    Factor and padding are in the names of the results: up4, padded_3_2_1_4.
    """
    rgb = rearrange(case["frames_bgr_u8"].flip(-1), "f h w c -> f c h w")
    video = rgb / 255 * 2 - 1
    yield Comparison(video, case["video"])
    size = video.shape[3], video.shape[2]
    (up,) = (key for key in case.tensors if re.fullmatch(r"up\d+", key))
    scale = float(up.removeprefix("up"))
    video = upsample(video, output_size(*size, scale), "bilinear")
    yield Comparison(video, case[up])
    (padded,) = (key for key in case.tensors if key.startswith("padded_"))
    margins = Padding(*(int(side) for side in padded.split("_")[1:]))
    yield Comparison(pad(video, margins, "white"), case[padded])
    frames = unit_range(case["post_in"])
    yield Comparison(as_255(frames), case["post_out"])
    yield Comparison(as_uint8(frames), case["post_uint8"])


def as_uint8(frames: Tensor) -> Tensor:
    """Quantises frames (f c h w) in [0, 1] to (f h w c) as in the reference."""
    height, width = frames.shape[-2:]
    layout, written = PlanarFormat("rgb"), []
    for index, frame in enumerate(frames):
        data = quantize(frame, layout, "", rounding=REFERENCE.rounding, seed=0, index=index)
        green, blue, red = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(
            3, height, width
        )
        written.append(torch.stack([red, green, blue], dim=-1))
    return torch.stack(written)


def unit_range(video: Tensor) -> Tensor:
    """Converts (1 c f h w) in [-1, 1] to frames (f c h w) in [0, 1]."""
    return rearrange(video / 2 + 0.5, "1 c f h w -> f c h w").clamp(0, 1)


def padding(case: Case) -> Comparisons:
    """Replays the reference's padding."""
    for height, width, expected, size in case.sidecar["data"]:
        left, right, top, bottom = ours = reference_padding(height, width)
        yield Comparison(list(ours), expected)
        yield Comparison([top + height + bottom, left + width + right], size)


def color_fix(case: Case, name: str) -> Comparisons:
    """Replays a colour fix."""
    target = rearrange(case["target"] / 255, "f h w c -> f c h w")
    fixed = COLOR_FIXES[name](target, case["source"] / 2 + 0.5)
    yield Comparison(as_255(fixed), case["out"])


def as_255(frames: Tensor) -> Tensor:
    """Converts (f c h w) in [0, 1] to (f h w c) from 0 to 255."""
    return 255 * rearrange(frames, "f c h w -> f h w c")


def adain(case: Case) -> Comparisons:
    """Replays the colour fix AdaIN."""
    return color_fix(case, "adain")


def wavelet(case: Case) -> Comparisons:
    """Replays the wavelet colour fix."""
    return color_fix(case, "wavelet")


def e2e(case: Case) -> Comparisons:
    """Replays the whole pipeline in the reference's behaviour with the padding of the case."""
    settings = case.sidecar
    network = network_of(case.neighbour(case.in_text("what", r"\b(unet_\w+)")))
    vae = vae_of(case.neighbour(case.in_text("what", r"\b(vae_\w+)")))
    height, width = settings["target_res"]
    margins = Padding(*settings["padding_l_r_t_b"])
    view = (
        range(margins.top + height + margins.bottom),
        range(margins.left + width + margins.right),
    )
    region = (range(height), range(width))
    canvas = Canvas(size=(width, height), padding=margins, region=region, view=view)
    sampling = SamplingDefaults(
        steps=settings["steps"],
        solver_mode=settings["solver_mode"],
        cfg=settings["guide_scale"],
        cfg_rescale=settings["guide_rescale"] or 0.0,
        noise_level=settings.get("t_max", 899) + 1,
    )
    model = StarModel(network=network, config=network.config, sampling=sampling, prompts=None)
    length, frames = settings["max_chunk_len"], list(case["video"] / 2 + 0.5)
    chunk = ChunkConfig(length=length, overlap=length // 2)
    span = FrameSpan.of(range(len(frames)), chunk=chunk, decode_window=3, behaviour=REFERENCE)
    for color_fix, expected in (("none", "vid255"), ("adain", "adain255")):
        run = Settings(
            sampling=replace(sampling, color_fix=color_fix),
            seed=settings["seed"],
            chunk=chunk,
            behaviour=REFERENCE,
        )
        shot = ShotJob(span=span, positive=case["y"], negative=case["neg_y"], settings=run)
        restored = restore(frames, model, vae, [shot], canvas)
        yield Comparison(as_255(torch.stack(list(restored))), case[expected])
