"""Chance by counters: published vectors, distributions, and independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from unified.randomness import WORD, Chance, derive, noise, philox

#: counter, key and words of Philox4x32-10, from the known answers of the Random123 library
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_vectors(counter, key, words):
    found = philox(key[0] | key[1] << 32, [torch.tensor(c) for c in counter])
    assert found.tolist() == list(words)


def test_a_number_depends_on_its_counter_alone():
    item = torch.arange(70_000) % 977  # more than one chunk
    place = torch.arange(70_000)
    many = Chance(1, "joint", 5).normal("noise", item, place, 6)
    few = Chance(1, "joint", 5).normal("noise", item[69_990:], place[69_990:], 6)
    assert torch.equal(many[69_990:], few)


@pytest.mark.parametrize(
    "other", [Chance(2, "joint", 5), Chance(1, "text", 5), Chance(1, "joint", 6)]
)
def test_seed_stage_and_step_tell_streams_apart(other):
    zero, place = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    mine = Chance(1, "joint", 5).uniform("noise", zero, place)
    assert not torch.isclose(mine, other.uniform("noise", zero, place)).any()
    assert not torch.isclose(mine, Chance(1, "joint", 5).uniform("mask", zero, place)).any()
    assert not torch.isclose(mine, Chance(1, "joint", 5).uniform("noise", zero + 1, place)).any()


def test_a_step_may_be_a_tensor():
    place = torch.arange(9)
    of_tensor = Chance(1, "a", torch.tensor(7)).normal("x", place, place, 3)
    assert torch.equal(of_tensor, Chance(1, "a", 7).normal("x", place, place, 3))


def test_normal_numbers_are_normal():
    z = noise((200_000, 5), 0, "test")
    n = z.numel()
    assert z.isfinite().all()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    inside = [float((z.abs() < k).double().mean()) for k in (1, 2, 3)]
    assert inside == pytest.approx([math.erf(k / math.sqrt(2)) for k in (1, 2, 3)], abs=2e-3)
    across = torch.corrcoef(z.T) - torch.eye(5)
    along = (z[1:] * z[:-1]).mean()
    assert across.abs().max() < 0.02
    assert abs(float(along)) < 0.01


def test_uniform_numbers_are_uniform():
    u = Chance(3).uniform("u", torch.arange(1000)[:, None], torch.arange(100))
    assert u.min() >= 0
    assert u.max() < 1
    assert u.flatten().histc(16, 0, 1).double().div(u.numel() / 16).sub(1).abs().max() < 0.05


def test_a_derived_seed_depends_on_every_word():
    assert len({derive(0, 1), derive(1, 0), derive(0, "1"), derive(0), derive(0, 1, "")}) == 5
