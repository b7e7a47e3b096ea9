"""The three published tables, as masks, drawings and what they let through."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import toys
from devices import DEVICES
from torch.nn.attention.flex_attention import flex_attention

from unified.model import attention
from unified.model.attention import attend, check_trains, dot_product, see
from unified.model.kernels import tiles
from unified.model.kernels.tiles import at_once
from unified.sequence.visibility import (
    ALL,
    BEFORE,
    SAME,
    UP_TO,
    Coordinates,
    Visibility,
    closure,
    draw,
    with_unconditional,
)
from unified.tasks import captioning, continuation, text_to_image

TASKS = {"continuation": continuation, "captioning": captioning, "text_to_image": text_to_image}


def published(task: str, q: str, k: str, bq: int, bk: int) -> bool:
    """The published rules, written out case by case and sharing nothing with the tables."""
    if q == "U":
        return k == "U" and bq == bk
    if task == "captioning":
        if k in "PI":
            return q in "PICN"
        if q in "PI":
            return False
    if task == "text_to_image" and q == "I":
        return k in "CI"
    if q == "C":
        return k == "C" and bk <= bq
    if q == "N":
        return (k == "C" and bk < bq) or (k == "N" and bk == bq)
    return False


def test_dense_mask_is_the_published_rule_on_random_mixed_rows():
    layouts = toys.layouts()
    for seed in range(5):
        batch = toys.batch(toys.samples(12, seed), layouts)
        kinds = {i: k for k, i in batch.visibility.kind_index.items()}
        names = list(batch.visibility.table_index)
        at = batch.coordinates
        mask = batch.visibility.dense(at)
        for r in range(batch.shape[0]):
            rows = [
                tuple(int(t[r, i]) for t in (at.sample, at.table, at.kind, at.block))
                for i in range(batch.shape[1])
            ]
            for i, (sq, tq, kq, bq) in enumerate(rows):
                for j, (sk, _, kk, bk) in enumerate(rows):
                    expected = sq == sk >= 0 and published(names[tq], kinds[kq], kinds[kk], bq, bk)
                    assert bool(mask[r, i, j]) == expected


def test_relabelled_positions_see_their_own_block_alone():
    layouts = toys.layouts(unconditional_rate=1.0)
    of = toys.samples(8)
    batch = toys.batch(of, layouts)
    noisy, _ = toys.corrupt(batch, toys.flow(layouts))
    at, u = noisy.coordinates, noisy.visibility.kind_index["U"]
    seen = noisy.visibility.dense(at)
    is_u = (at.kind == u) & (at.sample >= 0)
    assert is_u.any()
    same = (at.sample[:, :, None] == at.sample[:, None]) & is_u[:, :, None] & is_u[:, None]
    same &= at.block[:, :, None] == at.block[:, None]
    assert torch.equal(seen & is_u[:, :, None], same)
    assert torch.equal(seen & is_u[:, None], same)


@pytest.mark.parametrize("task", TASKS)
def test_the_docstring_draws_the_table(task: str):
    lengths = {"P": 2, "I": 2, "C": 4}
    layout = toys.layouts(block=2)[task]
    kinds, _, grid = layout.grid({s.kind: lengths[s.kind] for s in layout.filled})
    lines = ast.get_docstring(ast.parse(Path(TASKS[task].__file__).read_text())) or ""
    drawing = [line.strip() for line in draw(kinds, grid).splitlines()]
    assert "\n".join(drawing) in "\n".join(line.strip() for line in lines.splitlines())


def test_one_changed_entry_changes_the_drawing_and_the_mask():
    layout = toys.layouts()["captioning"]
    changed = {q: dict(row) for q, row in layout.sees.items()}
    changed["N"]["C"] = UP_TO
    lengths = {"P": 1, "I": 1, "C": 4}
    kinds, _, grid = layout.grid(lengths)
    _, _, other = type(layout)(layout.segments, changed).grid(lengths)
    difference = [
        (kinds[i], kinds[j])
        for i in range(len(kinds))
        for j in range(len(kinds))
        if grid[i][j] != other[i][j]
    ]
    assert set(difference) == {("N", "C")}
    assert len(difference) == 8


def test_the_unconditional_row_is_always_there():
    sees = {"C": {"C": UP_TO}, "N": {"C": BEFORE, "N": SAME}}
    assert with_unconditional(sees)["U"] == {"U": SAME}
    kinds, blocks, grid = toys.layouts()["text_to_image"].grid({"C": 4, "I": 3}, unconditional=True)
    u = [i for i, k in enumerate(kinds) if k == "U"]
    assert len(u) == 3 + 4
    for i in u:
        assert [j for j in range(len(kinds)) if grid[i][j]] == [
            j for j in u if blocks[j] == blocks[i]
        ]


def test_closure_never_lets_the_answer_reach_the_question():
    sees = toys.layouts()["captioning"].sees
    assert closure(sees, "P") == closure(sees, "I") == {"P", "I"}
    assert closure(sees, "N") == {"P", "I", "C", "N"}
    assert closure(toys.layouts()["text_to_image"].sees, "I") == {"C", "I"}


def test_flex_and_sdpa_agree():
    """The flex rule, evaluated without compiling, against the dense mask."""
    layouts = toys.layouts()
    batch = toys.batch(toys.samples(10), layouts)
    rows, length = batch.shape
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, rows, length, 2, 8, generator=g).unbind(0)
    dense = attend(q, k, v, see(batch.visibility, batch.coordinates, backend="sdpa"))
    blocks = see(batch.visibility, batch.coordinates, backend="flex").blocks
    flex = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks)
    held = batch.coordinates.sample >= 0
    torch.testing.assert_close(flex.transpose(1, 2)[held], dense[held], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_flex_agrees(device, dtype):
    """With gradients where the device has them; heads and rows as wide as models have them."""
    layouts = toys.layouts()
    batch = toys.batch(toys.samples(40), layouts, row_length=300).to(device)
    learns = device.type != "cpu"
    g = torch.Generator().manual_seed(0)
    shape = (*batch.shape, 2, 64)
    q, k, v, out = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(4))
    held = (batch.coordinates.sample >= 0)[..., None, None]
    found = []
    for backend in ("sdpa", "flex"):
        given = [x.clone().requires_grad_(learns) for x in (q, k, v)]
        seen = see(batch.visibility, batch.coordinates, backend=backend)
        with torch.set_grad_enabled(learns):
            made = attend(*given, seen) * held
        found.append([made, *(torch.autograd.grad(made, given, out) if learns else [])])
    near = 0.03 if dtype == torch.bfloat16 else 1e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)


def by_hand(q, k, v, query_starts, key_starts, longest_query, longest_key):
    """What a kernel for runs of several lengths gives, run by run; it knows no empty run."""
    out, bounds = (
        [],
        zip(pairwise(query_starts.tolist()), pairwise(key_starts.tolist()), strict=True),
    )
    for (a, b), (c, d) in bounds:
        assert b - a <= longest_query
        assert d - c <= longest_key
        parts = (x.float().transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        found = F.scaled_dot_product_attention(*parts).transpose(0, 1)
        out.append(found.to(q.dtype) if d > c else torch.full_like(q[a:b], torch.nan))
    return torch.cat(out)


@pytest.mark.parametrize("device", DEVICES)
def test_runs_of_queries_see_what_the_mask_shows(monkeypatch, device):
    """On a CPU, which has no such kernel, with one written by hand."""
    if device.type == "cpu":
        monkeypatch.setattr(attention, "_varlen", lambda kind: by_hand)
    layouts = toys.layouts()
    batch = toys.batch(toys.samples(10), layouts).to(device)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, *batch.shape, 2, 16, generator=g).to(device, torch.bfloat16).unbind(0)
    seen = see(batch.visibility, batch.coordinates, backend="varlen")
    dense = attend(q, k, v, see(batch.visibility, batch.coordinates, backend="sdpa"))
    torch.testing.assert_close(attend(q, k, v, seen), dense, atol=0.02, rtol=0.02)
    mask = batch.visibility.dense(batch.coordinates)
    assert seen.runs.keys.numel() < mask.sum()
    lengths = seen.runs.query_starts.diff() * seen.runs.key_starts.diff()
    assert lengths.sum() == mask.sum()


def test_varlen_says_what_it_needs():
    batch = toys.batch(toys.samples(1), toys.layouts())
    seen = see(batch.visibility, batch.coordinates, backend="varlen")
    x = torch.randn(*batch.shape, 2, 8)
    with pytest.raises(ValueError, match="bfloat16 or float16, found float32"):
        attend(x, x, x, seen)
    with pytest.raises(ValueError, match="needs an accelerator with FlashAttention, not cpu"):
        attend(*[x.bfloat16()] * 3, seen)


def test_unknown_backend_is_a_sentence():
    batch = toys.batch(toys.samples(1), toys.layouts())
    with pytest.raises(ValueError, match="unknown attention backend 'triton'"):
        see(batch.visibility, batch.coordinates, backend="triton")


def test_tables_compile_to_integers():
    rule = Visibility({"t": {"C": {"C": ALL}}})
    assert rule.lo_TKK.shape == rule.hi_TKK.shape == (1, 2, 2)


def test_long_rows_are_cut_into_tiles_that_change_nothing(monkeypatch):
    layouts = toys.layouts()
    batch = toys.batch(toys.samples(40), layouts, row_length=200)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*batch.shape, 2, 8, dtype=torch.float64, generator=rng, requires_grad=True)
        for _ in range(3)
    )
    monkeypatch.setattr(tiles, "TILE", 48 * 4)
    found = []
    for tiled, kept in ((10**6, 0), (100, 0), (100, 50), (100, 1000)):
        monkeypatch.setattr(attention, "TILED", tiled)
        monkeypatch.setattr(tiles, "KEPT", kept)
        seen = see(batch.visibility, batch.coordinates, backend="sdpa")
        assert (seen.tiles is None) == (tiled > 200)
        out = attend(q, k, v, seen)
        found.append([out, *torch.autograd.grad((out**3).sum(), (q, k, v))])
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)
    mask = batch.visibility.dense(batch.coordinates)
    heads = [x.transpose(1, 2) for x in (q, k)]
    sizes = [(t.asked(heads[0]).shape[2], t.shown(heads[1]).shape[2]) for t in seen.tiles]
    assert sum(asked * shown for asked, shown in sizes) < 0.5 * mask.numel()
    assert sum(asked for asked, _ in sizes) == mask.shape[:2].numel()
    assert min(shown for _, shown in sizes) < 50 < max(shown for _, shown in sizes)


def test_where_nothing_is_hidden_there_is_no_mask(monkeypatch):
    """A caption and an image that see each other; then a noisy caption, which sees less."""
    everyone = Visibility({"t": {"C": {"C": ALL, "I": ALL}, "I": {"C": ALL, "I": ALL}}})
    some = Visibility({"t": {"C": {"C": ALL}, "I": {"C": ALL, "I": ALL}}})
    kind = torch.tensor([[everyone.kind_index[k] for k in "CCIIII"]])
    zero = torch.zeros_like(kind)
    at = Coordinates(zero, zero, kind, zero)
    assert see(everyone, at, backend="sdpa").dense.all()  # in training nothing waits for the mask
    with torch.no_grad():
        seen = see(everyone, at, backend="sdpa")
    assert seen.dense is seen.tiles is seen.blocks is None
    q, k, v = torch.randn(3, 1, 6, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    full = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(attend(q, k, v, seen), full.transpose(1, 2))
    monkeypatch.setattr(tiles, "TILE", 2 * 4)
    monkeypatch.setattr(attention, "TILED", 4)
    text, *image = see(some, at, backend="sdpa").tiles
    assert (text.keys, text.mask) == ((slice(0, 2),), None)
    assert [(t.keys, t.mask) for t in image] == [((slice(0, 6),), None)] * 2
    part = F.scaled_dot_product_attention(*(x[:, :2].transpose(1, 2) for x in (q, k, v)))
    tiled = attend(q, k, v, see(some, at, backend="sdpa"))
    torch.testing.assert_close(
        tiled, torch.cat([part.transpose(1, 2), full.transpose(1, 2)[:, 2:]], 1)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_that_is_written_out_is_the_fused_one(dtype):
    """Values and gradients; nothing for a query that sees nothing."""
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 2, 9, 8, generator=g, dtype=torch.float64).unbind()
    mask = torch.rand(2, 1, 9, 9, generator=g) < 0.6
    mask[:, :, 4] = False
    tolerance = (
        {"atol": 1e-12, "rtol": 0} if dtype == torch.float64 else {"atol": 0.06, "rtol": 0.06}
    )
    for shown in (mask, None):
        exact = [x.clone().requires_grad_() for x in (q, k, v)]
        wanted = F.scaled_dot_product_attention(*exact, attn_mask=shown)
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        found = at_once(*inputs, shown)
        torch.testing.assert_close(found.double(), wanted, **tolerance)
        assert shown is None or not found[:, :, 4].any()
        gradients = torch.autograd.grad((found * weight).sum(), inputs)
        others = torch.autograd.grad((wanted * weight).sum(), exact)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one.double(), other, **tolerance)


def test_few_queries_many_keys_and_float32_are_left_to_the_fused_kernel(monkeypatch):
    x = torch.randn(1, 1, 8, 4)
    causal = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    written = []

    def write_out(*given):
        written.append(given)
        return at_once(*given)

    monkeypatch.setattr(attention, "at_once", write_out)
    bf16, wide = torch.bfloat16, torch.float32
    for dtype, queries, keys, count in (
        (bf16, 2, 8, 1),
        (bf16, 9, 8, 1),
        (bf16, 2, 7, 1),
        (wide, 2, 8, 1),
    ):
        monkeypatch.setattr(attention, "QUERIES", queries)
        monkeypatch.setattr(attention, "KEYS", keys)
        given = x.to(dtype)
        found = dot_product(given, given, given, None, is_causal=True)
        torch.testing.assert_close(found.float(), causal, atol=0.03, rtol=0.03)
        assert len(written) == count
    with torch.autocast("cpu", bf16):
        assert dot_product(x, x, x, None).dtype == bf16
    assert len(written) == 2


@pytest.mark.parametrize(
    ("backend", "kind", "precision", "sentence"),
    [
        ("flex", "cpu", "fp32", "attention is flex, which does not train on cpu: set it to sdpa"),
        ("varlen", "cpu", "bf16", "attention is varlen, which does not train on cpu"),
        ("varlen", "cuda", "fp32", "computes in bfloat16, but the precision is fp32"),
    ],
)
def test_a_backend_that_does_not_train_is_refused(backend, kind, precision, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_trains(backend, torch.device(kind), precision)
    check_trains("auto", torch.device(kind), precision)
    check_trains("flex", torch.device("cuda"), precision)
