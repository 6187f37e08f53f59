"""How far a run is, told as it goes."""

from collections.abc import Callable, Mapping

Progress = Callable[[str, int, int], None]


class Counter:
    """Counts what is done in each stage and says so: `on_progress(stage, done, total)`."""

    def __init__(self, totals: Mapping[str, int], on_progress: Progress | None) -> None:
        self._totals, self._done = totals, {}
        self._tell = on_progress or (lambda stage, done, total: None)

    def begin(self, stage: str) -> None:
        """Tell that a stage begins, with nothing done, unless it has begun before."""
        if stage not in self._done:
            self._done[stage] = 0
            self._tell(stage, 0, self._totals[stage])

    def add(self, stage: str, count: int = 1) -> None:
        """Tell that so much more is done."""
        self.begin(stage)
        self._done[stage] += count
        self._tell(stage, self._done[stage], self._totals[stage])
