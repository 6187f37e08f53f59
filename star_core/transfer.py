"""Curves between a video's code values and what the network sees, which was trained on SDR.

Code values of SDR and of HLG, which is made to look right on SDR displays, are taken as they are.
PQ and linear light get a curve of their own: gamma 2.4 up to reference white, as SDR displays
have, and a logarithm above. Reference white lies at 0.75, as in HLG (ITU-R BT.2408), 10,000 cd/m2
at 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_WHITE = 203.0  # cd/m2 of reference white, ITU-R BT.2408
_PEAK = 10_000 / _WHITE
_KNEE = 0.75
_GAMMA = 2.4
# The logarithm continues the gamma curve with the same slope and ends at 1.
_SLOPE = _KNEE / _GAMMA
_STEEPNESS = 7.341179478

# SMPTE ST 2084
_M1, _M2 = 2610 / 16384, 2523 / 32
_C1, _C2, _C3 = 3424 / 4096, 2413 / 128, 2392 / 128


@dataclass(frozen=True)
class TransferCurve:
    """A reversible curve for frames of any shape.

    to_network: code values to [0, 1]; what is outside the curve's range is clipped. to_codes: back.
    bounded: whether code values lie in [0, 1].
    """

    to_network: Callable[[Tensor], Tensor]
    to_codes: Callable[[Tensor], Tensor]
    bounded: bool = True


def curve_of(transfer: str) -> TransferCurve:
    """Returns the curve for a video's transfer characteristics, in ffmpeg's name."""
    return _CURVES.get(transfer, _PLAIN)


def light_of_pq(codes: Tensor) -> Tensor:
    """Converts code values of PQ in [0, 1] to light, where 1 is reference white."""
    root = codes.clamp(0, 1) ** (1 / _M2)
    return ((root - _C1).clamp(min=0) / (_C2 - _C3 * root)) ** (1 / _M1) * _PEAK


def pq_of_light(light: Tensor) -> Tensor:
    """Converts light, where 1 is reference white, to code values of PQ in [0, 1]."""
    power = (light / _PEAK).clamp(0, 1) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def _compressed(light: Tensor) -> Tensor:
    light = light.clamp(0, _PEAK)
    low = _KNEE * light ** (1 / _GAMMA)
    high = _KNEE + _SLOPE / _STEEPNESS * torch.log1p(_STEEPNESS * (light - 1).clamp(min=0))
    return torch.where(light < 1, low, high).clamp(0, 1)


def _expanded(values: Tensor) -> Tensor:
    values = values.clamp(0, 1)
    low = (values / _KNEE) ** _GAMMA
    high = 1 + torch.expm1((values - _KNEE) * (_STEEPNESS / _SLOPE)) / _STEEPNESS
    return torch.where(values < _KNEE, low, high)


_PLAIN = TransferCurve(lambda codes: codes.clamp(0, 1), lambda values: values)
_CURVES = {
    "smpte2084": TransferCurve(
        lambda codes: _compressed(light_of_pq(codes)), lambda values: pq_of_light(_expanded(values))
    ),
    "linear": TransferCurve(_compressed, _expanded, bounded=False),
}
