"""Tables and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str]], align: str = "lr") -> str:
    """Rows of equal length as text, in columns of equal width.

    `align` has a letter for each column, l or r; its last one stands for all further columns.
    """
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides, strict=False)
        ).rstrip()
        for row in cells
    )


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
