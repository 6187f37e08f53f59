"""Pairs of latents to train on: clean clips and their degraded versions, encoded once."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.tensors import open_tensors
from ..degradation import Recipe, degrade_video
from ..seeded_random import SeededRandom
from ..vae.frame_vae import VideoVAE
from .objective import Sample


@torch.inference_mode()
def encode_pairs(
    clips: Tensor, vae: VideoVAE, recipes: Sequence[tuple[float, Recipe]], seed: int, out: Path
) -> None:
    """uint8 clips (n f 3 h w) -> a file of float16 latents `hq` and `lq`, each (n c f h w).

    recipes: with their shares of the clips. The degraded clip is enlarged to the clean one's size
    first, as the pipeline does.
    """
    hq, lq = [], []
    for index, clip in enumerate(clips):
        clip = clip.float() / 255
        shares = {number: share for number, (share, _) in enumerate(recipes)}
        chosen = SeededRandom(torch.Generator().manual_seed(seed + index)).choice(shares)
        small, _ = degrade_video(clip, recipes[chosen][1], seed + index)
        large = F.interpolate(small, size=clip.shape[-2:], mode="bicubic").clamp(0, 1)
        both = rearrange(torch.stack([clip, large]) * 2 - 1, "b f c h w -> b c f h w")
        latents = vae.encode(both).half()
        hq.append(latents[0])
        lq.append(latents[1])
    temporary = out.with_suffix(".part")
    save_file({"hq": torch.stack(hq), "lq": torch.stack(lq)}, temporary)
    temporary.rename(out)


class LatentPairs:
    """The shards below a folder, drawn from at random; new shards are found by `refresh`.

    crop: frames, height and width of what is drawn, in latents; None for whole clips.
    """

    def __init__(self, folder: Path, crop: tuple[int, int, int] | None = None) -> None:
        self.folder, self.crop = folder, crop
        self.shards: list[dict[str, Tensor]] = []
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors"))[len(self.shards) :]:
            self.shards.append(dict(open_tensors(path)))
        if not self.shards:
            raise ValueError(f"{self.folder} holds no latent pairs (*.safetensors)")

    def spread(self) -> float:
        """Root mean square distance between clean and degraded latents of the first shard."""
        first = self.shards[0]
        return (first["hq"].float() - first["lq"].float()).square().mean().sqrt().item()

    def sample(self, generator: torch.Generator) -> Sample:
        """A random crop of a random clip, float32."""

        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        shard = self.shards[below(len(self.shards))]
        clip = below(len(shard["hq"]))
        size = shard["hq"].shape[2:]
        starts = [
            below(have - want + 1) for have, want in zip(size, self.crop or size, strict=True)
        ]
        part = tuple(
            slice(start, start + want)
            for start, want in zip(starts, self.crop or size, strict=True)
        )
        hq, lq = (shard[key][clip][(slice(None), *part)].float() for key in ("hq", "lq"))
        return Sample(hq, lq)
