"""Describes checkpoints without loading them."""

import os
from collections import Counter
from dataclasses import asdict, dataclass

from .backbones import BACKBONES, NetworkConfig, build_network
from .checkpoints.kinds import VENHANCER, VIDEO_UNET, identify
from .checkpoints.metadata import build_checked
from .checkpoints.quantization import formats_of, stored
from .checkpoints.tensors import compare, open_tensors
from .star_checkpoint import file_backbone, learned_prompts, network_settings, network_tensors


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A description of a checkpoint; str() gives it as text of several lines.

    kind, title: see `checkpoints.kinds.FileKind`. format: see `checkpoints.tensors.TensorFile`.
    tensors, parameters: how many tensors are stored, and values in all. bytes: the file's size.
    dtypes: numbers of stored tensors by type. quantization: numbers of layers by format.
    backbone, config, sampling, latents: its name, and the fields of its settings, for a network of
    STAR's; None for other kinds. presets: those of a network with learned prompts.
    problems: how a network differs from STAR's, and what to do with a file of a kind that cannot be
    used; "" if there are none. metadata: that of a safetensors file.
    """

    path: str
    kind: str
    title: str
    format: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    quantization: dict[str, int]
    backbone: str | None
    config: dict | None
    sampling: dict | None
    latents: dict | None
    presets: tuple[str, ...]
    problems: str
    metadata: dict[str, str]

    @property
    def size(self) -> NetworkConfig:
        """The config of STAR's network; only for files of that kind."""
        assert self.backbone is not None and self.config is not None
        return BACKBONES[self.backbone].config(**self.config)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        lines = [
            f"{self.path}: {self.title}",
            f"format: {self.format}, {self.bytes / 1e6:,.1f} MB",
            f"tensors: {self.tensors} ({dtypes}), {self.parameters:,} values",
        ]
        if self.quantization:
            layers = (f"{count} layers as {name}" for name, count in self.quantization.items())
            lines.append(f"quantised: {', '.join(layers)}")
        for name in ("config", "sampling"):
            if fields := getattr(self, name):
                lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in fields.items()))
        if self.presets:
            lines.append("prompts: embedded, no text encoder needed")
            lines.append(f"presets: {', '.join(self.presets)}")
        if self.problems:
            lines.append(f"problems: {self.problems}")
        lines += [f"metadata: {k}: {v}" for k, v in self.metadata.items() if k != "star"]
        return "\n".join(lines)


def describe(path: str | os.PathLike[str]) -> FileInfo:
    """Describes a checkpoint without loading it. Raises ValueError for a file that is not one."""
    file = open_tensors(path)
    kind = file_backbone(file).kind if "star" in file.metadata else identify(file)
    backbone = config = sampling = latents = prompts = None
    problems = [kind.advice]
    is_star = kind in [backbone.kind for backbone in BACKBONES.values()]
    if is_star or kind in (VENHANCER, VIDEO_UNET):
        settings = network_settings(file)
        network = build_checked(lambda: build_network(settings[0], device="meta"), str(file.path))
        expected = network.state_dict()
        problems.insert(0, str(compare(network_tensors(file), expected)))
        if is_star:
            backbone = file_backbone(file).name
            config, sampling, latents = map(asdict, settings)
            prompts = learned_prompts(file)
    return FileInfo(
        path=str(file.path),
        kind=kind.name,
        title=kind.title,
        format=file.format,
        tensors=len(stored(file)),
        parameters=sum(tensor.numel() for tensor in file.values()),
        bytes=file.path.stat().st_size,
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in stored(file).values())),
        quantization=formats_of(file),
        backbone=backbone,
        config=config,
        sampling=sampling,
        latents=latents,
        presets=prompts.presets if prompts else (),
        problems="; ".join(filter(None, problems)),
        metadata=file.metadata,
    )
