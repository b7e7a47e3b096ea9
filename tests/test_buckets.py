"""Buckets: few shapes of whole cells, nothing enlarged or squashed, and every choice explained."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from unified.modalities.image import pixels
from unified.modalities.image.buckets import bucket, nearest, shapes
from unified.modalities.image.modality import ImageModality

BASES = (256, 384, 640, 1024)
NETWORK = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_groups": 4,
    "attention": False,
    "pixel_patch": 8,
}
SIZES = [(int(h), int(w)) for h, w in np.random.default_rng(0).integers(60, 3000, (400, 2))]


def make(**options: object) -> ImageModality:
    options = {"max_size": 1024, "network": NETWORK, **options}
    return ImageModality.build(ImageModality.Config(**options), None)


def test_the_table_of_the_docstring() -> None:
    cells = [(h // 16, w // 16) for h, w in shapes(256, 16, 2.0)]
    flat = [(11, 22), (12, 21), (13, 19), (14, 18), (15, 17), (16, 16)]
    assert cells == flat + [(w, h) for h, w in reversed(flat[:-1])]
    assert shapes(64, 16, 2.0) == ((48, 80), (64, 64), (80, 48))


@pytest.mark.parametrize("max_aspect", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("base", [16, 40, 64, 100, 256, 1024])
def test_shapes_are_whole_and_as_large_as_they_may_be(base: int, max_aspect: float) -> None:
    found = shapes(base, 16, max_aspect)
    assert (base // 16 * 16,) * 2 in found or base % 16
    assert sorted(found) == list(found)
    assert {(w, h) for h, w in found} == set(found)

    def allowed(height: int, width: int) -> bool:
        area, aspect = height * width, max(height, width) / min(height, width)
        return area <= base**2 and aspect <= max_aspect

    for h, w in found:
        assert h % 16 == w % 16 == 0
        assert allowed(h, w)
        assert not allowed(h + 16, w)
        assert not allowed(h, w + 16)


@pytest.mark.parametrize("base", BASES)
def test_the_aspect_is_missed_by_half_a_step_at_most(base: int) -> None:
    among = shapes(base, 16, 2.0)
    logs = [math.log(w / h) for h, w in among]
    steps = [a - b for a, b in pairwise(logs)]
    for height, width in SIZES:
        h, w = nearest(height, width, among)
        wanted = min(max(math.log(width / height), logs[-1]), logs[0])
        assert abs(math.log(w / h) - wanted) <= max(steps) / 2 + 1e-12
    assert max(steps) / 2 < 0.11  # at most a tenth of an image of a possible aspect is cut off


def test_the_largest_bucket_that_an_image_fills() -> None:
    for height, width in SIZES:
        found = [nearest(height, width, shapes(base, 16, 2.0)) for base in BASES]
        filled = [(h, w) for h, w in found if h <= height and w <= width]
        if filled:
            assert bucket(height, width, BASES, 16, 2.0) == filled[-1]
            assert bucket(*filled[-1], BASES, 16, 2.0) == filled[-1]
        else:
            with pytest.raises(ValueError, match="images are not enlarged"):
                bucket(height, width, BASES, 16, 2.0)
    assert bucket(1024, 1024, BASES, 16, 2.0) == (1024, 1024)
    assert bucket(1023, 1024, BASES, 16, 2.0) == (640, 640)
    assert bucket(300, 5000, BASES, 16, 2.0) == (272, 528)


def test_a_thousand_sizes_become_a_few_shapes() -> None:
    modality = make(buckets=[64, 128], max_size=128)
    seen = {
        tuple(modality.observe(Image.new("RGB", (w // 10 + 80, h // 10 + 80))).shape[1:])
        for h, w in SIZES
    }
    assert seen <= {*shapes(64, 16, 2.0), *shapes(128, 16, 2.0)}
    assert len(seen) > 3


def test_an_image_is_neither_squashed_nor_moved() -> None:
    """A disc in the middle stays a disc in the middle, in an image cut on two sides."""
    yy, xx = np.mgrid[:300, :450]
    disc = ((xx - 225) ** 2 + (yy - 150) ** 2 < 100**2).astype(np.uint8) * 255
    modality = make(buckets=[128])
    inside = modality.observe(Image.fromarray(disc).convert("RGB"))[0] > 127
    assert inside.shape == (96, 160)
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    assert abs(len(rows) - len(columns)) <= 1
    assert abs(len(columns) - 200 * 160 / 450) <= 1.5
    assert abs(float(rows.double().mean()) - 47.5) <= 1
    assert abs(float(columns.double().mean()) - 79.5) <= 1


def test_what_has_the_shape_of_a_bucket_keeps_every_pixel() -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    observation = make(buckets=[64]).observe(Image.fromarray(numbers))
    assert torch.equal(observation, pixels.to_tensor(Image.fromarray(numbers)))


def test_without_buckets_the_own_size_decides() -> None:
    assert make().observe(Image.new("RGB", (333, 100))).shape == (3, 96, 320)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": [64, 2048]}, "max_size 1024 is less than the largest of the buckets, 2048"),
        ({"buckets": []}, "buckets"),
        ({"buckets": [8]}, "bucket 8 is less than one cell of 16"),
        ({"buckets": [64], "max_aspect": 0.5}, "max_aspect"),
    ],
)
def test_buckets_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_image_that_fills_no_bucket_is_told_what_would() -> None:
    with pytest.raises(ValueError, match=r"image of 47 x 90 pixels .* 64, needs 48 x 80 or more"):
        make(buckets=[64, 128]).observe(Image.new("RGB", (47, 90)))
