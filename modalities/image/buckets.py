"""Size buckets: images of all sizes brought to a few shapes, none enlarged and none squashed.

A bucket is a base, the side of a square. Its shapes are the grids of whole cells that are as large
as its area and the bound on the sides' ratio allow. With cells of 16 pixels and sides up to 1 : 2
(each shape also lies on its other side):

    base   rows x columns of cells                      pixels of the first and the last
    64     4x4  3x5                                     64x64      48x80
    128    8x8  7x9  6x10                               128x128    96x160
    256    16x16  15x17  14x18  13x19  12x21  11x22     256x256    176x352

An image goes to the largest bucket that it fills: the one whose shape nearest to the image's own
in aspect lies within the image. It is then scaled down to cover that shape, and what stands over
is cut off evenly. So an image that has the shape of a bucket stays as it is, an image more
elongated than the bound is cut down to it, and one that fills no bucket is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

Shape = tuple[int, int]


@cache
def shapes(base: int, cell: int, max_aspect: float) -> tuple[Shape, ...]:
    """(height, width) in pixels of all shapes of a bucket, from the flattest to the tallest.

    No shape has room for a further row or column of cells within ``base ** 2`` pixels and the
    ratio `max_aspect` of the longer side to the shorter.
    """
    budget = base**2 // cell**2
    sides = range(1, math.isqrt(budget) + 1)
    flat = [(rows, min(budget // rows, int(rows * max_aspect))) for rows in sides]
    largest = [
        (rows, columns)
        for rows, columns in flat
        if all(columns > others for more, others in flat if more > rows)
    ]
    tall = [(columns, rows) for rows, columns in reversed(largest) if columns > rows]
    return tuple((rows * cell, columns * cell) for rows, columns in largest + tall)


def nearest(height: int, width: int, among: Sequence[Shape]) -> Shape:
    """The shape whose aspect is nearest to that of `height` x `width`, as a factor."""
    return min(among, key=lambda shape: abs(math.log(width * shape[0] / (height * shape[1]))))


def bucket(height: int, width: int, bases: Sequence[int], cell: int, max_aspect: float) -> Shape:
    """The (height, width) that an image of this size is brought to; ValueError if it fills no
    bucket of `bases`."""
    for base in sorted(bases, reverse=True):
        shape = nearest(height, width, shapes(base, cell, max_aspect))
        if shape[0] <= height and shape[1] <= width:
            return shape
    raise ValueError(
        f"an image of {width} x {height} pixels was found: the smallest bucket, {min(bases)},"
        f" needs {shape[1]} x {shape[0]} or more at this aspect, and images are not enlarged"
    )
