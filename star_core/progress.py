"""Progress reports of a run."""

from collections.abc import Callable, Mapping

Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Counter:
    """Counts finished units of work in each stage and reports them to a callback."""

    def __init__(self, totals: Mapping[str, int], on_progress: Progress | None) -> None:
        """totals: units of work in each stage. on_progress: called as (stage, done, total)."""
        self._totals, self._done = totals, {}
        self._report = on_progress or (lambda stage, done, total: None)

    def begin(self, stage: str) -> None:
        """Reports the start of a stage, unless it has already started."""
        if stage not in self._done:
            self._done[stage] = 0
            self._report(stage, 0, self._totals[stage])

    def add(self, stage: str, count: int = 1) -> None:
        """Reports that `count` more units of a stage are done."""
        self.begin(stage)
        self._done[stage] += count
        self._report(stage, self._done[stage], self._totals[stage])
