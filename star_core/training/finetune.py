"""Trains the network of a model file on shards of clips: in part as STAR was, whole, or a LoRA."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import Network, backbone_of
from ..degradation import Recipe
from ..lora import LoraLayers, add_lora, write_lora
from ..model import check_vae, open_text_encoder
from ..star_checkpoint import ModelFile, save_model
from ..text.prompts import PromptDefaults, join_prompt
from ..vae.cogvideox import CausalVideoVAE
from ..vae.load import load_vae
from .distillation import DistillationObjective, DistillConfig
from .initialise import start_network
from .objective import Prompts, TrainConfig, TrainingObjective, sample_generator
from .pixels import decoder_of
from .trainer import OnStep, start_accelerate, train
from .validation import Validation
from .videos import VideoSamples

MODEL_FILE, LORA_FILE = "model.safetensors", "lora.safetensors"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data. data, validation_set: folders of shards (`make_dataset`).

    recipe: degrades the clips. frames, size (height, width), interval: see `VideoSamples`.
    """

    data: Path
    recipe: Recipe
    frames: int = 32
    size: tuple[int, int] = (720, 1280)
    interval: int = 2
    validation_set: Path | None = None


def finetune(
    model: Path,
    vae_file: Path,
    data: DataConfig,
    out: Path,
    config: TrainConfig,
    *,
    text_encoder: Path | None = None,
    rank: int = 16,
    lora_layers: LoraLayers = "attention",
    lora_controlnet: bool = True,
    distill: DistillConfig | None = None,
    teacher: Mapping[str, Any] | None = None,
    every: int = 500,
    on_step: OnStep | None = None,
) -> None:
    """Trains a model file, or resumes, and writes `out`/model.safetensors or lora.safetensors.

    model: a file with official names, with or without ControlNet and LIEM. vae_file: the model's
    VAE. text_encoder: None for models with learned prompts. rank, lora_layers, lora_controlnet: of
    a LoRA, see `add_lora`. distill: what the LoRA is distilled for; None to train on the clean
    clips. teacher: fields of `SamplingDefaults` that replace the file's for the teacher, such as
    cfg. every: steps between checkpoints. on_step: see `train`. ValueError for files and sizes that
    do not fit each other, and for a distillation that trains more than a LoRA.
    """
    if distill is not None and config.trains != "lora":
        raise ValueError("a distillation trains a LoRA: leave out --trains, or choose lora")
    device = start_accelerate().device
    network, file = start_network(model)
    vae = load_vae(vae_file, scale=file.latents.scale, device=device)
    check_vae(vae, file.config, file.latents)
    network.check_size(*(side // vae.factor for side in data.size))
    if (data.frames - 1) % vae.latent_frames:
        raise ValueError(
            f"the VAE takes 1 frame and a multiple of {vae.latent_frames} more, got "
            f"{data.frames} frames"
        )
    decoder = None
    if config.df_space == "pixels" or (distill and distill.pixels):
        if isinstance(vae, CausalVideoVAE):
            raise ValueError(
                "this VAE decodes whole clips only: use --df-space latents, and no --pixels"
            )
        decoder = decoder_of(vae)
    config, defaults = replace(config, shift=file.sampling.shift), backbone_of(file.config).prompts
    prompts, text, negative = None, None, None
    sampling = replace(file.sampling, **(teacher or {}))
    encode: Callable[[str], Tensor] | None = None
    if file.prompts is not None:
        prompts = Prompts(file.prompts)
    elif text_encoder is None:
        raise ValueError(f"{model} has no learned prompts: name a text encoder")
    else:
        encoder = open_text_encoder(text_encoder, file.config, device, torch.float32)
        empty = encoder.encode("")
        if defaults.negative is None:
            empty = torch.zeros_like(empty)

        def embedding(caption: str) -> Tensor:
            return (encoder.encode(caption) if caption else empty)[0].float()

        encode, text = embedding, embedding("")[None]
        if distill is not None:  # guidance needs the prompts of a run
            encode = partial(_with_quality_words, embedding, defaults)
            text, negative = encode("")[None], embedding(defaults.negative or "")[None]
    student: dict[str, Any] = {}
    if config.trains == "lora":
        add_lora(network, rank, layers=lora_layers, controlnet=lora_controlnet, seed=config.seed)
    if distill is None:
        objective = TrainingObjective(network, config, prompts=prompts, decoder=decoder)
    else:
        objective = DistillationObjective(
            network, config, distill, sampling, prompts=prompts, negative=negative, decoder=decoder
        )
        student = distill.sampling(sampling)

    def samples(folder: Path) -> VideoSamples:
        return VideoSamples(
            folder,
            vae,
            data.recipe,
            frames=data.frames,
            size=data.size,
            interval=data.interval,
            upsampling=file.sampling.upsample,
            text=encode,
            caption_dropout=defaults.caption_dropout,
        )

    validate = None
    if data.validation_set is not None:
        held_out = samples(data.validation_set)
        count = min(4, len(held_out.clips))
        pairs = [held_out.pair(sample_generator(0, i))[:2] for i in range(count)]
        validate = Validation(
            pairs, vae, out, sampling=replace(file.sampling, **student), text=text
        )
    train(
        samples(data.data),
        objective,
        out,
        write=_Writer(file, student),
        validate=validate,
        on_step=on_step,
        every=every,
    )


class _Writer:
    """Writes the trained network, or its LoRA, with the settings of the file that it came from.

    student: fields of `SamplingDefaults` that a distilled LoRA needs, {} for others.
    """

    def __init__(self, file: ModelFile, student: Mapping[str, Any]) -> None:
        self.file, self.student = file, student

    def __call__(self, out: Path, network: Network, prompts: Prompts | None, step: int) -> None:
        if any(".lora_" in name for name, _ in network.named_parameters()):
            write_lora(out / LORA_FILE, network, sampling=self.student, overwrite=True)
            return
        save_model(
            out / MODEL_FILE,
            network,
            sampling=self.file.sampling,
            latents=self.file.latents,
            prompts=prompts and prompts.learned(),
            dtype=torch.float16,
            metadata={"steps": str(step)},
            overwrite=True,
        )


def _with_quality_words(
    embedding: Callable[[str], Tensor], usual: PromptDefaults, caption: str
) -> Tensor:
    """Returns the embedding (l d) of a caption, or of STAR's if it is empty, as in a run."""
    return embedding(join_prompt(caption or usual.prompt, usual.positive, ", "))
