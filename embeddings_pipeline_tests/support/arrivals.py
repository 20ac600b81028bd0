"""When requests arrived, and what was most in any window of time."""

from collections.abc import Sequence


def worst_window(arrivals: Sequence[tuple[float, int, int]], window: float) -> dict[str, int]:
    """The most requests and the most tokens in any window of so many seconds."""
    worst = {"requests": 0, "tokens": 0}
    tokens, first = 0, 0
    for last, (moment, count, _) in enumerate(arrivals):
        tokens += count
        while arrivals[first][0] <= moment - window:
            tokens -= arrivals[first][1]
            first += 1
        worst["requests"] = max(worst["requests"], last - first + 1)
        worst["tokens"] = max(worst["tokens"], tokens)
    return worst
