"""Trains the built-in model in stages that can be resumed: clips, VAE, latent pairs, network."""

import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..degradation.recipes import HEAVY, MILD, TRAINING_OF_SCALE
from ..losses import DFLossConfig
from ..metrics.lpips import load_lpips
from ..models.encoder import UNetConfig
from ..models.unet import ControlledVideoUNet
from ..progress import Progress
from ..sampling_defaults import LatentFormat, SamplingDefaults
from ..star_checkpoint import LearnedPrompts, load_model, save_model
from ..vae.load import load_frame_vae
from .autoencoder import TINY_VAE, preview_rgb, train_vae
from .clips import ClipConfig, clip_shards
from .linear_decoder import linear_decoder
from .objective import Prompts, Sample, TrainConfig, TrainingObjective, sample_generator
from .pairs import LatentPairs, encode_pairs
from .pixels import PixelCrop, decoder_of
from .trainer import OnStep, train

logger = logging.getLogger(__name__)

STAGES = ("clips", "VAE", "pairs")
MODEL_FILE, VAE_FILE = "tiny.safetensors", "tiny_vae.safetensors"
CROP = (12, 18, 20)
TOKENS = 4
CLIPS = ClipConfig(size=(12, 104, 112), candidates=4, stills=0.35)
# Recipes with their shares of the clips: the two that results are measured with, and training
# recipes of every scale.
RECIPES = (
    (0.2, HEAVY),
    (0.14, MILD),
    *zip((0.16, 0.14, 0.18, 0.18), TRAINING_OF_SCALE.values(), strict=True),
)
NETWORK = UNetConfig(
    in_dim=TINY_VAE["latent_channels"],
    out_dim=TINY_VAE["latent_channels"],
    dim=32,
    context_dim=32,
    dim_mult=(1, 2, 2),
    num_heads=2,
    head_dim=32,
    num_res_blocks=1,
    attn_scales=(0.25,),
    dropout=0.0,
    norm_groups=8,
    # So small that the prior mean is the hint until hardly any noise is left: the result is then
    # the same at every noise level, and more evaluations change nothing.
    hint_prior=0.1,
    guess_input=True,
)
# Half of the samples at the noise level of the single evaluation, half at all levels.
RECIPE = TrainConfig(
    steps=1,
    optimizer="muon",
    learning_rate=2e-3,
    early=0.0,
    start=0.5,
    own=True,
    degraded=0.05,
    ema=0.99,
    perceptual=8.0,
    df=DFLossConfig(beta=0.5),
    crop=PixelCrop(frames=2, height=18, width=20, margin=0),
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
    same_size_strength=0.4,
)


def train_tiny(
    data: Path,
    out: Path,
    *,
    steps: int,
    vae_steps: int = 1400,
    shards: int = 8,
    per_shard: int = 300,
    seed: int = 0,
    start: Path | None = None,
    sharp: float = 0.0,
    metric_weights: Path | None = None,
    bf16: bool = False,
    on_step: OnStep | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Trains the built-in model on the videos and pictures below `data`.

    Writes `out`/tiny.safetensors and `out`/tiny_vae.safetensors, and intermediate results with
    which the same call resumes, also with more `steps`.

    steps, vae_steps: optimizer steps of network and VAE. shards, per_shard: files of clips, and
    clips in each. seed: of clips, degradations, initial weights and noise.
    start: a folder with the two files of a model to start from, such as `star_core/weights`.
    sharp: share of samples that train the preset sharp with LPIPS; needs `start`.
    metric_weights: folder of LPIPS' weights. bf16: whether the network computes in bfloat16.
    on_step: see `train`. on_progress: called as on_progress(stage, done, total) for the stages
    before, in `STAGES`.

    ValueError if `sharp` lacks `start`, or `start` has no learned prompts.
    """
    # A trained model loses what it knows at the full rate, so there the rate falls from the start.
    decay_from = 0 if start else steps // 2
    config = replace(RECIPE, steps=steps, decay_from=decay_from, seed=seed, bf16=bf16, sharp=sharp)
    if sharp and start is None:
        raise ValueError("the preset sharp needs a trained model: name its folder with --start")
    perceptual = load_lpips("alex", folder=metric_weights) if sharp else None
    vae_file = out / VAE_FILE
    init = learned = None
    if start is not None:
        init = load_model(start / MODEL_FILE, dtype=torch.float32)
        learned = init.prompts
        if learned is None:
            raise ValueError(f"{start / MODEL_FILE} has no learned prompts: start from a tiny")
        if sharp and learned.sharp is None:
            learned = learned._replace(sharp=learned.positive)
    report = on_progress or (lambda stage, done, total: None)
    on_clip = partial(report, STAGES[0])
    clips = list(clip_shards(data, out / "clips", shards, per_shard, seed, CLIPS, on_clip=on_clip))
    if start is not None and not vae_file.exists():
        shutil.copyfile(start / VAE_FILE, vae_file)
    if not vae_file.exists():
        opened = [torch.load(path, mmap=True, weights_only=True) for path in clips]
        on_vae_step = partial(report, STAGES[1])
        train_vae(opened, vae_file, steps=vae_steps, seed=seed, on_step=on_vae_step)
    vae = load_frame_vae(vae_file)
    pairs = out / "pairs"
    pairs.mkdir(exist_ok=True)
    for index, path in enumerate(clips):
        shard = pairs / f"pairs_{index:03d}.safetensors"
        if not shard.exists():
            logger.info("encoding %s", path.name)
            part = torch.load(path, mmap=True, weights_only=True)

            def on_pair(done: int, total: int, before: int = index) -> None:
                report(STAGES[2], before * total + done, len(clips) * total)

            seeds = seed + 1_000_000 * (index + 1)
            encode_pairs(part, vae, RECIPES, seeds, shard, on_clip=on_pair)
    opened = torch.load(clips[0], mmap=True, weights_only=True)
    latents = LatentFormat(scale=vae.scaling_factor, rgb=preview_rgb(vae, opened[:50]))
    latent_pairs = LatentPairs(pairs, CROP)
    if init is None or learned is None:
        network, prompts = new_network(NETWORK, seed)
    else:
        network, prompts = init.network, Prompts(learned)
    objective = TrainingObjective(
        network,
        config,
        prompts=prompts,
        pixel_kernel=linear_decoder(vae, first_samples(latent_pairs, seed)),
        decoder=decoder_of(vae) if sharp else None,
        perceptual=perceptual,
    )
    train(
        latent_pairs,
        objective,
        out,
        write=partial(write_tiny, latents=latents),
        on_step=on_step,
    )


def new_network(config: UNetConfig, seed: int) -> tuple[ControlledVideoUNet, Prompts]:
    """Returns an untrained network that predicts its hint prior, and untrained prompts.

    The input of noise to its ControlNet is zero: most samples are nearly pure noise, and a
    ControlNet that starts from a mixture of noise and hint needs thousands of samples to separate
    them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layer initialisation takes no generator
        network = ControlledVideoUNet(config)
    noise_input = network.VideoControlNet.input_blocks[0]
    assert isinstance(noise_input, nn.ModuleList)
    for layer in (network.out[-1], noise_input[0]):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    generator = torch.Generator().manual_seed(seed)
    shape = 1, TOKENS, config.context_dim
    prompts = (torch.randn(shape, generator=generator) for _ in range(2))
    return network, Prompts(LearnedPrompts(*prompts))


def first_samples(pairs: LatentPairs, seed: int, count: int = 24) -> list[Sample]:
    """Returns the first samples that training with this seed draws."""
    return [pairs.sample(sample_generator(seed, index)) for index in range(count)]


def write_tiny(
    out: Path,
    network: ControlledVideoUNet,
    prompts: Prompts | None,
    step: int,
    *,
    latents: LatentFormat,
) -> None:
    """Writes `out`/tiny.safetensors in float16, as `train` calls it.

    step: number of the last step. latents: format of the VAE's latents.
    """
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
