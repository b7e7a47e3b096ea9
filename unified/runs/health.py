"""What is plainly wrong with a stage, judged by its curves alone.

Training losses are noisy, so they are compared as means over windows of lines. The noise of such a
mean is estimated within the windows, and a rise must exceed it several times. Validation draws the
same numbers every time, so its losses are compared one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev

#: fewest lines of a window, and fewest windows that say anything
WINDOW, WINDOWS = 5, 4
#: a rise by this share of what the loss fell before is a warning
SHARE = 0.2
#: and so many standard errors; the lowest of many windows is low by chance alone
ERRORS = 6.0
#: the last gradient norms, relative to all
BLOWN_UP = 5.0


def warnings(curves: Mapping[str, Sequence[float]]) -> list[str]:
    """One sentence each. `curves` holds the values of every key, in order."""
    found = [
        rise(key, curves.get(key, ()), window)
        for key, window in (("loss", WINDOW), ("val/loss", 1))
    ]
    return [text for text in (*found, blow_up(curves.get("grad_norm", ()))) if text]


def rise(key: str, values: Sequence[float], window: int) -> str:
    """Whether the last window lies well above the lowest one."""
    size = window if window == 1 else max(window, len(values) // 20)
    ends = range(size + len(values) % size, len(values) + 1, size)
    windows = [values[end - size : end] for end in ends]
    if len(windows) < WINDOWS:
        return ""
    means = [fmean(w) for w in windows]
    error = median(stdev(w) if len(w) > 1 else 0.0 for w in windows) / size**0.5
    fell, risen = means[0] - min(means), means[-1] - min(means)
    if risen <= max(SHARE * fell, ERRORS * error, 0.01 * abs(min(means))):
        return ""
    return f"{key} rises: {min(means):.4g} at its lowest, {means[-1]:.4g} now"


def blow_up(values: Sequence[float]) -> str:
    """Whether the last gradient norms are far above those before."""
    if len(values) < WINDOW * WINDOWS:
        return ""
    usual, now = median(values), median(values[-WINDOW:])
    if now <= BLOWN_UP * usual:
        return ""
    return f"grad_norm blows up: {usual:.4g} as a rule, {now:.4g} now"
