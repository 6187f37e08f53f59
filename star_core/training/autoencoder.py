"""Trains the small VAE of the built-in model on clips."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.tensors import write_tensors
from ..vae.frame_vae import VideoVAE
from ..vae.patch import PatchGeometry, PatchVAE

logger = logging.getLogger(__name__)

TINY_VAE = asdict(PatchGeometry())
SPREAD = 0.5  # standard deviation of the latent channels at the start


def around(x: Tensor) -> Tensor:
    """Returns each pixel's 3x3 neighbourhood and a one for the bias: (n c h w) -> (p 9·c+1)."""
    near = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3)
    return F.pad(rearrange(near, "n k p -> (n p) k"), (0, 1), value=1.0)


def at(x: Tensor) -> Tensor:
    """Flattens pixels: (n c h w) -> (p c)."""
    return rearrange(x, "n c h w -> (n h w) c")


@torch.no_grad()
def fit(convolution: nn.Conv2d, inputs: Tensor, target: Tensor) -> None:
    """Fits a 3x3 convolution of `inputs` (n c h w) to `target` (p c') by least squares."""
    x = around(inputs).double()
    square = x.T @ x + 1e-6 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    rows = torch.linalg.solve(square, x.T @ target.double())
    assert convolution.bias is not None
    convolution.weight.copy_(rearrange(rows[:-1], "(c y x) o -> o c y x", y=3, x=3))
    convolution.bias.copy_(rows[-1])


@torch.no_grad()
def start_as_projection(vae: PatchVAE, frames: Tensor) -> None:
    """Initialises a VAE with a linear encoder and the linear decoder that fits it.

    The latent channels are principal components of the patches. frames: (n 3 h w) in [-1, 1].
    """
    patches = F.pixel_unshuffle(frames, vae.config["patch"])
    pixels = at(patches)
    axes = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False).Vh
    latents = pixels @ axes[: vae.config["latent_channels"]].T
    latents = latents * (SPREAD / latents.std(0)).clamp(max=20)
    fit(vae.encoder.linear, patches, latents)
    fit(vae.decoder.linear, vae.encoder(patches), pixels)


def low_quality(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Degrades clips as hints are: reduced by 4, noisy, enlarged again; (b c f h w) in [-1, 1]."""
    b, _, f, h, w = clips.shape
    frames = rearrange(clips, "b c f h w -> (b f) c h w")
    small = F.interpolate(frames, size=(h // 4, w // 4), mode="area")
    strength = 0.15 * torch.rand(b, generator=generator).repeat_interleave(f)[:, None, None, None]
    small = small + strength * torch.randn(small.shape, generator=generator)
    large = F.interpolate(small.clamp(-1, 1), size=(h, w), mode="bicubic").clamp(-1, 1)
    return rearrange(large, "(b f) c h w -> b c f h w", b=b)


def draw_frames(
    clips: Sequence[Tensor], count: int, crop: int, generator: torch.Generator
) -> Tensor:
    """Returns `count` random crops of frames, (n 3 crop crop) in [-1, 1].

    A quarter is degraded as hints are, a quarter is noisy at full size, the rest is unchanged.
    clips: shards of uint8 clips (n f 3 h w).
    """

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    parts = []
    for _ in range(count):
        shard = clips[below(len(clips))]
        frame = shard[below(len(shard)), below(shard.shape[1])]
        top, left = (below(side - crop + 1) for side in frame.shape[-2:])
        parts.append(frame[:, top : top + crop, left : left + crop].float() / 127.5 - 1)
    frames, share = torch.stack(parts), count // 4
    frames[:share] = low_quality(frames[:share, :, None], generator)[:, :, 0]
    noisy = frames[share : 2 * share]
    strength = 0.12 * torch.rand(len(noisy), 1, 1, 1, generator=generator)
    noisy += strength * torch.randn(noisy.shape, generator=generator)
    return frames.clamp(-1, 1)


def train_vae(
    clips: list[Tensor],
    out: Path,
    *,
    steps: int,
    seed: int = 0,
    batch: int = 8,
    crop: int = 48,
    first: int = 400,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Trains the VAE and writes its averaged weights to `out`, a float16 safetensors file.

    clips: shards of uint8 clips (n f 3 h w). seed: of initial weights and crops. batch: crops
    in a step. crop: their side in pixels. first: number of crops that the linear initialisation is
    fitted to. on_step: called as on_step(step, steps) after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layer initialisation takes no generator
        vae = PatchVAE(**TINY_VAE)
    start_as_projection(vae, draw_frames(clips, first, crop, generator))
    patch = vae.config["patch"]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.05
    )
    average = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    recent: list[float] = []
    for step in range(steps):
        frames = draw_frames(clips, batch, crop, generator)
        z = vae.encoder(F.pixel_unshuffle(frames, patch))
        noisy = z + 0.01 * torch.randn(z.shape, generator=generator)
        error = F.pixel_shuffle(vae.decoder(noisy), patch) - frames
        loss = error.abs().mean() + 10 * error.pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(vae)
        if on_step:
            on_step(step + 1, steps)
        recent.append(error.detach().pow(2).mean().item() / 4)
        if step % 50 == 49 or step == steps - 1:
            psnr = -10 * math.log10(sum(recent[-50:]) / len(recent[-50:]))
            logger.info("step %d PSNR %.2f", step, psnr)
    write_tensors(
        out,
        average.module.state_dict(),
        dtype=torch.float16,
        metadata={"star_vae": json.dumps(vae.config)},
        overwrite=True,
    )


@torch.inference_mode()
def preview_rgb(vae: VideoVAE, clips: Tensor) -> tuple[tuple[float, ...], ...]:
    """Returns the linear map (c 3) from latents to colours, fitted to uint8 clips (n f 3 h w)."""
    frames = rearrange(clips, "n f c h w -> (n f) c h w").float() / 127.5 - 1
    latents = torch.cat([vae.encode_frame(frame[None]) for frame in frames])
    colours = F.avg_pool2d(frames, vae.factor)
    latents, colours = (rearrange(x, "n c h w -> (n h w) c") for x in (latents, colours))
    rows = torch.linalg.lstsq(latents, colours).solution.tolist()
    return tuple(tuple(round(value, 4) for value in row) for row in rows)
