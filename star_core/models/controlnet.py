"""VideoControlNet: conditions the UNet on the low-quality video (specification, section 3)."""

from collections.abc import Iterator

from torch import Tensor, nn

from ..devices import send
from .encoder import UNetConfig, encode, first_convolution, input_blocks, middle_block, run_block
from .slicing import Slicing
from .unet_blocks import Factory, sinusoidal_embedding, timestep_mlp


class VideoControlNet(nn.Module):
    """A second encoder with weights of its own; its outputs are added to the UNet's skips.

    make: makes the layers.
    """

    def __init__(self, config: UNetConfig, *, make: Factory):
        super().__init__()
        self.config = config
        self.time_embed = timestep_mlp(config.dim, config.emb_channels, make=make)
        self.input_blocks, outputs = input_blocks(config, make)
        self.middle_block = middle_block(config, make)
        self.input_hint_block = make.conv2d(config.in_dim, config.dim, 3, padding=1)
        self.zero_convs = nn.ModuleList(
            nn.Sequential(make.conv2d(channels, channels, 1)) for channels in outputs
        )
        self.middle_block_out = nn.Sequential(make.conv2d(outputs[-1], outputs[-1], 1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, hint: Tensor | None = None) -> list[Tensor]:
        """Returns the controls: one (b·f c h w) for each skip, then one for the middle block.

        x: noisy latents (b c f h w). t: timesteps (b,). y: text embedding (b l d). hint: latents of
        the low-quality video (b c f h w).
        """
        return [last(output) for last, output in self.controls(x, t, y, hint)]

    def controls(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        hint: Tensor | None = None,
        slicing: Slicing | None = None,
    ) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yields each control as its last convolution and the input of that convolution.

        Arguments are as in `forward`, and slicing: how much each layer computes at a time.
        """
        frames = x.shape[2]
        emb = self.time_embed(sinusoidal_embedding(send(t, x.device), self.config.dim).to(x.dtype))
        conditioning = (emb.repeat_interleave(frames, dim=0), y, frames, slicing)
        channels = [first_convolution(self.input_blocks, x, slicing, self.input_hint_block, hint)]
        outputs = encode(self.input_blocks, channels, *conditioning)
        for zero_conv, _ in zip(self.zero_convs, outputs, strict=True):
            yield zero_conv, channels[0]
        channels.append(run_block(self.middle_block, channels, *conditioning))
        yield self.middle_block_out, channels[0]
