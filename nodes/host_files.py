"""Lists the files of the host's model folders and finds or downloads the chosen ones."""

from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ..star_core.backbones import BACKBONES
from ..star_core.checkpoints.download import PUBLISHED, download
from ..star_core.checkpoints.find import first_of, published_of
from ..star_core.checkpoints.kinds import FileKind, identify
from ..star_core.checkpoints.tensors import open_tensors
from ..star_core.model import BUILT_IN
from .host import AUTO, Progress

OWN_FOLDER = "star"
MODEL_FOLDERS = (OWN_FOLDER, "diffusion_models", "checkpoints")
VAE_FOLDERS = (OWN_FOLDER, "vae", "checkpoints")
DECODER_FOLDERS = ("vae_approx",)
TEXT_ENCODER_FOLDERS = (OWN_FOLDER, "text_encoders")

BUILT_IN_NAME = "tiny (built in)"
DOWNLOAD = " (download)"


def add_own_folder() -> None:
    """Registers models/star with the host, beside the folders of extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(OWN_FOLDER, str(Path(folder_paths.models_dir) / OWN_FOLDER))
    places, _ = folder_paths.folder_names_and_paths[OWN_FOLDER]
    folder_paths.folder_names_and_paths[OWN_FOLDER] = (
        places,
        folder_paths.supported_pt_extensions,
    )


def choices(folders: tuple[str, ...], *more: str) -> list[str]:
    """Returns the choices of a file picker: `more`, files of these folders, published files.

    A published file stays in the list after its download, because hosts from 0.8 on reject a
    workflow whose choice is not in the list.
    """
    files = sorted({name for folder in folders for name in folder_paths.get_filename_list(folder)})
    published = [name + DOWNLOAD for name, file in PUBLISHED.items() if file.folder in folders]
    return [*more, *files, *published]


def resolve(name: str, folders: tuple[str, ...], kinds: tuple[FileKind, ...]) -> Path:
    """Returns the file of a choice; downloads a published one unless a copy is there.

    kinds: the kinds of file that count as a copy of the published one. ValueError if there is no
    file of that name.
    """
    for folder in folders:
        if path := folder_paths.get_full_path(folder, name):
            return Path(path)
    if name.endswith(DOWNLOAD) and (known := name.removesuffix(DOWNLOAD)) in PUBLISHED:
        return _fetched(known, folders, kinds)
    places = ", ".join(f"models/{folder}" for folder in folders)
    raise ValueError(f"{name} was not found: put it into one of {places}, or choose another file")


def model_file(name: str) -> Path:
    """Returns the file of the network for a choice of STAR Load Model."""
    if name == BUILT_IN_NAME:
        return BUILT_IN["tiny"][0]
    return resolve(name, MODEL_FOLDERS, tuple(backbone.kind for backbone in BACKBONES.values()))


def part_of_model(
    name: str,
    input_name: str,
    folders: tuple[str, ...],
    kinds: tuple[FileKind, ...],
    *,
    fetch: bool,
    width: int | None = None,
    channels: int | None = None,
) -> Path:
    """Returns the file of a model's VAE or text encoder.

    name: the choice in the input `input_name`; "auto" finds a file in `folders` by its tensors.
    kinds: the kinds of file that fit the model. fetch: download the published file if none is
    found. width: embedding width of the text encoder. channels: latent channels of the VAE.
    ValueError if the file is of another kind or none is found.
    """
    known = published_of(kinds)
    if name != AUTO:
        path = resolve(name, folders, kinds)
        if (kind := identify(open_tensors(path))) not in kinds:
            raise ValueError(
                f"{path.name} seems to be a {kind.title}, but this model needs the "
                f"{PUBLISHED[known].title}: choose {AUTO} for {input_name}"
            )
        return path
    if path := first_of(_files(folders), kinds, width=width, channels=channels):
        return path
    if fetch:
        return _fetched(known, folders, kinds)
    file = PUBLISHED[known]
    raise ValueError(
        f'the {file.title} is missing: choose "{known}{DOWNLOAD}" for {input_name}, or put '
        f"{file.source} into models/{file.folder}"
    )


def _fetched(known: str, folders: tuple[str, ...], kinds: tuple[FileKind, ...]) -> Path:
    """Returns a copy of a published file by its name in these folders, or downloads it."""
    file = PUBLISHED[known]
    if not file.within(folder_paths.models_dir).exists():
        copies = [path for path in _files(folders) if file.is_named(path)]
        if copy := first_of(copies, kinds):
            return copy
    return download(known, folder_paths.models_dir, on_progress=Progress())


def _files(folders: tuple[str, ...]) -> Iterator[Path]:
    for folder in folders:
        for name in folder_paths.get_filename_list(folder):
            if path := folder_paths.get_full_path(folder, name):
                yield Path(path)
