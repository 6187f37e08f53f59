"""Pools votes of blind comparisons over many viewers: shares with confidence intervals.

STAR's user study (arXiv 2501.02976, Fig. 12) asks which of four methods is best in quality and in
consistency, and reports shares of the votes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FORMAT = "star blind votes 1"
QUESTIONS = {
    "quality": "Quality: which clip looks best (sharp, detailed, natural)?",
    "consistency": "Consistency: which clip is steadiest in time (no flicker, no jumps)?",
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """A clip's share of the votes on a question.

    votes, of: the votes for the clip, and all votes. low, high: the share's 95 % interval.
    """

    question: str
    clip: str
    votes: int
    of: int
    low: float
    high: float


def wilson(votes: int, of: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns the score interval of a binomial share (Wilson 1927); (0, 1) without any votes.

    votes, of: the votes for the option, and all votes. z: the quantile, by default two-sided 95 %.
    """
    if not of:
        return 0.0, 1.0
    share = votes / of
    middle = share + z**2 / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    scale = 1 + z**2 / of
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def pool(files: Sequence[Path]) -> list[Share]:
    """Returns the shares of votes, by question and clip, over files that the page has written.

    Undecided votes are ignored. Raises ValueError for another kind of file, for repeated votes, and
    for votes between different clips.
    """
    votes = []
    sources: dict[tuple[object, ...], Path] = {}
    for path in files:
        content = _read(path)
        for vote in content["votes"]:
            key = content["viewer"], vote["scene"], vote["round"], vote["question"]
            if key in sources:
                raise ValueError(
                    f"{path.name} and {sources[key].name} both have votes of {key[0]} on scene "
                    f"{key[1]}, round {key[2]}: leave one of them out"
                )
            sources[key] = path
            votes.append(vote)
    clips = {frozenset(vote["order"]) for vote in votes}
    if len(clips) != 1:
        raise ValueError(
            "the files have no votes, or votes between different clips: use files that compare the "
            "same clips"
        )
    shares = []
    for question in dict.fromkeys(vote["question"] for vote in votes):
        cast = [v["choice"] for v in votes if v["question"] == question and v["choice"] is not None]
        for clip in sorted(next(iter(clips))):
            count = cast.count(clip)
            low, high = wilson(count, len(cast))
            shares.append(
                Share(question=question, clip=clip, votes=count, of=len(cast), low=low, high=high)
            )
    return shares


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of votes, which the comparison page writes")
    return content
