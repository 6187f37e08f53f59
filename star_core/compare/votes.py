"""Votes of blind comparisons: shares with confidence intervals, over the files of many viewers.

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
    """Votes for a clip out of those cast, and the 95 % interval of its share."""

    question: str
    clip: str
    votes: int
    of: int
    low: float
    high: float


def wilson(votes: int, of: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927); z is two-sided 95 %. (0, 1) of no votes."""
    if not of:
        return 0.0, 1.0
    share = votes / of
    middle = share + z**2 / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    scale = 1 + z**2 / of
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def pool(files: Sequence[Path]) -> list[Share]:
    """Shares over the votes in files that the page wrote, by question and clip.

    Those who could not tell are left out. ValueError for a file that is none, for votes that are
    given twice, and for votes between other clips.
    """
    votes = []
    seen: dict[tuple[object, ...], Path] = {}
    for path in files:
        content = _read(path)
        for vote in content["votes"]:
            who = content["viewer"], vote["scene"], vote["round"], vote["question"]
            if who in seen:
                raise ValueError(
                    f"{path.name} and {seen[who].name} both have votes of {who[0]} on scene "
                    f"{who[1]}, round {who[2]}: leave one of them out"
                )
            seen[who] = path
            votes.append(vote)
    clips = {frozenset(vote["order"]) for vote in votes}
    if len(clips) != 1:
        raise ValueError("the files have votes between different clips, or none: pool alike ones")
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
        raise ValueError(f"{path} is no file of votes: the comparison page writes them")
    return content
