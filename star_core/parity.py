"""Two behaviours as data: the reference implementation's, and the default with its faults repaired.

`docs/parity.md` lists what differs and why. Code reads a field and never compares `name`.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Choices that change the numbers of a result, one field each.

    padding: "white" pads to at least 720x1280 with the value 1; "replicate" pads as little as the
        network needs, centred, by repeating the edge.
    posterior: latents are a sample of the VAE's posterior, or its mean.
    noise: "reference" draws from one generator in the reference's order; "frame" gives each frame
        noise of its own, independent of windows, tiles and clip length.
    overlap: default overlap of neighbouring windows, as a fraction of a window.
    windows, merge: modes of `overlapping_windows` and `window_weights` for temporal windows.
    long_clips: "merged" merges all windows of a long clip at every step; "handed" runs them one
        after the other and hands the shared frames' x_0 to the next.
    color_reference: the fix takes colour statistics of the source or of the up-sampled input.
    prompt_separator: text between the user's prompt and the positive prompt.
    decode_overlap: frames that neighbouring VAE decode windows share.
    rounding: how floats become 8 bit.
    previews: a few frames or a crop equal that part of the "whole" run, or are restored "alone",
        as if cut out beforehand.
    refuses_crashes: inputs on which the reference crashes raise a ValueError that names the remedy.
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
