"""Pairs of latents to train on: clean clips and their degraded versions, encoded in advance."""

from collections.abc import Callable, Sequence
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
    clips: Tensor,
    vae: VideoVAE,
    recipes: Sequence[tuple[float, Recipe]],
    seed: int,
    out: Path,
    *,
    on_clip: Callable[[int, int], None] | None = None,
) -> None:
    """Degrades and encodes clips, and writes float16 latents `hq` and `lq` (n c f h w) to a file.

    The degraded clip is enlarged to the clean one's size first, as in the pipeline.

    clips: uint8 (n f 3 h w). recipes: each with its share of the clips. seed: of the first clip;
    each further one adds 1. out: a safetensors file. on_clip: called as on_clip(done, total) after
    each clip.
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
        if on_clip:
            on_clip(index + 1, len(clips))
    temporary = out.with_suffix(".part")
    save_file({"hq": torch.stack(hq), "lq": torch.stack(lq)}, temporary)
    temporary.rename(out)


class LatentPairs:
    """Random samples of the latent pairs in a folder of files written by `encode_pairs`.

    crop: frames, height and width of a sample, in latents; None for whole clips. ValueError if the
    folder holds no pairs.
    """

    def __init__(self, folder: Path, crop: tuple[int, int, int] | None = None) -> None:
        self.crop = crop
        self.shards = [dict(open_tensors(path)) for path in sorted(folder.glob("*.safetensors"))]
        if not self.shards:
            raise ValueError(f"{folder} holds no latent pairs (*.safetensors)")

    def spread(self) -> float:
        """Returns the root mean square difference of latents hq and lq in the first file."""
        first = self.shards[0]
        return (first["hq"].float() - first["lq"].float()).square().mean().sqrt().item()

    def sample(self, generator: torch.Generator) -> Sample:
        """Returns a random crop of a random clip, float32."""

        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        shard = self.shards[below(len(self.shards))]
        clip = below(len(shard["hq"]))
        size = shard["hq"].shape[2:]
        part: list[slice] = [slice(None)]
        for side, length in zip(size, self.crop or size, strict=True):
            start = below(side - length + 1)
            part.append(slice(start, start + length))
        hq, lq = (shard[key][clip][tuple(part)].float() for key in ("hq", "lq"))
        return Sample(hq, lq)
