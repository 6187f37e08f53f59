"""Where the VAE and the text encoder lie, if nobody says so."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .known_files import (
    CLIP_OPEN_CLIP,
    CLIP_TRANSFORMERS,
    STABLE_DIFFUSION_2,
    SVD,
    VAE_DIFFUSERS,
    VAE_SVD,
    FileKind,
    identify,
)
from .tensor_files import TensorFile, open_tensors

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class _Sought:
    """A file that a model needs: its usual folders and names, the kinds that will do."""

    what: str
    option: str
    folders: tuple[str, ...]
    likely_name: str
    kinds: tuple[FileKind, ...]
    source: str


_VAE = _Sought(
    what="VAE",
    option="--vae",
    folders=("vae", "checkpoints"),
    likely_name=r"svd|diffusion_pytorch_model|temporal",
    kinds=(VAE_DIFFUSERS, VAE_SVD, SVD),
    source="vae/diffusion_pytorch_model.fp16.safetensors of stabilityai/"
    "stable-video-diffusion-img2vid on Hugging Face",
)
_TEXT_ENCODER = _Sought(
    what="text encoder",
    option="--text-encoder",
    folders=("text_encoders", "text_encoder", "clip", "checkpoints"),
    likely_name=r"open_?clip|vit-?h|clip.?h|text_encoder|sd-?_?2|v2-",
    kinds=(CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, STABLE_DIFFUSION_2),
    source="open_clip_pytorch_model.bin of laion/CLIP-ViT-H-14-laion2B-s32B-b79K on Hugging Face",
)


def find_vae(
    given: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> Path:
    """The VAE's file: `given`, else one beside the model, in models_dir or in ComfyUI's folders.

    given may be a folder with such a file. Files are judged by their tensors; likely names are
    tried first. Raises ValueError, naming the file, its place and its source, if there is none.
    """
    return _find(_VAE, given, model, models_dir, comfyui, lambda file: True)


def find_text_encoder(
    given: str | os.PathLike[str] | None = None,
    *,
    width: int | None = None,
    model: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> Path:
    """The text encoder's file, sought as `find_vae` does; its embeddings are `width` wide."""

    def fits(file: TensorFile) -> bool:
        return width is None or any(
            tensor.shape[1] == width
            for key, tensor in file.items()
            if key.endswith("token_embedding.weight")
        )

    return _find(_TEXT_ENCODER, given, model, models_dir, comfyui, fits)


def comfyui_folder(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The ComfyUI installation: `given`, COMFYUI_DIR, or the one that this package lies in."""
    if named := given or os.environ.get("COMFYUI_DIR"):
        if not Path(named).is_dir():
            raise ValueError(f"{named} is no folder: name the ComfyUI folder (COMFYUI_DIR)")
        return Path(named)
    custom_nodes = Path(__file__).parents[2]
    return custom_nodes.parent if custom_nodes.name == "custom_nodes" else None


def _find(
    sought: _Sought,
    given: str | os.PathLike[str] | None,
    model: str | os.PathLike[str] | None,
    models_dir: str | os.PathLike[str] | None,
    comfyui: str | os.PathLike[str] | None,
    fits: Callable[[TensorFile], bool],
) -> Path:
    if given is not None and Path(given).is_file():
        return Path(given)
    for folder, option in ((given, sought.option), (models_dir, "--models-dir")):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{folder} does not exist: correct {option}")
    homes = [Path(given)] if given is not None else []
    if given is None and model is not None:
        homes.append(Path(model).parent)
    if given is None and models_dir is not None:
        homes.append(Path(models_dir))
    places = [place for home in homes for place in (home, *(home / f for f in sought.folders))]
    if given is None and (root := comfyui_folder(comfyui)):
        places += _comfyui_places(root, sought.folders)
    unreadable = []
    for place in places:
        for path in _weights(place, sought, recursive=place not in homes):
            try:
                file = open_tensors(path)
            except ValueError as error:
                unreadable.append(str(error))
                continue
            if identify(file) in sought.kinds and fits(file):
                return path
    searched = ", ".join(str(place) for place in places if place.is_dir()) or "nowhere"
    target = homes[0] / sought.folders[0] if homes else f"ComfyUI's models/{sought.folders[0]}"
    raise ValueError(
        f"no {sought.what} found: put {sought.source} into {target}, or name the file with "
        f"{sought.option} (searched: {searched})"
        + "".join(f"; passed over: {reason}" for reason in unreadable[:3])
    )


def _weights(place: Path, sought: _Sought, *, recursive: bool) -> list[Path]:
    """Checkpoint files of a folder, likely ones first."""
    paths = place.rglob("*") if recursive else place.glob("*")
    files = [path for path in paths if path.suffix in _SUFFIXES and path.is_file()]

    def unlikely(path: Path) -> bool:
        return not re.search(sought.likely_name, path.name, re.IGNORECASE)

    return sorted(files, key=lambda path: (unlikely(path), path))


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
