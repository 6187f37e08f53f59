"""Finds model files: VAEs and text encoders by their content, published files by their names."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .download import PUBLISHED
from .kinds import (
    CLIP_OPEN_CLIP,
    CLIP_TRANSFORMERS,
    STABLE_DIFFUSION_2,
    SVD,
    T5,
    VAE_COGVIDEOX,
    VAE_DIFFUSERS,
    VAE_PATCH,
    VAE_SVD,
    FileKind,
    identify,
)
from .tensors import TensorFile, open_tensors

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class _Component:
    """A file that a model needs besides its own.

    title, option: its name in messages, and the option of the command line that names the file.
    likely_name: a pattern of usual names. kinds: those that can be used. published: the short name
    of the published file.
    """

    title: str
    option: str
    likely_name: str
    kinds: tuple[FileKind, ...]
    published: str

    def has(self, kinds: tuple[FileKind, ...]) -> bool:
        return set(kinds) <= set(self.kinds)

    @property
    def folders(self) -> tuple[str, ...]:
        return _FOLDERS[PUBLISHED[self.published].folder]


# The folders of ComfyUI's `models` in which people keep files that belong into the first of them.
_FOLDERS = {
    "diffusion_models": ("diffusion_models", "star", "unet", "checkpoints"),
    "vae": ("vae", "checkpoints"),
    "text_encoders": ("text_encoders", "text_encoder", "clip", "checkpoints"),
}

_VAE = _Component(
    title="VAE",
    option="--vae",
    likely_name=r"svd|diffusion_pytorch_model|temporal",
    kinds=(VAE_DIFFUSERS, VAE_PATCH, VAE_SVD, SVD),
    published="svd_vae",
)
_COGVIDEOX_VAE = _Component(
    title="VAE",
    option="--vae",
    likely_name=r"cogvideo|3d-vae|diffusion_pytorch_model",
    kinds=(VAE_COGVIDEOX,),
    published="cogvideox_vae",
)
_TEXT_ENCODER = _Component(
    title="text encoder",
    option="--text-encoder",
    likely_name=r"open_?clip|vit-?h|clip.?h|text_encoder|sd-?_?2|v2-",
    kinds=(CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, STABLE_DIFFUSION_2),
    published="clip_vit_h",
)
_T5 = _Component(
    title="text encoder",
    option="--text-encoder",
    likely_name=r"t5|text_encoder|^model",
    kinds=(T5,),
    published="t5xxl",
)
_COMPONENTS = (_VAE, _COGVIDEOX_VAE, _TEXT_ENCODER, _T5)


def find_vae(
    path: str | os.PathLike[str] | None = None,
    *,
    kinds: tuple[FileKind, ...] = _VAE.kinds,
    model: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> Path:
    """Returns the path of a VAE's file.

    path: the file itself, or a folder in which to search. None searches the folder of `model`, then
    `models_dir`, then the model folders of ComfyUI (see `comfyui_folder`).
    kinds: the kinds of VAE that can be used, see `backbones.Backbone.vae`. Files are judged by
    their tensors; likely names are tried first.
    Raises ValueError, with a source and a place for the published file, if none is found.
    """
    return _find(_component(kinds), kinds, path, model, models_dir, comfyui)


def find_text_encoder(
    path: str | os.PathLike[str] | None = None,
    *,
    kinds: tuple[FileKind, ...] = _TEXT_ENCODER.kinds,
    width: int | None = None,
    model: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> Path:
    """Returns the path of a text encoder's file.

    path: the file itself, or a folder in which to search. None searches the folder of `model`, then
    `models_dir`, then the model folders of ComfyUI (see `comfyui_folder`).
    kinds: the kinds of text encoder that can be used, see `backbones.Backbone.text_encoder`. Files
    are judged by their tensors; likely names are tried first. width: of the embeddings, None for
    any.
    Raises ValueError, with a source and a place for the published file, if none is found.
    """
    return _find(_component(kinds), kinds, path, model, models_dir, comfyui, width)


def published_of(kinds: tuple[FileKind, ...]) -> str:
    """Returns the short name of the published file for these kinds of VAE or text encoder."""
    return _component(kinds).published


def first_of(
    files: Iterable[Path],
    kinds: tuple[FileKind, ...],
    *,
    width: int | None = None,
    channels: int | None = None,
    unreadable: list[str] | None = None,
) -> Path | None:
    """Returns the first of `files` that is of one of these kinds, None if none is.

    Files are judged by their tensors; likely names of VAEs and text encoders are tried first.
    width: of the text encoder's embeddings, None for any. channels: of the VAE's latents, None for
    any. unreadable: a list to which the errors of unreadable files are appended.
    """
    likely_name = next((part.likely_name for part in _COMPONENTS if part.has(kinds)), "")
    for path in sorted(files, key=lambda path: _unlikely(path, likely_name)):
        try:
            file = open_tensors(path)
        except ValueError as error:
            if unreadable is not None:
                unreadable.append(str(error))
            continue
        fits = _has(width, file, _EMBEDDINGS) and _has(channels, file, _LATENTS)
        if fits and identify(file) in kinds:
            return path
    return None


def _component(kinds: tuple[FileKind, ...]) -> _Component:
    return next(part for part in _COMPONENTS if part.has(kinds))


# How the keys of token embeddings end, and those of the layers that read latents.
_EMBEDDINGS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
_LATENTS = ("decoder.conv_in.weight", "decoder.conv_in.conv.weight")


def _has(size: int | None, file: TensorFile, names: tuple[str, ...]) -> bool:
    """Tests whether the second dimension of a weight with such a name is `size`; None fits all."""
    weights = (tensor for key, tensor in file.items() if key.endswith(names))
    return size is None or any(weight.shape[1] == size for weight in weights)


def find_published(
    name: str,
    *,
    models_dir: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> Path:
    """Returns the path of a published file, which may have another suffix than its source.

    name: a key of `download.PUBLISHED`. The file is searched in `models_dir`, then in the model
    folders of ComfyUI (see `comfyui_folder`). Raises ValueError, with a source, if it is missing.
    """
    _check_folder(models_dir, "--models-dir")
    file = PUBLISHED[name]
    roots = [Path(models_dir)] if models_dir is not None else []
    folders = _search_folders(roots, _FOLDERS[file.folder], comfyui_folder(comfyui))
    for folder in folders:
        for path in _checkpoint_files(folder, recursive=folder not in roots):
            if file.is_named(path):
                return path
    root = roots[0] if roots else None
    raise ValueError(f"{name} is missing: {_how_to_get(name, root)} ({_searched(folders)})")


def comfyui_folder(path: str | os.PathLike[str] | None = None) -> Path | None:
    """Returns the folder of the ComfyUI installation, None if there is none.

    It is `path`, else the environment variable COMFYUI_DIR, else the installation that contains
    this package. Raises ValueError if the first or second is not a folder.
    """
    if named := path or os.environ.get("COMFYUI_DIR"):
        if not Path(named).is_dir():
            raise ValueError(f"{named} is not a folder: name the ComfyUI folder (COMFYUI_DIR)")
        return Path(named)
    custom_nodes = Path(__file__).parents[3]
    return custom_nodes.parent if custom_nodes.name == "custom_nodes" else None


def _find(
    component: _Component,
    kinds: tuple[FileKind, ...],
    path: str | os.PathLike[str] | None,
    model: str | os.PathLike[str] | None,
    models_dir: str | os.PathLike[str] | None,
    comfyui: str | os.PathLike[str] | None,
    width: int | None = None,
) -> Path:
    if path is not None and Path(path).is_file():
        return Path(path)
    _check_folder(path, component.option)
    _check_folder(models_dir, "--models-dir")
    roots, installation, root = [], None, None
    if path is not None:
        roots.append(root := Path(path))
    else:
        installation = comfyui_folder(comfyui)
        if model is not None:
            roots.append(Path(model).parent)
            root = None if installation else roots[0]
        if models_dir is not None:
            roots.append(root := Path(models_dir))
    folders = _search_folders(roots, component.folders, installation)
    unreadable: list[str] = []
    for folder in folders:
        files = _checkpoint_files(folder, recursive=folder not in roots)
        if file := first_of(files, kinds, width=width, unreadable=unreadable):
            return file
    raise ValueError(
        f"no {component.title} found: {_how_to_get(component.published, root)}, or name the file "
        f"with {component.option} ({_searched(folders)})"
        + "".join(f"; skipped: {reason}" for reason in unreadable[:3])
    )


def _check_folder(folder: str | os.PathLike[str] | None, option: str) -> None:
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder} does not exist: correct {option}")


def _how_to_get(name: str, root: Path | None) -> str:
    """Returns advice; root: the models folder that lacks the file, None for ComfyUI's."""
    file = PUBLISHED[name]
    option = f" --models-dir {root}" if root else ""
    folder = root / file.folder if root else f"ComfyUI's models/{file.folder}"
    return f"run `python -m star_core download {name}{option}`, or put {file.source} into {folder}"


def _searched(folders: list[Path]) -> str:
    existing = ", ".join(str(folder) for folder in folders if folder.is_dir())
    return f"searched: {existing or 'nowhere'}"


def _checkpoint_files(folder: Path, *, recursive: bool) -> list[Path]:
    paths = folder.rglob("*") if recursive else folder.glob("*")
    return sorted(path for path in paths if path.suffix in _SUFFIXES and path.is_file())


def _unlikely(path: Path, likely_name: str) -> bool:
    return not re.search(likely_name, path.name, re.IGNORECASE)


def _search_folders(
    roots: list[Path], names: tuple[str, ...], installation: Path | None
) -> list[Path]:
    """Returns the roots, each with its model folders, then ComfyUI's model folders."""
    folders = [folder for root in roots for folder in (root, *(root / name for name in names))]
    return [*folders, *(_comfyui_folders(installation, names) if installation else ())]


def _comfyui_folders(installation: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Yields ComfyUI's own model folders, then those of its extra_model_paths.yaml."""
    for name in names:
        yield installation / "models" / name
    extra = installation / "extra_model_paths.yaml"
    if not extra.is_file():
        return
    import yaml  # comes with ComfyUI and with transformers

    try:
        sections = yaml.safe_load(extra.read_text(encoding="utf-8")) or {}
        for section in sections.values():
            path = os.path.expandvars(os.path.expanduser(section.get("base_path", "")))
            base = installation / path
            for name in names:
                for line in section.get(name, "").splitlines():
                    yield base / line.strip()
    except (yaml.YAMLError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{extra} is unreadable ({error}): correct it") from None
