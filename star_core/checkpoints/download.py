"""Downloads published files from Hugging Face into a ComfyUI `models` folder."""

import hashlib
import io
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

logger = logging.getLogger(__name__)

# A function of the bytes that are on disk, and the bytes in total.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file on Hugging Face, and its place in a ComfyUI `models` folder.

    title: the description in messages. repo, path: the repository and the file's path in it.
    folder, file: the folder in `models`, and the file's path in that folder. beside: further files
    of the repository, stored in the same folder under their own names.
    """

    title: str
    repo: str
    path: str
    folder: str
    file: str
    beside: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """A phrase for messages that says where the file can be downloaded."""
        return f"{self.path} of {self.repo} on Hugging Face"

    def within(self, models_dir: str | os.PathLike[str]) -> Path:
        """Returns the file's path in a ComfyUI `models` folder."""
        return Path(models_dir) / self.folder / self.file

    def is_named(self, path: str | os.PathLike[str]) -> bool:
        """Tests whether a path has this file's name; its folder and suffix may differ."""
        return PurePath(path).stem == PurePath(self.file).stem


PUBLISHED = {
    "light_deg": PublishedFile(
        title="STAR for light degradation",
        repo="SherryX/STAR",
        path="I2VGen-XL-based/light_deg.pt",
        folder="diffusion_models",
        file="STAR/light_deg.pt",
    ),
    "heavy_deg": PublishedFile(
        title="STAR for heavy degradation",
        repo="SherryX/STAR",
        path="I2VGen-XL-based/heavy_deg.pt",
        folder="diffusion_models",
        file="STAR/heavy_deg.pt",
    ),
    "cogvideox": PublishedFile(
        title="STAR on CogVideoX",
        repo="SherryX/STAR",
        path="CogVideoX-5B-based/1/mp_rank_00_model_states.pt",
        folder="diffusion_models",
        file="STAR/cogvideox.pt",
    ),
    "svd_vae": PublishedFile(
        title="VAE of Stable Video Diffusion",
        repo="stabilityai/stable-video-diffusion-img2vid",
        path="vae/diffusion_pytorch_model.fp16.safetensors",
        folder="vae",
        file="svd_img2vid_vae_fp16.safetensors",
    ),
    "cogvideox_vae": PublishedFile(
        title="VAE of CogVideoX",
        repo="THUDM/CogVideoX-5b",
        path="vae/diffusion_pytorch_model.safetensors",
        folder="vae",
        file="cogvideox_5b_vae.safetensors",
    ),
    "t5xxl": PublishedFile(
        title="text encoder t5-v1_1-xxl",
        repo="comfyanonymous/flux_text_encoders",
        path="t5xxl_fp16.safetensors",
        folder="text_encoders",
        file="t5xxl_fp16.safetensors",
    ),
    "clip_vit_h": PublishedFile(
        title="text encoder OpenCLIP ViT-H-14",
        repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        path="open_clip_model.safetensors",
        folder="text_encoders",
        file="OpenCLIP-ViT-H-14/open_clip_vit_h_14.safetensors",
        beside=("tokenizer.json",),
    ),
}


def published(name: str) -> PublishedFile:
    """Returns the published file with a short name. Raises ValueError for an unknown name."""
    if name not in PUBLISHED:
        raise ValueError(
            f"no published file is called {name!r}: choose one of {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def download(
    name: str,
    models_dir: str | os.PathLike[str],
    *,
    on_progress: OnProgress | None = None,
    endpoint: str | None = None,
) -> Path:
    """Returns the path of a published file in `models_dir`; downloads the file if it is missing.

    The file appears under its name once its hash equals the one that the hub states. `FILE.sha256`
    beside it, in the format of sha256sum, records this, so that later calls neither contact the
    hub nor compute the hash. A file that the user has placed there is checked once. An interrupted
    download is resumed.

    name: a key of `PUBLISHED`. on_progress: called with the bytes on disk and the bytes in total;
    an exception from it aborts the download and is passed on. endpoint: the hub's URL; None for
    that of huggingface_hub, which honours HF_ENDPOINT. HF_TOKEN and HF_HUB_OFFLINE are honoured
    too. Raises ValueError for an unknown name, a hub that cannot be reached or states no hash, and
    a wrong hash.
    """
    file = published(name)
    path = file.within(models_dir)
    for extra in file.beside:
        target = path.parent / PurePath(extra).name
        if not target.exists():
            _fetch(file.repo, extra, target, lambda *_: None, endpoint)
    stamp = path.with_name(path.name + ".sha256")
    if not (path.exists() and stamp.exists() and _modified(stamp) >= _modified(path)):
        sha256 = _fetch(file.repo, file.path, path, on_progress or (lambda *_: None), endpoint)
        if sha256:
            stamp.write_text(f"{sha256}  {path.name}\n", encoding="utf-8")
    return path


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns


def _fetch(
    repo: str, source: str, target: Path, on_progress: OnProgress, endpoint: str | None
) -> str | None:
    """Downloads a file or checks an existing one; returns its hash, None if it is unchecked."""
    # Not at the top: only downloads need it.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # pyright: ignore[reportPrivateImportUsage]

    # The bases are requests' or httpx's own error, depending on the version of huggingface_hub.
    unreachable: Any = (OSError, *HfHubHTTPError.__bases__)
    by_hand = f"download {source} of {repo} on Hugging Face yourself and save it as {target}"
    url = hf_hub_url(repo, source, endpoint=endpoint)
    try:
        metadata = get_hf_file_metadata(url)
    except unreachable as error:
        if target.exists():
            logger.warning("%s is used unchecked: %s", target, _reason(error))
            return None
        raise ValueError(
            f"{target.name} cannot be downloaded ({_reason(error)}): {by_hand}"
        ) from None
    expected, size = metadata.etag or "", metadata.size
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected) or size is None:
        raise ValueError(f"the hub states no hash of {source} to check it by: {by_hand}")
    if target.exists():
        if target.stat().st_size == size and _hash(target, expected, on_progress) == expected:
            return expected
        raise ValueError(f"{target} is not {source} of {repo}: delete or rename it, then try again")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The name contains the hash, so that a download is never resumed with another version.
    path = target.with_name(f"{target.name}.{expected[:12]}.part")
    if path.exists() and path.stat().st_size > size:
        path.unlink()
    path.touch()
    done = path.stat().st_size
    on_progress(done, size)
    try:
        with _Part(path, size, on_progress) as part:
            http_get(url, part, resume_size=done, headers=build_hf_headers(), expected_size=size)
    except unreachable as error:
        raise ValueError(
            f"{target.name} cannot be downloaded ({_reason(error)}): try again, which resumes the "
            f"download, or {by_hand}"
        ) from None
    if _hash(path, expected, on_progress) != expected:
        path.unlink()
        raise ValueError(
            f"{target.name} arrived damaged and was removed (its hash is not the one that the hub "
            f"states): try again, or {by_hand}"
        )
    os.replace(path, target)
    return expected


class _Part(io.BufferedWriter):
    """A file opened for appending that reports its size after each write."""

    def __init__(self, path: Path, total: int, on_progress: OnProgress) -> None:
        super().__init__(io.FileIO(str(path), "ab"))
        self._total = total
        self._on_progress = on_progress

    def write(self, data, /) -> int:
        written = super().write(data)
        self._on_progress(self.tell(), self._total)
        return written


def _hash(path: Path, like: str, on_progress: OnProgress) -> str:
    """Returns sha256, or git's hash if `like` is one: the hub keeps small files in git itself."""
    size = path.stat().st_size
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            on_progress(size, size)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """Returns the system's message if it caused the error: requests embeds it in a longer one."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and type(inner).__module__ in ("builtins", "socket", "ssl"):
            return str(inner) or type(inner).__name__
        inner = inner.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
