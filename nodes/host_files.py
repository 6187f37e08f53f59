"""Which files the host's model folders offer, and where a chosen one lies."""

from pathlib import Path

import folder_paths

from ..star_core.downloads import PUBLISHED, download
from ..star_core.known_files import CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, T5, FileKind, identify
from ..star_core.model import BUILT_IN
from ..star_core.tensor_files import open_tensors
from .host import Progress

OWN_FOLDER = "star"
MODEL_FOLDERS = (OWN_FOLDER, "diffusion_models", "checkpoints")
VAE_FOLDERS = (OWN_FOLDER, "vae", "checkpoints")
TEXT_ENCODER_FOLDERS = (OWN_FOLDER, "text_encoders")

BUILT_IN_NAME = "tiny (built in)"
_TO_FETCH = " (download)"


def add_own_folder() -> None:
    """Makes models/star known to the host, besides those of extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(OWN_FOLDER, str(Path(folder_paths.models_dir) / OWN_FOLDER))
    places, _ = folder_paths.folder_names_and_paths[OWN_FOLDER]
    folder_paths.folder_names_and_paths[OWN_FOLDER] = (
        places,
        folder_paths.supported_pt_extensions,
    )


def choices(
    folders: tuple[str, ...], published: tuple[str, ...], *, built_in: bool = False
) -> list[str]:
    """What a file picker shows: the built-in model, files, published ones that are missing."""
    files = sorted({name for folder in folders for name in folder_paths.get_filename_list(folder)})
    missing = [
        name + _TO_FETCH
        for name in published
        if not any(PUBLISHED[name].is_named(file) for file in files)
    ]
    return [*([BUILT_IN_NAME] if built_in else []), *files, *missing]


def resolve(name: str, folders: tuple[str, ...], *, built_in: int | None = None) -> Path:
    """The file that a choice stands for, fetched first if it is a missing published one.

    built_in: which file of the built-in model it is called for, 0 the network, 1 the VAE.
    """
    if name == BUILT_IN_NAME and built_in is not None:
        return BUILT_IN["tiny"][built_in]
    for folder in folders:
        if path := folder_paths.get_full_path(folder, name):
            return Path(path)
    if (known := name.removesuffix(_TO_FETCH)) in PUBLISHED:
        return download(known, folder_paths.models_dir, on_progress=Progress())
    places = ", ".join(f"models/{folder}" for folder in folders)
    raise ValueError(f"{name} is not there: put it into one of {places}, or choose another file")


def check_text_encoder(path: Path) -> FileKind:
    """Its kind; ValueError unless it is one of ours: the host would take others for one."""
    kind = identify(open_tensors(path))
    if kind not in (CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, T5):
        raise ValueError(
            f"{path.name} seems to be a {kind.title}: STAR takes the text encoder OpenCLIP "
            "ViT-H-14, laion2b_s32b_b79k, and on CogVideoX t5-v1_1-xxl"
        )
    return kind
