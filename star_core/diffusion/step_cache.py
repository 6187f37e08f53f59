"""A cache of whole evaluations, which decides by measured change.

As EasyCache (Zhou et al. 2025, arXiv:2507.02860) and TeaCache (Liu et al. 2024, arXiv:2411.19108),
it reuses a prediction as long as it would hardly change; here it is the guided prediction of x_0,
and how fast it changes is measured between the evaluations that are computed.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(kw_only=True)
class StepCache:
    """The last prediction of one window, and how fast it changed before.

    limit: largest expected change since it was computed, as a fraction of the prediction's norm.
    """

    limit: float
    _x_0: Tensor | None = field(default=None, init=False)
    _timestep: int = field(default=0, init=False)
    _rate: float | None = field(default=None, init=False)  # relative change in one timestep

    def recall(self, timestep: int) -> Tensor | None:
        """Returns the last prediction (b c f h w) if it still holds at a timestep, else None.

        The first two evaluations are computed, because a change is measured between two.
        """
        if self._rate is None or self._rate * (self._timestep - timestep) > self.limit:
            return None
        assert self._x_0 is not None
        return self._x_0.clone()

    def keep(self, timestep: int, x_0: Tensor) -> None:
        """Stores a prediction (b c f h w) and measures its change, which waits for the device."""
        passed = self._timestep - timestep
        if self._x_0 is not None and passed > 0:
            change = (x_0 - self._x_0).norm() / x_0.norm().clamp(min=1e-12)
            self._rate = change.item() / passed
        # A copy, because callers may go on working on theirs in place.
        self._x_0, self._timestep = x_0.clone(), timestep
