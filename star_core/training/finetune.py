"""Trains the network of a model file on shards of clips: in part as STAR was, whole, or a LoRA."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..backbones import Network, backbone_of
from ..degradation import Recipe
from ..model import check_vae, open_text_encoder
from ..parity import DEFAULT
from ..progress import Progress
from ..star_checkpoint import ModelFile, save_model
from ..text.prompts import join_prompt
from ..vae.cogvideox import CausalVideoVAE
from ..vae.load import load_vae
from .initialise import completed, start_network
from .lora import add_lora, write_lora
from .objective import Prompts, TrainConfig, sample_generator
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
    every: int = 500,
    on_step: OnStep | None = None,
    on_progress: Progress | None = None,
    execution: TrainExecution = DEFAULT_EXECUTION,
) -> None:
    """Trains a model file, or resumes, and writes `out`/model.safetensors or lora.safetensors.

    model: a file with official names, with or without ControlNet and LIEM. vae_file: the model's
    VAE. text_encoder: None for models with learned prompts. rank: of a LoRA. every: steps between
    states. on_step, execution: see `train`.
    on_progress: called as on_progress(stage, done, total) for the stages in `STAGES`, by the first
    process. ValueError for files and sizes that do not fit each
    other.
    """
    accelerator = start_accelerate()
    device = accelerator.device
    report = on_progress if accelerator.is_main_process else None

    def progress(stage: str) -> Callable[[int, int], None] | None:
        return report and partial(report, stage)

    network, file = start_network(model)
    vae = load_vae(vae_file, scale=file.latents.scale, device=device)
    check_vae(vae, file.config, file.latents)
    network.check_size(*(side // vae.factor for side in data.sample.size))
    if (data.sample.frames - 1) % vae.latent_frames:
        raise ValueError(
            f"the VAE takes 1 frame and a multiple of {vae.latent_frames} more, got "
            f"{data.sample.frames} frames"
        )
    decoder = None
    if config.df_space == "pixels":
        if isinstance(vae, CausalVideoVAE):
            raise ValueError("this VAE decodes whole clips only: use --df-space latents")
        decoder = decoder_of(vae)
    config, defaults = replace(config, shift=file.sampling.shift), backbone_of(file.config).prompts
    prompts, text = None, None
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

        good = join_prompt(defaults.prompt, defaults.positive, DEFAULT.prompt_separator)
        encode, text = embedding, (embedding(good)[None], embedding(defaults.negative or "")[None])
    if config.trains == "lora":
        add_lora(network, rank, seed=config.seed)

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
            sampling=file.sampling,
            text=text,
            bf16=config.bf16,
            on_clip=progress(STAGES[1]),
        )
    facts = {
        "model": model.name,
        "LoRA rank": rank if config.trains == "lora" else None,
        "recipe": data.recipe.name,
        **asdict(data.sample),
        "clips": len(learned.source.clips),
    }
    train(
        learned,
        network,
        config,
        out,
        write=_Writer(file, config.steps),
        prompts=prompts,
        decoder=decoder,
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
    """

    def __init__(self, file: ModelFile, steps: int) -> None:
        self.file, self.steps = file, steps

    def __call__(self, out: Path, network: Network, prompts: Prompts | None, step: int) -> None:
        def path(last: str) -> Path:
            return out / (last if step == self.steps else last.replace(".", f"-{step:07d}."))

        if any(".lora_" in name for name, _ in network.named_parameters()):
            write_lora(path(LORA_FILE), network, overwrite=True)
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
