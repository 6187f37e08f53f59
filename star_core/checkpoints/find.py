"""Where model files lie: the VAE and the text encoder by what they are, published ones by name."""

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
class _Sought:
    """A file that a model needs: its usual names, the kinds that will do, the published one."""

    what: str
    option: str
    likely_name: str
    kinds: tuple[FileKind, ...]
    published: str

    def takes(self, kinds: tuple[FileKind, ...]) -> bool:
        return set(kinds) <= set(self.kinds)

    @property
    def folders(self) -> tuple[str, ...]:
        return _FOLDERS[PUBLISHED[self.published].folder]


# Where else people keep what belongs into a folder of ComfyUI's `models`.
_FOLDERS = {
    "diffusion_models": ("diffusion_models", "star", "unet", "checkpoints"),
    "vae": ("vae", "checkpoints"),
    "text_encoders": ("text_encoders", "text_encoder", "clip", "checkpoints"),
}

_VAE = _Sought(
    what="VAE",
    option="--vae",
    likely_name=r"svd|diffusion_pytorch_model|temporal",
    kinds=(VAE_DIFFUSERS, VAE_PATCH, VAE_SVD, SVD),
    published="svd_vae",
)
_COGVIDEOX_VAE = _Sought(
    what="VAE",
    option="--vae",
    likely_name=r"cogvideo|3d-vae|diffusion_pytorch_model",
    kinds=(VAE_COGVIDEOX,),
    published="cogvideox_vae",
)
_TEXT_ENCODER = _Sought(
    what="text encoder",
    option="--text-encoder",
    likely_name=r"open_?clip|vit-?h|clip.?h|text_encoder|sd-?_?2|v2-",
    kinds=(CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, STABLE_DIFFUSION_2),
    published="clip_vit_h",
)
_T5 = _Sought(
    what="text encoder",
    option="--text-encoder",
    likely_name=r"t5|text_encoder|^model",
    kinds=(T5,),
    published="t5xxl",
)
_PARTS = (_VAE, _COGVIDEOX_VAE, _TEXT_ENCODER, _T5)


def find_vae(
    given: str | os.PathLike[str] | None = None,
    *,
    kinds: tuple[FileKind, ...] = _VAE.kinds,
    model: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> Path:
    """The VAE's file: `given`, else one beside the model, in models_dir or in ComfyUI's folders.

    kinds: that will do, as `networks.Backbone.vae` has them. given may be a folder with such a
    file. Files are judged by their tensors; likely names are tried first. Raises ValueError, naming
    the file, its place and its source, if there is none.
    """
    return _find(_sought(kinds), kinds, given, model, models_dir, comfyui)


def find_text_encoder(
    given: str | os.PathLike[str] | None = None,
    *,
    kinds: tuple[FileKind, ...] = _TEXT_ENCODER.kinds,
    width: int | None = None,
    model: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> Path:
    """The text encoder's file, sought as `find_vae` does; its embeddings are `width` wide."""
    return _find(_sought(kinds), kinds, given, model, models_dir, comfyui, width)


def published_of(kinds: tuple[FileKind, ...]) -> str:
    """The name of the published file of one of these kinds of VAE or text encoder."""
    return _sought(kinds).published


def first_of(
    files: Iterable[Path],
    kinds: tuple[FileKind, ...],
    *,
    width: int | None = None,
    channels: int | None = None,
    unreadable: list[str] | None = None,
) -> Path | None:
    """The first of `files` that is of one of these kinds, None if none is.

    Files are judged by their tensors; likely names of VAEs and text encoders are tried first.
    width: of the text encoder's embeddings, None for any. channels: of the VAE's latents, None for
    any. unreadable: gets the reasons why files were passed over.
    """
    likely_name = next((sought.likely_name for sought in _PARTS if sought.takes(kinds)), "")
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


def _sought(kinds: tuple[FileKind, ...]) -> _Sought:
    return next(sought for sought in _PARTS if sought.takes(kinds))


# Ends of the names of weights that embeddings are rows of, and that take latents in.
_EMBEDDINGS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
_LATENTS = ("decoder.conv_in.weight", "decoder.conv_in.conv.weight")


def _has(size: int | None, file: TensorFile, names: tuple[str, ...]) -> bool:
    """Whether a weight with such a name is `size` wide; None for any file."""
    weights = (tensor for key, tensor in file.items() if key.endswith(names))
    return size is None or any(weight.shape[1] == size for weight in weights)


def find_published(
    name: str,
    *,
    models_dir: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> Path:
    """A published model's file in models_dir or in ComfyUI's folders, also under another suffix.

    name: a key of `downloads.PUBLISHED`. Raises ValueError, saying how to get it, if there is none.
    """
    _check_folder(models_dir, "--models-dir")
    file = PUBLISHED[name]
    homes = [Path(models_dir)] if models_dir is not None else []
    places = _places(homes, _FOLDERS[file.folder], comfyui_folder(comfyui))
    for place in places:
        for path in _weights(place, recursive=place not in homes):
            if file.is_named(path):
                return path
    home = homes[0] if homes else None
    raise ValueError(f"{name} is missing: {_how_to_get(name, home)} ({_searched(places)})")


def comfyui_folder(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The ComfyUI installation: `given`, COMFYUI_DIR, or the one that this package lies in."""
    if named := given or os.environ.get("COMFYUI_DIR"):
        if not Path(named).is_dir():
            raise ValueError(f"{named} is no folder: name the ComfyUI folder (COMFYUI_DIR)")
        return Path(named)
    custom_nodes = Path(__file__).parents[3]
    return custom_nodes.parent if custom_nodes.name == "custom_nodes" else None


def _find(
    sought: _Sought,
    kinds: tuple[FileKind, ...],
    given: str | os.PathLike[str] | None,
    model: str | os.PathLike[str] | None,
    models_dir: str | os.PathLike[str] | None,
    comfyui: str | os.PathLike[str] | None,
    width: int | None = None,
) -> Path:
    if given is not None and Path(given).is_file():
        return Path(given)
    _check_folder(given, sought.option)
    _check_folder(models_dir, "--models-dir")
    homes, root, home = [], None, None
    if given is not None:
        homes.append(home := Path(given))
    else:
        root = comfyui_folder(comfyui)
        if model is not None:
            homes.append(Path(model).parent)
            home = None if root else homes[0]
        if models_dir is not None:
            homes.append(home := Path(models_dir))
    places = _places(homes, sought.folders, root)
    unreadable: list[str] = []
    for place in places:
        files = _weights(place, recursive=place not in homes)
        if path := first_of(files, kinds, width=width, unreadable=unreadable):
            return path
    raise ValueError(
        f"no {sought.what} found: {_how_to_get(sought.published, home)}, or name the file with "
        f"{sought.option} ({_searched(places)})"
        + "".join(f"; passed over: {reason}" for reason in unreadable[:3])
    )


def _check_folder(folder: str | os.PathLike[str] | None, option: str) -> None:
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder} does not exist: correct {option}")


def _how_to_get(name: str, home: Path | None) -> str:
    """home: the models folder that a published file is missing in, None for ComfyUI's."""
    file = PUBLISHED[name]
    option = f" --models-dir {home}" if home else ""
    folder = home / file.folder if home else f"ComfyUI's models/{file.folder}"
    return f"run `python -m star_core download {name}{option}`, or put {file.source} into {folder}"


def _searched(places: list[Path]) -> str:
    return "searched: " + (", ".join(str(place) for place in places if place.is_dir()) or "nowhere")


def _weights(place: Path, *, recursive: bool) -> list[Path]:
    """Checkpoint files of a folder."""
    paths = place.rglob("*") if recursive else place.glob("*")
    return sorted(path for path in paths if path.suffix in _SUFFIXES and path.is_file())


def _unlikely(path: Path, likely_name: str) -> bool:
    return not re.search(likely_name, path.name, re.IGNORECASE)


def _places(homes: list[Path], folders: tuple[str, ...], root: Path | None) -> list[Path]:
    """The homes, their model folders, then ComfyUI's."""
    places = [place for home in homes for place in (home, *(home / f for f in folders))]
    return [*places, *(_comfyui_places(root, folders) if root else ())]


def _comfyui_places(root: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    """ComfyUI's own model folders, then those of its extra_model_paths.yaml."""
    for folder in folders:
        yield root / "models" / folder
    extra = root / "extra_model_paths.yaml"
    if not extra.is_file():
        return
    import yaml  # comes with ComfyUI and with transformers

    try:
        sections = yaml.safe_load(extra.read_text(encoding="utf-8")) or {}
        for section in sections.values():
            base = root / os.path.expandvars(os.path.expanduser(section.get("base_path", "")))
            for folder in folders:
                for line in section.get(folder, "").splitlines():
                    yield base / line.strip()
    except (yaml.YAMLError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{extra} is unreadable ({error}): correct it") from None
