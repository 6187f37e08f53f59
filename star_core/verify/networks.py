"""Families of the network of I2VGen-XL and its blocks."""

from dataclasses import fields

from ..models.liem import SpatialLIEM, TemporalLIEM
from ..models.unet import ControlledVideoUNet, UNetConfig
from ..models.unet_blocks import (
    BasicTransformerBlock,
    Downsample,
    Factory,
    ResBlock,
    SpatialTransformer,
    TemporalTransformer,
    Upsample,
    sinusoidal_embedding,
)
from .case import Case, Comparison, Comparisons


def liem_spatial(case: Case) -> Comparisons:
    """Replays spatial LIEM."""
    yield Comparison(case.fill(SpatialLIEM())(case["x"]), case["out"])


def liem_temporal(case: Case) -> Comparisons:
    """Replays temporal LIEM."""
    yield Comparison(case.fill(TemporalLIEM())(case["x"]), case["out"])


def time_embedding(case: Case) -> Comparisons:
    """Replays sinusoidal embeddings."""
    yield Comparison(sinusoidal_embedding(case["t"], case.sidecar["dim"]), case["out"])


def resample(case: Case) -> Comparisons:
    """Replays down-sampling and up-sampling layers."""
    channels = case.config["channels"]
    down = case.fill(Downsample(channels, make=Factory()), "w.down.")
    up = case.fill(Upsample(channels, make=Factory()), "w.up.")
    yield Comparison(down(case["x"]), case["down_out"])
    yield Comparison(up(case["x"]), case["up_out"])


def resblock(case: Case) -> Comparisons:
    """Replays a residual block."""
    config = case.config
    block = ResBlock(
        config["channels"], config["out_channels"], config["emb_channels"], make=Factory()
    )
    yield Comparison(case.fill(block)([case["x"]], case["emb"], config["frames"]), case["out"])


def spatial_block(case: Case) -> Comparisons:
    """Replays a transformer block with cross-attention."""
    config = case.config
    block = BasicTransformerBlock(
        config["dim"],
        config["heads"],
        config["dim_head"],
        context_dim=config["context_dim"],
        make=Factory(),
    )
    out = case.fill(block)(case["x"], case["context"], height=config["h"])
    yield Comparison(out, case["out"])


def temporal_block(case: Case) -> Comparisons:
    """Replays a transformer block over time."""
    config = case.config
    block = BasicTransformerBlock(
        config["dim"], config["heads"], config["dim_head"], make=Factory()
    )
    yield Comparison(case.fill(block)(case["x"]), case["out"])


def spatial_transformer(case: Case) -> Comparisons:
    """Replays a spatial transformer."""
    config = case.config
    transformer = SpatialTransformer(
        config["in_channels"],
        config["heads"],
        config["dim_head"],
        context_dim=config["context_dim"],
        make=Factory(),
    )
    yield Comparison(case.fill(transformer)(case["x"], case["context"]), case["out"])


def temporal_transformer(case: Case) -> Comparisons:
    """Replays a temporal transformer."""
    config = case.config
    transformer = TemporalTransformer(
        config["in_channels"], config["heads"], config["dim_head"], make=Factory()
    )
    yield Comparison(case.fill(transformer)(case["x"]), case["out"])


def network_of(case: Case) -> ControlledVideoUNet:
    """Returns the network of a case with its weights."""
    known = {field.name for field in fields(UNetConfig)}
    config = UNetConfig(**{key: value for key, value in case.config.items() if key in known})
    return case.fill(ControlledVideoUNet(config))


def unet(case: Case) -> Comparisons:
    """Replays a forward pass, with the ControlNet's residuals with and without hint."""
    network = network_of(case)
    x, t, y, hint = (case[key] for key in ("x", "t", "y", "hint"))
    yield Comparison(network(x, t, y, hint), case["out"])
    # The controls are larger than the output; their rounding error is stated separately.
    floor = case.sidecar.get("fp32_vs_fp64_max_abs_control")
    atol = None if floor is None else 10 * floor
    with_hint, without = (network.VideoControlNet(x, t, y, h) for h in (hint, None))
    for prefix, controls in (("control.", with_hint), ("control_nohint.", without)):
        for key in case.tensors:
            if key.startswith(prefix):
                index = key.removeprefix(prefix)
                control = controls[-1 if index == "last" else int(index)]
                yield Comparison(control, case[key], atol)
