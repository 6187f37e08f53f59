"""Trains the small VAE of the built-in model: diffusers' temporal-decoder VAE on clips."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..tensor_files import write_tensors
from ..vae import VideoVAE, vae_from_config

logger = logging.getLogger(__name__)

TINY_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 1,
    "norm_eps": 100.0,
}


def start_as_resampler(vae: Any) -> None:
    """Starts training from an encoder that averages 4x4 pixels and a decoder that interpolates.

    Colours travel in the first six channels, each with its negative beside it: their mean is zero,
    which the norms subtract, and the difference of the two makes SiLU linear. Every residual branch
    ends in zeros; all other channels keep their random start and learn the detail.
    """
    carriers = range(6)
    smooth = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1])) / 16
    average = F.pad(torch.full((2, 2), 0.25), (0, 1, 0, 1))

    def carry(conv: Any, kernel: Tensor) -> None:
        weight = conv.weight.data
        for channel in carriers:
            weight[channel] = 0
            weight[channel, channel] = kernel

    def spread(conv: Any) -> None:
        for channel in carriers:
            conv.weight.data[channel] = 0
            conv.weight.data[channel, channel % 3, 1, 1] = 1 if channel < 3 else -1
            conv.bias.data[channel] = 0

    def gather(conv: Any) -> None:
        conv.weight.data[:3] = 0
        for channel in carriers:
            conv.weight.data[channel % 3, channel, 1, 1] = 0.5 if channel < 3 else -0.5
        conv.bias.data[:3] = 0

    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.constant_(module.weight, module.eps**0.5)
        elif name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("conv_shortcut"):
            carry(module, torch.ones(1, 1))
        elif "downsamplers" in name and isinstance(module, nn.Conv2d):
            carry(module, average)
        elif "upsamplers" in name and isinstance(module, nn.Conv2d):
            carry(module, smooth)
    for half in (vae.encoder, vae.decoder):
        spread(half.conv_in)
        half.conv_norm_out.bias.data[: len(carriers)] = 4
        gather(half.conv_out)
    nn.init.dirac_(vae.quant_conv.weight)
    nn.init.zeros_(vae.quant_conv.bias)
    nn.init.dirac_(vae.decoder.time_conv_out.weight)
    nn.init.zeros_(vae.decoder.time_conv_out.bias)


def low_quality(clips: Tensor, generator: torch.Generator) -> Tensor:
    """What hints look like: reduced by 4, noisy, up-sampled again; (b c f h w) in [-1, 1]."""
    b, _, f, h, w = clips.shape
    frames = rearrange(clips, "b c f h w -> (b f) c h w")
    small = F.interpolate(frames, size=(h // 4, w // 4), mode="area")
    strength = 0.15 * torch.rand(b, generator=generator).repeat_interleave(f)[:, None, None, None]
    small = small + strength * torch.randn(small.shape, generator=generator)
    large = F.interpolate(small.clamp(-1, 1), size=(h, w), mode="bicubic").clamp(-1, 1)
    return rearrange(large, "(b f) c h w -> b c f h w", b=b)


def train_vae(
    clips: list[Tensor], out: Path, *, steps: int, seed: int = 0, batch: int = 2, crop: int = 48
) -> None:
    """uint8 clips (n f 3 h w) -> `out`, a float16 safetensors file, and a checkpoint beside it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layer initialisation takes no generator
        vae: Any = vae_from_config(TINY_VAE).model
    start_as_resampler(vae)
    state_file = out.with_suffix(".state.pt")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=6e-4, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 7e-4, total_steps=steps, pct_start=0.03
    )
    average = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    recent: list[float] = []
    for step in range(steps):
        part = clips[int(torch.randint(len(clips), (), generator=generator))]
        picks = torch.randint(len(part), (batch,), generator=generator)
        top, left = (
            int(torch.randint(side - crop + 1, (), generator=generator)) for side in part.shape[-2:]
        )
        start = int(torch.randint(part.shape[1] - 2, (), generator=generator))
        x = part[picks, start : start + 3, :, top : top + crop, left : left + crop]
        x = rearrange(x.float() / 127.5 - 1, "b f c h w -> b c f h w")
        if step % 3 == 2:
            x = low_quality(x, generator)
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        moments = vae.encode(frames).latent_dist
        z = moments.mean + 0.02 * torch.randn(moments.mean.shape, generator=generator)
        decoded = vae.decode(z, num_frames=3).sample
        error = decoded - frames
        detail = error[..., 1:, 1:] - error[..., :-1, :-1]
        # A gentle pull to unit variance keeps latents in the range that diffusion expects.
        spread = (moments.mean.pow(2).mean((0, 2, 3)) - 1).pow(2).mean()
        loss = error.abs().mean() + 0.5 * detail.abs().mean() + 4 * error.pow(2).mean()
        (loss + 1e-3 * spread).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(vae)
        recent.append(error.detach().pow(2).mean().item() / 4)
        if step % 50 == 49 or step == steps - 1:
            psnr = -10 * math.log10(sum(recent[-50:]) / len(recent[-50:]))
            logger.info("step %d PSNR %.2f", step, psnr)
            torch.save(average.module.state_dict(), state_file)
    config = TINY_VAE | {"scaling_factor": round(1 / latent_std(average.module, clips[0][:50]), 4)}
    write_tensors(
        out,
        average.module.state_dict(),
        dtype=torch.float16,
        metadata={"star_vae": json.dumps(config)},
        overwrite=True,
    )


@torch.inference_mode()
def latent_std(vae: Any, clips: Tensor) -> float:
    """Standard deviation of a VAE's raw latents on uint8 clips (n f 3 h w)."""
    frames = rearrange(clips, "n f c h w -> (n f) c h w").float() / 127.5 - 1
    return torch.cat([vae.encode(f[None]).latent_dist.mean for f in frames]).std().item()


@torch.inference_mode()
def preview_rgb(vae: VideoVAE, clips: Tensor) -> tuple[tuple[float, ...], ...]:
    """The linear map from latents to colours, fitted to uint8 clips (n f 3 h w): (c 3)."""
    frames = rearrange(clips, "n f c h w -> (n f) c h w").float() / 127.5 - 1
    latents = torch.cat([vae.encode_frame(frame[None]) for frame in frames])
    colours = F.avg_pool2d(frames, vae.factor)
    latents, colours = (rearrange(x, "n c h w -> (n h w) c") for x in (latents, colours))
    rows = torch.linalg.lstsq(latents, colours).solution.tolist()
    return tuple(tuple(round(value, 4) for value in row) for row in rows)
