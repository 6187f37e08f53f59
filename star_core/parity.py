"""Two behaviours as data: what the reference implementation does, and the repaired default.

`docs/parity.md` says what differs and why. Code reads a field; it never asks which behaviour it is
in.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Choices that change numbers, one field each.

    padding: "white" pads to at least 720x1280 with the value 1; "replicate" pads as little as the
        network needs, centred, by repeating the edge.
    posterior: latents are a sample of the VAE's posterior, or its mean.
    noise: "reference" draws from one generator in the reference's order; "frame" gives each frame
        noise of its own, independent of windows, tiles and clip length.
    overlap: share of a window that the next one sees as well, where no number of frames is given.
    windows, merge: temporal windows and how their x_0 are joined at every step.
    long_clips: windows of a long clip are all "merged" at every step, or "handed" on one by one.
    color_reference: whose colour statistics the result takes: the source or the up-sampled input.
    prompt_separator: stands between the user's prompt and the positive prompt.
    decode_overlap: frames that neighbouring VAE decode windows share.
    rounding: how floats become 8 bit.
    previews: a few frames or a crop show the "whole" run, or are restored "alone", as a cut clip.
    refuses_crashes: inputs on which the reference crashes are a ValueError that names the cure.
    """

    name: str
    padding: Literal["white", "replicate"]
    posterior: Literal["sample", "mean"]
    noise: Literal["reference", "frame"]
    overlap: float
    windows: Literal["reference", "balanced"]
    merge: Literal["cut", "smooth"]
    long_clips: Literal["merged", "handed"]
    color_reference: Literal["source", "upsampled"]
    prompt_separator: str
    decode_overlap: int
    rounding: Literal["truncate", "round"]
    previews: Literal["alone", "whole"]
    refuses_crashes: bool


REFERENCE = Behaviour(
    name="reference",
    padding="white",
    posterior="sample",
    noise="reference",
    overlap=0.5,
    windows="reference",
    merge="cut",
    long_clips="merged",
    color_reference="source",
    prompt_separator="",
    decode_overlap=0,
    rounding="truncate",
    previews="alone",
    refuses_crashes=True,
)

DEFAULT = Behaviour(
    name="default",
    padding="replicate",
    posterior="mean",
    noise="frame",
    overlap=3 / 16,
    windows="balanced",
    merge="smooth",
    long_clips="handed",
    color_reference="upsampled",
    prompt_separator=", ",
    decode_overlap=1,
    rounding="round",
    previews="whole",
    refuses_crashes=False,
)

# On CogVideoX the original handles one clip of 25 frames 720x480: no padding, windows or tiles.
COGVIDEOX_REFERENCE = replace(DEFAULT, name="reference", posterior="sample", rounding="truncate")
