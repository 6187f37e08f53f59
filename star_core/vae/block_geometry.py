"""The sizes that diffusers' convolutional VAEs have in common."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BlockGeometry:
    """Sizes of a VAE under diffusers' names.

    block_out_channels: of each level, the finest first; between levels the sides are halved.
    layers_per_block: residual blocks of each level. latent_channels: channels of the latents.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))

    @property
    def factor(self) -> int:
        """Pixels per latent in height and width."""
        return 2 ** (len(self.block_out_channels) - 1)
