"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """In its two largest units."""
    whole = max(0, round(seconds))
    for long, short, unit in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= unit:
            smaller = {86400: 3600, 3600: 60, 60: 1}[unit]
            return f"{whole // unit} {long} {whole % unit // smaller} {short}"
    return f"{whole} s"


def size(count: float) -> str:
    """A number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
