"""Distils a small decoder for a VAE: it learns to show latents as the VAE's own decoder does."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..metrics.fidelity import psnr
from ..planning.meta_memory import META, LiveMetaTensors
from ..progress import Progress
from ..vae.cogvideox import CausalVideoVAE
from ..vae.frame_vae import FrameGeometry, VideoVAE
from ..vae.load import load_vae
from ..vae.small_decoder import SmallDecoder, SmallDecoderConfig, save_decoder, save_with_decoder
from .autoencoder import at, fit
from .finetune import STAGES, VALIDATED, DataConfig
from .objective import Batch, Objective, Sample, TrainConfig, sample_generator
from .plan import vae_on_meta
from .trainer import DEFAULT_EXECUTION, OnStep, TrainExecution, start_accelerate, train
from .videos import VideoClips, VideoSamples

DECODER_FILE, VAE_FILE = "decoder.safetensors", "vae.safetensors"
SHARE = 0.1  # of the compute of the VAE's own decoder
FITTED = 8  # samples that the linear part is fitted to


def decoding_flops(decode: Callable[[Tensor], Any], channels: int) -> int:
    """Returns the FLOPs of decoding 3 frames of 32x32 latents (1 c f h w), counted on meta."""
    with LiveMetaTensors() as live, torch.inference_mode(), META:
        decode(torch.empty(1, channels, 3, 32, 32))
    return live.flops


def small_decoder(geometry: FrameGeometry, share: float = SHARE) -> SmallDecoderConfig:
    """Returns the sizes of a decoder with at most a share of the compute of a VAE's own.

    share: from 0 to 1. ValueError if no decoder is as small.
    """
    vae = vae_on_meta(geometry)
    allowed = share * decoding_flops(vae.decode_window, vae.latent_channels)

    def sized(width: int) -> SmallDecoderConfig:
        return SmallDecoderConfig(
            latent_channels=vae.latent_channels,
            factor=vae.factor,
            width=width,
            blocks=min(4, 1 + width // 32),
        )

    def flops(config: SmallDecoderConfig) -> int:
        with torch.device("meta"):
            decoder = config.build()
        return decoding_flops(partial(_decoded, decoder), vae.latent_channels)

    fitting = [width for width in range(4, 260, 4) if flops(sized(width)) <= allowed]
    if not fitting:
        least = flops(sized(4)) / allowed * share
        raise ValueError(f"the smallest decoder takes a share of {least:.3f}, got {share}")
    return sized(max(fitting))


def _decoded(decoder: nn.Module, latents: Tensor) -> Tensor:
    """Decodes latents (b c f h w) to (b 3 f h w)."""
    frames = latents.shape[2]
    video = decoder(rearrange(latents, "b c f h w -> (b f) c h w"), frames)
    return rearrange(video, "(b f) c h w -> b c f h w", f=frames)


class DecoderObjective(Objective):
    """Mean absolute and mean squared error to what the VAE's own decoder shows.

    network: the small decoder. vae: the VAE. Clean and degraded latents count alike.
    """

    def __init__(self, network: Any, config: TrainConfig, vae: VideoVAE) -> None:
        super().__init__(network, config)
        self.vae = vae

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss of a batch, and its parts by name as numbers."""
        latents = torch.cat([batch.hq, batch.lq])
        with torch.no_grad():
            target = self.vae.decode_window(latents)
        with self.autocast(latents):
            error = _decoded(self.network, latents).float() - target
        absolute, squared = error.abs().mean(), error.square().mean()
        return absolute + 10 * squared, {"absolute": absolute.item(), "squared": squared.item()}


@torch.no_grad()
def fit_linear(decoder: SmallDecoder, vae: VideoVAE, samples: list[Sample]) -> None:
    """Sets the linear part to the least squares fit of what the VAE's decoder shows, in place."""
    latents = torch.stack([z for hq, lq, _ in samples for z in (hq, lq)])
    pixels = vae.decode_window(latents.to(vae.model.device)).cpu()
    latents, pixels = (rearrange(x, "b c f h w -> (b f) c h w") for x in (latents, pixels))
    fit(decoder.linear, latents, at(F.pixel_unshuffle(pixels, vae.factor)))


def distil_decoder(
    vae_file: Path,
    data: DataConfig,
    out: Path,
    config: TrainConfig,
    *,
    scale: float | None = None,
    share: float = SHARE,
    upsampling: str = "bicubic",
    every: int = 500,
    on_step: OnStep | None = None,
    on_progress: Progress | None = None,
    execution: TrainExecution = DEFAULT_EXECUTION,
) -> None:
    """Trains a small decoder for a VAE, or resumes, and writes `out`/decoder.safetensors.

    At the end `out`/vae.safetensors is the VAE with this decoder in it.

    vae_file, scale: see `load_vae`. data: clips; a sample's frames are decoded together. share:
    most compute of the decoder, as a share of that of the VAE's own. upsampling: of degraded clips,
    whose latents are decoded too. every, on_step, execution: see `train`. on_progress: called for
    the first of `finetune.STAGES`. config: its settings of noise levels and DF loss are not used.
    ValueError for the VAE of CogVideoX, and for files and sizes that do not fit each other.
    """
    accelerator = start_accelerate()
    vae = load_vae(vae_file, scale=scale, device=accelerator.device)
    if isinstance(vae, CausalVideoVAE):
        raise ValueError("the VAE of CogVideoX decodes whole clips only: it takes no small decoder")
    if any(side % vae.factor for side in data.sample.size):
        raise ValueError(f"width and height of --size must be multiples of {vae.factor}")
    report = on_progress if accelerator.is_main_process else None
    on_shard = report and partial(report, STAGES[0])

    def samples(folder: Path) -> VideoSamples:
        source = VideoClips(folder, data.recipe, data.sample, on_shard=on_shard)
        return VideoSamples(source, vae, upsampling=upsampling)

    learned = samples(data.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # layer initialisation takes no generator
        decoder = small_decoder(vae.geometry, share).build()
    first = [learned.source.draw(sample_generator(config.seed, i)) for i in range(FITTED)]
    fit_linear(decoder, vae, learned.encode(first))
    validate = None
    if data.validation_set is not None:
        held_out = samples(data.validation_set)
        numbers = [sample_generator(0, number) for number in range(VALIDATED)]
        pairs = [held_out.source.draw(generator) for generator in numbers]
        clean = [held_out.videos(pair)[0].cpu() for pair in pairs]
        latents = [sample.hq for sample in held_out.encode(pairs)]
        validate = partial(compare_decoders, vae, clean, latents)

    def write(out: Path, network: Any, prompts: Any, step: int) -> None:
        save_decoder(out / DECODER_FILE, network, metadata={"steps": str(step)}, overwrite=True)
        if step == config.steps:
            save_with_decoder(out / VAE_FILE, vae_file, network, overwrite=True)

    facts = {"VAE": vae_file.name, "share": share, "clips": len(learned.source.clips)}
    train(
        learned,
        DecoderObjective(decoder, config, vae),
        out,
        write=write,
        validate=validate,
        on_step=on_step,
        every=every,
        execution=execution,
        facts=facts | {"recipe": data.recipe.name, "sample": str(data.sample)},
    )


@torch.no_grad()
def compare_decoders(
    vae: VideoVAE,
    clean: list[Tensor],
    latents: list[Tensor],
    decoder: nn.Module,
    prompts: Any,
    step: int,
) -> dict[str, float]:
    """Returns the PSNR of a small decoder and of the VAE's own to clean clips, and to each other.

    clean: clips (f 3 h w) in [0, 1]. latents: of each, (c f h w). Clips are decoded as a whole.
    prompts, step: ignored.
    """

    def shown(video: Tensor) -> Tensor:
        return (rearrange(video[0], "c f h w -> f c h w") / 2 + 0.5).clamp(0, 1).cpu()

    def mean_psnr(a: Tensor, b: Tensor) -> float:
        return sum(map(psnr, a, b)) / len(a)

    def figures() -> Iterator[tuple[float, float, float]]:
        for video, z in zip(clean, latents, strict=True):
            z = z[None].to(vae.model.device)
            small, own = shown(_decoded(decoder, z)), shown(vae.decode_window(z))
            yield mean_psnr(small, own), mean_psnr(small, video), mean_psnr(own, video)

    sums = [sum(column) / len(clean) for column in zip(*figures(), strict=True)]
    names = ("small to own psnr", "small psnr", "own psnr")
    return dict(zip(names, sums, strict=True))
