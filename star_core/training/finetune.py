"""Trains the network of a model file on shards of clips: in part as STAR was, whole, or a LoRA."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import Network, NetworkConfig, backbone_of
from ..degradation import Recipe
from ..lora import LoraLayers, add_lora, open_lora, write_lora
from ..model import check_vae, open_text_encoder
from ..progress import Progress
from ..star_checkpoint import ModelFile, save_model
from ..text.prompts import PromptDefaults, join_prompt
from ..vae.cogvideox import CausalVideoVAE
from ..vae.load import load_vae
from ..windows.geometry import minimal_padding
from .adversarial import AdversarialObjective
from .distillation import DistillationObjective, DistillConfig
from .initialise import completed, start_network
from .objective import Prompts, TrainConfig, TrainingObjective, sample_generator
from .pixels import decoder_of
from .trainer import DEFAULT_EXECUTION, OnStep, TrainExecution, start_accelerate, train
from .validation import Validation
from .videos import SampleSize, VideoClips, VideoSamples

STAGES = ("index", "validate")
VALIDATED = 4  # random clips, or one for each process where there are more
MODEL_FILE, LORA_FILE = "model.safetensors", "lora.safetensors"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data. data, validation_set: folders of shards (`make_dataset`).

    recipe: degrades the clips. sample: size of the samples.
    """

    data: Path
    recipe: Recipe
    sample: SampleSize = SampleSize()
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
    lora: Path | None = None,
    distill: DistillConfig | None = None,
    teacher: Mapping[str, Any] | None = None,
    every: int = 500,
    on_step: OnStep | None = None,
    on_progress: Progress | None = None,
    execution: TrainExecution = DEFAULT_EXECUTION,
) -> None:
    """Trains a model file, or resumes, and writes `out`/model.safetensors or lora.safetensors.

    model: a file with official names, with or without ControlNet and LIEM. vae_file: the model's
    VAE. text_encoder: None for models with learned prompts. rank, lora_layers, lora_controlnet: of
    a LoRA, see `add_lora`. lora: a file with a LoRA of the same sizes, to train on. distill: what
    the LoRA is distilled for; None to train on the clean clips. teacher: fields of
    `SamplingDefaults` that replace the file's for the teacher, such as cfg. every: steps between
    states. on_step, execution: see `train`. on_progress: called as on_progress(stage, done, total)
    for the stages in `STAGES`, by the first process. ValueError for
    files and sizes that do not fit each other, and for a distillation that trains more than a LoRA.
    """
    if distill is not None and config.trains != "lora":
        raise ValueError("a distillation trains a LoRA: leave out --trains, or choose lora")
    accelerator = start_accelerate()
    device = accelerator.device
    report = on_progress if accelerator.is_main_process else None

    def progress(stage: str) -> Callable[[int, int], None] | None:
        return report and partial(report, stage)

    network, file = start_network(model)
    vae = load_vae(vae_file, scale=file.latents.scale, device=device)
    check_vae(vae, file.config, file.latents)
    check_sample(data.sample.size, network.config, vae.factor)
    if (data.sample.frames - 1) % vae.latent_frames:
        raise ValueError(
            f"the VAE takes 1 frame and a multiple of {vae.latent_frames} more, got "
            f"{data.sample.frames} frames"
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

        with_quality_words = partial(_with_quality_words, embedding, defaults)
        negative = embedding(defaults.negative or "")[None]
        encode, text = embedding, (with_quality_words("")[None], negative)
        if distill is not None:  # guidance needs the prompts of a run
            encode = with_quality_words
    student: dict[str, Any] = {}
    if config.trains == "lora":
        add_lora(network, rank, layers=lora_layers, controlnet=lora_controlnet, seed=config.seed)
        if lora is not None:
            open_lora(lora).continue_in(network)
    elif lora is not None:
        raise ValueError("--lora continues a LoRA: add --trains lora, or leave it out")
    if distill is None:
        objective = TrainingObjective(network, config, prompts=prompts, decoder=decoder)
    else:
        kind = AdversarialObjective if distill.adversarial else DistillationObjective
        objective = kind(
            network, config, distill, sampling, prompts=prompts, negative=negative, decoder=decoder
        )
        student = distill.sampling(sampling)

    def samples(folder: Path) -> VideoSamples:
        source = VideoClips(
            folder,
            data.recipe,
            data.sample,
            caption_dropout=defaults.caption_dropout,
            on_shard=progress(STAGES[0]),
        )
        return VideoSamples(source, vae, upsampling=file.sampling.upsample, text=encode)

    learned = samples(data.data)
    validate = None
    if data.validation_set is not None:
        held_out = samples(data.validation_set)
        processes, rank = accelerator.num_processes, accelerator.process_index
        numbers = range(rank, max(VALIDATED, processes) // processes * processes, processes)

        def clip(number: int) -> tuple[Tensor, Tensor]:
            clean, large = held_out.videos(held_out.source.draw(sample_generator(0, number)))
            return clean.cpu(), large.cpu()

        validate = Validation(
            {number: clip(number) for number in numbers},
            vae,
            out,
            sampling=replace(file.sampling, **student),
            text=text,
            bf16=config.bf16,
            on_clip=progress(STAGES[1]),
        )
    facts = {
        "model": model.name,
        "recipe": data.recipe.name,
        **asdict(data.sample),
        "clips": len(learned.source.clips),
    }
    if config.trains == "lora":
        facts |= {"rank": rank, "LoRA layers": lora_layers, "LoRA ControlNet": lora_controlnet}
        facts |= {"LoRA at the start": lora and lora.name}
    if distill is not None:
        facts |= {f"distill.{name}": value for name, value in asdict(distill).items()}
        facts |= {f"teacher.{name}": value for name, value in (teacher or {}).items()}
    train(
        learned,
        objective,
        out,
        write=_Writer(file, config.steps, student),
        validate=validate,
        on_step=on_step,
        every=every,
        execution=execution,
        facts=facts,
    )


class _Writer:
    """Writes the trained network, or its LoRA, with the settings of the file that it came from.

    Files are named by their step, the last one MODEL_FILE or LORA_FILE. What is not trained is
    written as the file had it, because it may have been narrowed since.
    student: fields of `SamplingDefaults` that a distilled LoRA needs, {} for others.
    """

    def __init__(self, file: ModelFile, steps: int, student: Mapping[str, Any]) -> None:
        self.file, self.steps, self.student = file, steps, student

    def __call__(self, out: Path, network: Network, prompts: Prompts | None, step: int) -> None:
        def path(last: str) -> Path:
            return out / (last if step == self.steps else last.replace(".", f"-{step:07d}."))

        if any(".lora_" in name for name, _ in network.named_parameters()):
            write_lora(path(LORA_FILE), network, sampling=self.student, overwrite=True)
            return
        weights = network.state_dict()
        begun = completed(self.file.tensors, weights)
        frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
        save_model(
            path(MODEL_FILE),
            network,
            weights={key: begun[key] if key in frozen else weights[key] for key in weights},
            sampling=self.file.sampling,
            latents=self.file.latents,
            prompts=prompts and prompts.learned(),
            dtype=torch.float16,
            metadata={"steps": str(step)},
            overwrite=True,
        )


def check_sample(size: tuple[int, int], config: NetworkConfig, vae_factor: int) -> None:
    """Raises ValueError, with a size that fits, if a network cannot take samples of `size`.

    size: (height, width) in pixels. config: of the network. vae_factor: pixels per latent.
    """
    (height, width), levels = size, config.downsamplings
    padding = minimal_padding(height, width, vae_factor=vae_factor, levels=levels)
    if any(padding):
        wide, high = width + padding.left + padding.right, height + padding.top + padding.bottom
        raise ValueError(
            f"samples of {width}x{height} do not fit this network: choose --size {wide}x{high}, "
            f"or less by multiples of {vae_factor * 2**levels}"
        )


def _with_quality_words(
    embedding: Callable[[str], Tensor], usual: PromptDefaults, caption: str
) -> Tensor:
    """Returns the embedding (l d) of a caption, or of STAR's if it is empty, as in a run."""
    return embedding(join_prompt(caption or usual.prompt, usual.positive, ", "))
