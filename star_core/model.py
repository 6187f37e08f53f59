"""A model as a whole: where its files lie, what they hold, its network, VAE and prompts at work."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .backbones import BACKBONES, I2VGENXL, Backbone, NetworkConfig
from .checkpoints.download import PUBLISHED
from .checkpoints.find import find_published, find_text_encoder, find_vae
from .devices import check_compiler, put_channels_last
from .file_info import FileInfo, describe
from .lora import LoraFile, open_lora, with_loras
from .models.attention import attention_of
from .models.cogvideox_weights import CogVideoXConfig
from .parity import Behaviour
from .resume import cached_hash
from .sampling_defaults import LatentFormat, SamplingDefaults
from .star_checkpoint import StarModel, check_preset, load_model
from .text.clip import ClipTextEncoder, load_text_encoder
from .text.prompts import join_prompt
from .text.t5 import T5TextEncoder, load_t5
from .vae.cogvideox import CausalVideoVAE
from .vae.frame_vae import VideoVAE
from .vae.load import load_vae, vae_file
from .vae.small_decoder import use_decoder

WEIGHTS = Path(__file__).with_name("weights")
BUILT_IN = {"tiny": (WEIGHTS / "tiny.safetensors", WEIGHTS / "tiny_vae.safetensors")}
PUBLISHED_MODELS = [name for name, file in PUBLISHED.items() if file.folder == "diffusion_models"]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where a model lies and what it needs; text_encoder is None for one with learned prompts.

    loras: added to the network's weights, in this order. decoder: a small one in place of the VAE's
    own.
    """

    model: Path
    vae: Path
    text_encoder: Path | None
    info: FileInfo
    loras: tuple[LoraFile, ...] = ()
    decoder: Path | None = None

    @property
    def backbone(self) -> Backbone:
        """The family of the network."""
        return BACKBONES[self.info.backbone or I2VGENXL.name]

    @property
    def sampling(self) -> SamplingDefaults:
        """The settings of the model file, or those that its last LoRA with settings asks for."""
        loras = ((lora.strength, lora.sampling) for lora in self.loras)
        return with_loras(SamplingDefaults(**(self.info.sampling or {})), loras)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """prompt: what the video shows. positive, negative: what makes it good or bad. None: STAR's.

    preset: of a model with learned prompts, which takes no text.
    """

    prompt: str | None = None
    positive: str | None = None
    negative: str | None = None
    preset: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Everything that restores: network, VAE, positive and negative embeddings (1 l d).

    embeddings: by the prompts that they are of. sources: the files of network and VAE, or what
    else tells their weights and how they compute from others.
    """

    star: StarModel
    vae: VideoVAE | CausalVideoVAE
    embeddings: dict[Prompts, tuple[Tensor, Tensor]]
    sources: tuple[Path | str, ...]

    @cached_property
    def identity(self) -> list[str]:
        """Hashes that tell these weights from others."""
        return [cached_hash(each) if isinstance(each, Path) else each for each in self.sources]


def find_model(
    name: str,
    *,
    vae: str | None = None,
    text_encoder: str | None = None,
    models_dir: str | None = None,
    loras: Iterable[tuple[str, float]] = (),
    decoder: str | None = None,
) -> ModelFiles:
    """The files of a model: built in, published (`light_deg`, `heavy_deg`) or named by its file.

    Nothing is loaded. A published model, and a `vae` and `text_encoder` that are not given, are
    sought, see `model_files`. loras: files with their strengths. decoder: a small one's file, see
    `use_decoder`. ValueError if the model is no STAR network, if a file is missing, or if a LoRA is
    none.
    """
    path, built_in_vae = BUILT_IN.get(name, (Path(name), None))
    if name in PUBLISHED_MODELS and not path.exists():
        path = find_published(name, models_dir=models_dir)
    info = describe(path)
    if info.config is None:
        raise ValueError(
            f"{path} seems to be a {info.title}: --model takes a STAR network or "
            f"{', '.join((*BUILT_IN, *PUBLISHED_MODELS))}"
            + (f" ({info.problems})" if info.problems else "")
        )
    places = {"model": path, "models_dir": models_dir}
    backbone = BACKBONES[info.backbone or I2VGENXL.name]
    if vae is None and built_in_vae:
        vae_path = built_in_vae
    else:
        vae_path = vae_file(find_vae(vae and vae_file(vae), kinds=backbone.vae, **places))
    if not info.presets:
        width, kinds = info.config["context_dim"], backbone.text_encoder
        text_path = find_text_encoder(text_encoder, kinds=kinds, width=width, **places)
    elif text_encoder is not None:
        raise ValueError(
            f"the model {name} has learned prompts and no text encoder: leave out --text-encoder"
        )
    else:
        text_path = None
    opened = tuple(open_lora(path, strength) for path, strength in loras)
    if decoder is not None and not Path(decoder).is_file():
        raise ValueError(f"{decoder} does not exist: correct --decoder")
    return ModelFiles(
        model=path,
        vae=vae_path,
        text_encoder=text_path,
        info=info,
        loras=opened,
        decoder=None if decoder is None else Path(decoder),
    )


def load(
    files: ModelFiles,
    prompts: Iterable[Prompts] = (Prompts(),),
    *,
    behaviour: Behaviour,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    compiled: bool = False,
    channels_last: bool = False,
) -> Model:
    """Load a model and encode prompts, on `device`; the rest waits on the CPU.

    dtype: type of the network; it and the types of the other parts are those of
    `Backbone.precision`. attention: see `attention_of`. compiled: whether torch compiles the
    network's blocks, which takes minutes when they first run. channels_last: see
    `devices.put_channels_last`.
    ValueError for prompts to a model that takes none, for a VAE or a LoRA that does not fit, and
    for an attention whose package is missing.
    """
    precision = files.backbone.precision(device, dtype)
    fused = attention_of(attention)
    star = load_model(files.model, dtype=precision.network, attention=fused)
    for lora in files.loras:
        lora.apply(star.network)
    if channels_last:
        put_channels_last(star.network)
    if compiled:
        check_compiler(device)
        star.network.compile_blocks()
    vae = load_vae(files.vae, scale=star.latents.scale, dtype=precision.vae)
    check_vae(vae, star.config, star.latents)
    loras = (part for lora in files.loras for part in (lora.path, f"strength {lora.strength}"))
    sources = [files.model, files.vae, *loras, *([attention] if attention != "sdpa" else [])]
    if files.decoder is not None:
        use_decoder(vae, files.decoder)
        sources.append(files.decoder)
    model = Model(star=star, vae=vae, embeddings={}, sources=tuple(sources))
    add_prompts(model, files, prompts, behaviour=behaviour, device=device, dtype=dtype)
    return model


def add_prompts(
    model: Model,
    files: ModelFiles,
    prompts: Iterable[Prompts],
    *,
    behaviour: Behaviour,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> None:
    """Encode those prompts that a model has no embeddings of yet. dtype: see `load`."""
    wanted, star = dict.fromkeys(prompts), model.star
    for each in wanted:
        check_prompts(files, each)
    if star.prompts is not None:
        model.embeddings.update({each: star.prompts.of(each.preset) for each in wanted})
    new = [each for each in wanted if each not in model.embeddings]
    if not new:
        return
    assert files.text_encoder is not None
    usual, precision = files.backbone.prompts, files.backbone.precision(device, dtype)
    encoder = open_text_encoder(files.text_encoder, star.config, device, precision.text)

    def encoded(prompts: Prompts) -> tuple[Tensor, Tensor]:
        caption = join_prompt(
            usual.prompt if prompts.prompt is None else prompts.prompt,
            usual.positive if prompts.positive is None else prompts.positive,
            behaviour.prompt_separator,
        )
        good = encoder.encode(caption).to(precision.network)
        bad = usual.negative if prompts.negative is None else prompts.negative
        return good, torch.zeros_like(good) if bad is None else encoder.encode(bad).to(
            precision.network
        )

    model.embeddings.update({each: encoded(each) for each in new})


def open_text_encoder(
    path: Path, config: NetworkConfig, device: torch.device | str, dtype: torch.dtype
) -> ClipTextEncoder | T5TextEncoder:
    """That of a network. ValueError for a file that is none, or another network's."""
    if isinstance(config, CogVideoXConfig):  # in bfloat16: of twice the size few machines hold it
        width, length = config.context_dim, config.context_length
        return load_t5(path, width=width, length=length, device=device)
    return load_text_encoder(path, width=config.context_dim, device=device, dtype=dtype)


def check_prompts(files: ModelFiles, prompts: Prompts) -> None:
    """ValueError for prompts to a model that takes none, and for a preset that it has not."""
    check_preset(prompts.preset, files.info.presets)
    if files.text_encoder is None and prompts != Prompts(preset=prompts.preset):
        raise ValueError(
            f"{files.model.name} has learned prompts and takes no text: leave out --prompt, "
            "--positive and --negative"
        )


def check_vae(vae: VideoVAE | CausalVideoVAE, config: NetworkConfig, latents: LatentFormat) -> None:
    """ValueError unless the latents of a VAE are those that a model was trained on."""
    found, wanted = (vae.latent_channels, vae.scaling_factor), (config.in_dim, latents.scale)
    if found != wanted:
        raise ValueError(
            f"this VAE makes latents of {found[0]} channels with scale {found[1]:g}, the model "
            f"takes {wanted[0]} with {wanted[1]:g}: choose the VAE that belongs to the model"
        )
    if vae.latent_frames != latents.frames:
        raise ValueError(
            f"this VAE puts {vae.latent_frames} frames into one of latents, the model takes "
            f"{latents.frames}: choose the VAE that belongs to the model"
        )
