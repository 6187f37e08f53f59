"""Families of the CogVideoX backbone, which comes later: known by name only."""

FAMILIES = dict.fromkeys(
    [
        "color_fix",
        "decode_chunks",
        "dynamic_cfg",
        "endtoend",
        "layer",
        "preprocess",
        "sampler",
        "schedule",
        "transformer",
        "vae",
    ]
)
