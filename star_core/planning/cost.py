"""Bytes and FLOPs of the network and the VAE, from running them on the meta device.

Nothing is computed and no weights are read. Where a layer works in slices, only the first two are
done, because no later slice finds more in memory than the second. So a forward pass at full size
takes about a second.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbones import Geometry, Network, NetworkConfig, build_network
from ..diffusion.schedule import star_schedule
from ..models.slicing import Slicing
from ..models.unet import ControlledVideoUNet
from ..vae.cogvideox import CausalVideoVAE
from ..vae.frame_vae import VideoVAE
from .meta_memory import META, LiveMetaTensors


class Bytes(NamedTuple):
    """The most bytes at once. device: where the work is done. host: stored in main memory."""

    device: int
    host: int


class Cost(NamedTuple):
    """Memory and work of some operations; weights are not counted.

    peak: the most bytes at once. flops: two per multiply-add. traffic: bytes that operations read
    and write. largest: values of the largest tensor.
    """

    peak: int
    flops: int
    traffic: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass of the network on latents (batch in_dim frames height width)."""

    config: NetworkConfig
    dtype: torch.dtype
    frames: int
    height: int
    width: int
    batch: int = 1

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x, t, y and the hint as meta tensors."""
        config, batch = self.config, self.batch
        size = (batch, config.in_dim, self.frames, self.height, self.width)
        x = torch.empty(size, dtype=self.dtype, device=META)
        y = x.new_empty(batch, config.context_length, config.context_dim)
        return x, x.new_empty(batch, dtype=torch.int64), y, x


@cache
def peak_of(forward: Pass, slicing: Slicing | None) -> Bytes:
    """Returns the most bytes of a forward pass, without weights. slicing: None for whole layers."""
    network = _network(forward.config, forward.dtype)
    slicing = slicing and _FirstSlices(**asdict(slicing))
    with network.working(slicing=slicing):
        device = _measure(network, *forward.inputs()).peak
    # All skip connections are in main memory when the first is fetched.
    return Bytes(device, sum(slicing.sent) if slicing else 0)


@cache
def pass_cost(
    forward: Pass, attention_window: int | None = None, *, reuse: bool = False
) -> tuple[Cost, int]:
    """Returns the cost of a forward pass in whole layers, and the bytes of reusable features.

    attention_window, reuse: see `Shortcuts`; reuse counts a pass that reuses those features.
    """
    network, deep = _network(forward.config, forward.dtype), _AlwaysFresh()
    # The other backbone's network does not keep features.
    keeps = isinstance(network, ControlledVideoUNet)
    fn = partial(network, deep=deep) if keeps else network
    with network.working(slicing=None, attention_window=attention_window):
        cost = _measure(fn, *forward.inputs())
        if reuse:
            cost = _measure(fn, *forward.inputs())
    return cost, 0 if deep.features is None else deep.features.nbytes


@cache
def weight_bytes(
    config: NetworkConfig, geometry: Geometry, dtype: torch.dtype, vae_dtype: torch.dtype
) -> tuple[int, int]:
    """Returns the bytes of the network's weights and of the VAE's."""
    network, vae = (
        sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
        for module in (_network(config, dtype), _vae(geometry, vae_dtype).model)
    )
    return network, vae


@cache
def encoding(geometry: Geometry, dtype: torch.dtype, frames: int, height: int, width: int) -> Cost:
    """Returns the cost of encoding frames together, or a tile of them, of a size in pixels."""
    video = torch.empty(1, 3, frames, height, width, device=META)
    return _measure(_vae(geometry, dtype).encode, video)


@cache
def decoding(geometry: Geometry, dtype: torch.dtype, frames: int, height: int, width: int) -> Cost:
    """Returns the cost of decoding frames together, or a tile of them, of a size in pixels."""
    vae = _vae(geometry, dtype)
    size = (-(-(frames - 1) // vae.latent_frames) + 1, height // vae.factor, width // vae.factor)
    latents = torch.empty(1, vae.latent_channels, *size, device=META)
    return _measure(vae.decode_window, latents)


@torch.inference_mode()
def _measure(fn: Callable[..., Tensor], *inputs: Tensor) -> Cost:
    with LiveMetaTensors() as live:
        fn(*inputs)
    return Cost(live.peak, live.flops, live.traffic, live.largest)


@dataclass(frozen=True, kw_only=True)
class _FirstSlices(Slicing):
    """The first two slices of each layer. sent: bytes of the tensors sent to main memory."""

    sent: list[int] = field(default_factory=list)

    def frames(self, x: Tensor) -> Sequence[slice]:
        return super().frames(x)[:2]

    def rows(self, clip: Tensor) -> Sequence[Tensor]:
        return super().rows(clip)[:2]

    def offloaded(self, x: Tensor) -> Tensor:
        if not self.offload:
            return x
        self.sent.append(x.nbytes)
        return torch.empty((), dtype=x.dtype).expand(x.shape)  # one number in real memory


class _AlwaysFresh:
    """Takes the place of `DeepFeatures`: returns the last features, whatever the timestep."""

    features: Tensor | None = None

    def recall(self, place: object, t: Tensor) -> Tensor | None:
        return self.features

    def keep(self, place: object, t: Tensor, features: Tensor) -> None:
        self.features = features


@cache
def _network(config: NetworkConfig, dtype: torch.dtype) -> Network:
    star_schedule()  # cached by this call, so that no pass counts it
    return build_network(config, device=META, dtype=dtype).eval().requires_grad_(False)


@cache
def _vae(geometry: Geometry, dtype: torch.dtype) -> VideoVAE | CausalVideoVAE:
    with META:
        vae = geometry.build()
    # The model's own `to` warns; and some of its tensors are not on the meta device yet.
    nn.Module.to(vae.model, META, dtype).eval().requires_grad_(False)
    return vae
