"""Which files the host's model folders offer, and where a chosen one lies."""

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
TEXT_ENCODER_FOLDERS = (OWN_FOLDER, "text_encoders")

BUILT_IN_NAME = "tiny (built in)"
DOWNLOAD = " (download)"


def add_own_folder() -> None:
    """Makes models/star known to the host, besides those of extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(OWN_FOLDER, str(Path(folder_paths.models_dir) / OWN_FOLDER))
    places, _ = folder_paths.folder_names_and_paths[OWN_FOLDER]
    folder_paths.folder_names_and_paths[OWN_FOLDER] = (
        places,
        folder_paths.supported_pt_extensions,
    )


def choices(folders: tuple[str, ...], *more: str) -> list[str]:
    """What a file picker shows: `more`, then the files of these folders, then published ones.

    The published ones stay when they are there: hosts since 0.8 refuse a workflow whose choice is
    no longer in the list.
    """
    files = sorted({name for folder in folders for name in folder_paths.get_filename_list(folder)})
    published = [name + DOWNLOAD for name, file in PUBLISHED.items() if file.folder in folders]
    return [*more, *files, *published]


def resolve(name: str, folders: tuple[str, ...], kinds: tuple[FileKind, ...]) -> Path:
    """The file that a choice stands for; a published one is fetched first unless it is there.

    kinds: what a copy of the published one has to be.
    """
    for folder in folders:
        if path := folder_paths.get_full_path(folder, name):
            return Path(path)
    if name.endswith(DOWNLOAD) and (known := name.removesuffix(DOWNLOAD)) in PUBLISHED:
        return _fetched(known, folders, kinds)
    places = ", ".join(f"models/{folder}" for folder in folders)
    raise ValueError(f"{name} is not there: put it into one of {places}, or choose another file")


def model_file(name: str) -> Path:
    """The network's file."""
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
    """The VAE or text encoder that belongs to a model, which takes these kinds of file.

    name: the choice in the input `input_name`. "auto" finds a file in these folders by its
    tensors; if there is none, the published one is fetched where `fetch` allows it. width: of the
    text encoder's embeddings. channels: of the VAE's latents. ValueError for a file of another
    kind, or none at all.
    """
    known = published_of(kinds)
    if name != AUTO:
        path = resolve(name, folders, kinds)
        if (kind := identify(open_tensors(path))) not in kinds:
            raise ValueError(
                f"{path.name} seems to be a {kind.title}: this model takes the "
                f"{PUBLISHED[known].title}, choose {AUTO} for {input_name}"
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
    """A published file: a copy in these folders that goes by its name, else fetched."""
    file = PUBLISHED[known]
    if not file.within(folder_paths.models_dir).exists():
        named = [path for path in _files(folders) if file.is_named(path)]
        if copy := first_of(named, kinds):
            return copy
    return download(known, folder_paths.models_dir, on_progress=Progress())


def _files(folders: tuple[str, ...]) -> Iterator[Path]:
    for folder in folders:
        for name in folder_paths.get_filename_list(folder):
            if path := folder_paths.get_full_path(folder, name):
                yield Path(path)
