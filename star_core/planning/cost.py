"""Bytes and FLOPs of the method's parts, asked of the code itself on the meta device.

Nothing is computed and no weights are read. Layers that work in slices do the first two alone,
because no other finds more in memory than the second; so a forward pass at full size takes a
second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..backbones import Geometry, Network, NetworkConfig, build_network
from ..diffusion.schedule import star_schedule
from ..models.slicing import Slicing
from ..models.unet import ControlledVideoUNet
from ..vae.cogvideox import CausalVideoVAE
from ..vae.frame_vae import VideoVAE
from .meta_memory import META, LiveMetaTensors


class Peak(NamedTuple):
    """Most bytes held at once, weights not counted: at work, and waiting in main memory."""

    device: int
    host: int


class Cost(NamedTuple):
    """Most bytes held at once, weights not counted, and FLOPs, two per multiply-add."""

    peak: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass of STAR's network on latents (batch in_dim frames height width)."""

    config: NetworkConfig
    dtype: torch.dtype
    frames: int
    height: int
    width: int
    batch: int = 1

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, t, y and hint."""
        size = (self.batch, self.config.in_dim, self.frames, self.height, self.width)
        x = torch.empty(size, dtype=self.dtype, device=META)
        prompt = (self.batch, self.config.context_length, self.config.context_dim)
        y = torch.empty(prompt, dtype=self.dtype, device=META)
        return x, torch.empty(self.batch, dtype=torch.int64, device=META), y, x


@cache
@torch.inference_mode()
def peak_of(forward: Pass, slicing: Slicing | None) -> Peak:
    """Of a pass in slices."""
    network, inputs = _network(forward.config, forward.dtype), forward.inputs()
    slicing = slicing and _FirstSlices(**asdict(slicing))
    with network.working(slicing=slicing), LiveMetaTensors() as live:
        network(*inputs)
    return Peak(live.peak, live.away_peak)


def flops_of(forward: Pass, attention_window: int | None = None) -> int:
    """Two per multiply-add."""
    return _first_pass(forward, attention_window)[0]


class Reusing(NamedTuple):
    """FLOPs of a pass that reuses deep features, and how many bytes those take."""

    flops: int
    kept: int


@cache
def reusing(forward: Pass, attention_window: int | None = None) -> Reusing:
    _, deep = _first_pass(forward, attention_window)
    flops, features = _flops(forward, attention_window, deep), deep.features
    return Reusing(flops, 0 if features is None else features.nbytes)


@cache
def network_bytes(config: NetworkConfig, dtype: torch.dtype) -> int:
    """Of the weights."""
    return _bytes(_network(config, dtype))


@cache
def vae_bytes(geometry: Geometry, dtype: torch.dtype) -> int:
    """Of the weights."""
    return _bytes(_vae(geometry, dtype).model)


@cache
@torch.inference_mode()
def encoding(geometry: Geometry, dtype: torch.dtype, frames: int, height: int, width: int) -> Cost:
    """Of frames that are encoded together, or a tile of them, in pixels."""
    vae, video = _vae(geometry, dtype), torch.empty(1, 3, frames, height, width, device=META)
    with LiveMetaTensors() as live, _Flops() as counter:
        vae.encode(video)
    return Cost(live.peak, counter.total)


@cache
@torch.inference_mode()
def decoding(geometry: Geometry, dtype: torch.dtype, frames: int, height: int, width: int) -> Cost:
    """Of a window of frames, or a tile of them, in pixels; with the frames that come out."""
    vae = _vae(geometry, dtype)
    sides = height // vae.factor, width // vae.factor
    count = -(-(frames - 1) // vae.latent_frames) + 1
    latents = torch.empty(1, vae.latent_channels, count, *sides, device=META)
    with LiveMetaTensors() as live, _Flops() as counter:
        vae.decode_window(latents)
    return Cost(live.peak, counter.total)


class _FirstTwo(list):
    """As long as the whole list, but only the first two come out."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:2])


@dataclass(frozen=True, kw_only=True)
class _FirstSlices(Slicing):
    def frames(self, x: Tensor) -> Sequence[slice]:
        return _FirstTwo(super().frames(x))

    def rows(self, clip: Tensor) -> Sequence[Tensor]:
        return _FirstTwo(super().rows(clip))


class _Kept:
    """Stands for `shortcuts.DeepFeatures`: gives back what it was given, whatever the timestep."""

    features: Tensor | None = None

    def recall(self, place: object, t: Tensor) -> Tensor | None:
        return self.features

    def keep(self, place: object, t: Tensor, features: Tensor) -> None:
        self.features = features


@cache
def _first_pass(forward: Pass, attention_window: int | None) -> tuple[int, _Kept]:
    deep = _Kept()
    return _flops(forward, attention_window, deep), deep


@torch.inference_mode()
def _flops(forward: Pass, attention_window: int | None, deep: _Kept) -> int:
    network, inputs = _network(forward.config, forward.dtype), forward.inputs()
    with (
        network.working(slicing=None, attention_window=attention_window),
        LiveMetaTensors(),
        _Flops() as counter,
    ):
        # Not every network keeps features to reuse.
        network(*inputs, **({"deep": deep} if isinstance(network, ControlledVideoUNet) else {}))
    return counter.total


class _Flops(TorchDispatchMode):
    """torch's FlopCounterMode without its account of modules, which takes longer than the rest."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:  # where gradients are off, layers arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            batch, heads, tokens, features = args[0].shape
            self.total += 4 * batch * heads * tokens * args[1].shape[2] * features
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


@cache
def _network(config: NetworkConfig, dtype: torch.dtype) -> Network:
    star_schedule()  # made once, and not to be counted
    network = build_network(config, device=META, dtype=dtype).eval()
    return network.requires_grad_(False)


@cache
def _vae(geometry: Geometry, dtype: torch.dtype) -> VideoVAE | CausalVideoVAE:
    with META:
        vae = geometry.build()
    # Not the model's own `to`, which warns; and not all of it is on the meta device yet.
    nn.Module.to(vae.model, META, dtype)
    vae.model.eval().requires_grad_(False)
    return vae


def _bytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
