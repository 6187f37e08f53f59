"""The built-in model's recipe: clips, VAE, latent pairs, network; each stage can be resumed."""

import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..backbones import LatentFormat, SamplingDefaults
from ..checkpoints import load_model, save_model
from ..degradation import HEAVY, MILD, TRAINING
from ..models.encoder import UNetConfig
from ..models.unet import ControlledVideoUNet
from ..tensor_files import open_tensors
from ..vae import VideoVAE, load_vae
from .autoencoder import preview_rgb, train_vae
from .clips import ClipConfig, clip_shards
from .objective import Prompts, TrainConfig, sample_generator
from .pairs import LatentPairs, encode_pairs
from .readout import features, fit_last_layer, linear_decoder
from .trainer import OnStep, train

logger = logging.getLogger(__name__)

MODEL_FILE, VAE_FILE = "tiny.safetensors", "tiny_vae.safetensors"
CROP = (5, 26, 28)
TOKENS = 4
# Shares of the clips: the two that results are judged by, and what surrounds them.
RECIPES = ((0.38, HEAVY), (0.2, MILD), (0.42, TRAINING))
NETWORK = UNetConfig(
    in_dim=16,
    out_dim=16,
    dim=32,
    context_dim=32,
    dim_mult=(1, 2, 2),
    num_heads=2,
    head_dim=32,
    num_res_blocks=1,
    attn_scales=(0.25,),
    dropout=0.0,
    norm_groups=8,
)
SAMPLING = SamplingDefaults(
    steps=1,
    solver_mode="normal",
    cfg=1.0,
    cfg_rescale=0.0,
    noise_level=900,
    upsample="bicubic",
    color_fix="none",
    decode_window=8,
)


def train_tiny(
    data: Path,
    out: Path,
    *,
    steps: int,
    vae_steps: int = 1400,
    shards: int = 12,
    per_shard: int = 500,
    seed: int = 0,
    start: Path | None = None,
    refit: bool = False,
    on_step: OnStep | None = None,
) -> None:
    """Trains the built-in model on the videos and pictures below `data`.

    Leaves `out`/tiny.safetensors and `out`/tiny_vae.safetensors, and what it needs to go on with
    more `steps` where it stopped. seed: of clips, degradations, initial weights and noise.
    start: a folder with those two files to go on from, such as `star_core/weights`.
    refit: ends with the last layer fitted by least squares, see `refit_tiny`.
    """
    clips = list(clip_shards(data, out / "clips", shards, per_shard, seed, ClipConfig()))
    vae_file = out / VAE_FILE
    init = None
    if start is not None:
        init = load_model(start / MODEL_FILE, dtype=torch.float32)
        if not vae_file.exists():
            shutil.copyfile(start / VAE_FILE, vae_file)
    if not vae_file.exists():
        opened = [torch.load(path, mmap=True, weights_only=True) for path in clips]
        train_vae(opened, vae_file, steps=vae_steps, seed=seed)
    vae = load_vae(vae_file)
    pairs = out / "pairs"
    pairs.mkdir(exist_ok=True)
    for index, path in enumerate(clips):
        shard = pairs / f"pairs_{index:03d}.safetensors"
        if not shard.exists():
            logger.info("encoding %s", path.name)
            part = torch.load(path, mmap=True, weights_only=True)
            encode_pairs(part, vae, RECIPES, seed + 1_000_000 * (index + 1), shard)
    opened = torch.load(clips[0], mmap=True, weights_only=True)
    latents = LatentFormat(scale=vae.scaling_factor, rgb=preview_rgb(vae, opened[:50]))
    latent_pairs = LatentPairs(pairs, CROP)
    config = TrainConfig(steps=steps, seed=seed)
    if init is None:
        spread = round(latent_pairs.spread(), 2)
        network, prompts = started(replace(NETWORK, hint_prior=spread), seed)
    else:
        network = init.network
        assert init.prompts is not None and isinstance(network, ControlledVideoUNet)
        prompts = Prompts.of(init.prompts)
    train(
        latent_pairs,
        network,
        config,
        out,
        prompts=prompts,
        write=partial(write_tiny, latents=latents),
        on_step=on_step,
    )
    if refit:
        refit_tiny(out / MODEL_FILE, vae, LatentPairs(pairs), seed=seed)


def refit_tiny(
    path: Path, vae: VideoVAE, pairs: LatentPairs, *, clips: int = 54, seed: int = 0
) -> None:
    """Fits a model's last layer anew; two thirds of the clips are seen where sampling starts."""
    model = load_model(path, dtype=torch.float32)
    network, prompts = model.network, model.prompts
    assert prompts is not None and isinstance(network, ControlledVideoUNet)
    seen = []
    drawn = [pairs.sample(sample_generator(seed, index)) for index in range(clips)]
    decoder = linear_decoder(vae, drawn[:24])
    for index, sample in enumerate(drawn):
        generator = sample_generator(seed + 1, index)
        t = model.sampling.noise_level - 1
        if index % 3 == 0:
            t = int(torch.randint(t // 6, t, (), generator=generator))
        noise = torch.randn(sample.hq.shape, generator=generator)
        seen.append(features(network, prompts.positive, sample, noise, decoder, t))
    fit_last_layer(network, seen, decoder)
    metadata = {k: v for k, v in open_tensors(path).metadata.items() if k == "steps"}
    save_model(
        path,
        network,
        sampling=model.sampling,
        latents=model.latents,
        prompts=prompts,
        dtype=torch.float16,
        metadata=metadata,
        overwrite=True,
    )


def started(config: UNetConfig, seed: int) -> tuple[ControlledVideoUNet, Prompts]:
    """An untrained network that predicts its hint prior, and untrained prompts.

    Its ControlNet sees the hint alone: most samples are nearly pure noise, and one that starts
    from noise and hint mixed spends its first thousands of samples on telling them apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layer initialisation takes no generator
        network = ControlledVideoUNet(config)
    noise_input = network.VideoControlNet.input_blocks[0]
    assert isinstance(noise_input, nn.ModuleList)
    for layer in (network.out[-1], noise_input[0]):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return network, Prompts(TOKENS, config.context_dim, torch.Generator().manual_seed(seed))


def write_tiny(
    out: Path,
    network: ControlledVideoUNet,
    prompts: Prompts | None,
    step: int,
    *,
    latents: LatentFormat,
) -> None:
    """`out`/tiny.safetensors, float16."""
    assert prompts is not None
    save_model(
        out / MODEL_FILE,
        network,
        sampling=SAMPLING,
        latents=latents,
        prompts=prompts.learned(),
        dtype=torch.float16,
        metadata={"steps": str(step)},
        overwrite=True,
    )
