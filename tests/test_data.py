"""Data: what is read, what is refused, and that a step's batch is a function of its number."""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import pickle
import tarfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from unified.config.schema import SourceConfig
from unified.data.examples import Example
from unified.data.fixed import fixed_examples
from unified.data.mixture import Feed, Mixture
from unified.data.order import Order
from unified.data.prefetch import prefetch
from unified.data.remote import Access
from unified.data.shards import RawExample, read_shards
from unified.data.source import Source
from unified.data.streams import ItemStream, Prepared, TaskStream
from unified.randomness import generator
from unified.sequence.layout import Layout, Segment
from unified.sequence.task import Task
from unified.sequence.visibility import BEFORE, SAME, UP_TO


class Letters:
    """A modality of letters: a member is ASCII text, an observation its codes, 0 the end."""

    extensions = ("txt", "text")
    leads = 1

    def read(self, data: bytes) -> str:
        return data.decode("ascii")

    def observe(
        self, item: str, *, block: int | None = None, ends: bool = False, limit: int | None = None
    ) -> torch.Tensor:
        codes = ([ord(c) for c in item] + [0] * ends)[:limit]
        return torch.tensor(codes + [0] * (-len(codes) % (block or 1)))

    def grid(self, observation: torch.Tensor) -> tuple[int, ...]:
        return (len(observation),)


class Echo(Task):
    """A task: after the first letter P, the others C, two to a block."""

    generates = "C"
    limits: ClassVar[dict[str, int]] = {}
    layout = Layout(
        (
            Segment("P", "letters"),
            Segment("C", "letters", block=2),
            Segment("N", "letters", "block", "C", block=2),
        ),
        sees={
            "P": {"P": SAME},
            "C": {"P": UP_TO, "C": UP_TO},
            "N": {"P": UP_TO, "C": BEFORE, "N": SAME},
        },
    )

    def __init__(self) -> None:
        super().__init__(config=None)

    def fill(self, example: Any) -> dict[str, str]:
        return {"P": example["letters"][0], "C": example["letters"][1:]}


MODALITIES: Any = {"letters": Letters()}


def write(path: Path, examples: dict[str, dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, members in examples.items():
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def source(folder: Path, name: str, count: int, bad: int = 0) -> Source:
    """Examples of `count` numbers as text, the first `bad` of them no ASCII."""
    texts = [b"\xff" if i < bad else str(i).encode() for i in range(count)]
    return Source(
        name, write(folder / f"{name}.tar", {f"{i:04}": {"txt": t} for i, t in enumerate(texts)})
    )


def feed(source: Source, name: str = "a", ratio: float = 1.0) -> Feed:
    return Feed(ItemStream(name, "letters", MODALITIES), source, ratio)


def mixture(feeds: list[Feed], batch_size: int = 4, **options: Any) -> Mixture:
    return Mixture(feeds, batch_size=batch_size, seed=3, stage="joint", **options)


def batch(m: Mixture, step: int) -> list[Prepared]:
    """The examples of a step: without a collator of its own, a mixture gives them as they are."""
    (examples,) = m.batch(step)
    return examples


def keys(m: Mixture, steps: int) -> list[str]:
    return [prepared.key for step in range(steps) for prepared in batch(m, step)]


def summary(m: Mixture, step: int) -> list[Any]:
    return described(batch(m, step))


def described(examples: Sequence[Prepared]) -> list[Any]:
    return [(p.stream, p.key, p.slot, p.observations["X"].tolist()) for p in examples]


# ---- shards ------------------------------------------------------------------------------------


def test_shards_are_read_in_order_with_their_members(tmp_path):
    for n in range(3):
        write(tmp_path / f"s-{n}.tar", {f"{n}{i}": {"txt": b"x", "json": b"{}"} for i in range(2)})
    examples = read_shards(f"{tmp_path}/s-{{0..2}}.tar")
    assert [e.key for e in examples] == ["00", "01", "10", "11", "20", "21"]
    assert examples[2].members == {"txt": b"x", "json": b"{}"}
    assert examples[2].shard == f"{tmp_path}/s-1.tar"


def test_paths_may_be_relative_or_in_the_home_folder(tmp_path, monkeypatch):
    write(tmp_path / "s.tar", {"0": {"txt": b"x"}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_shards(["s.tar", "~/s.tar"])) == 2


def test_every_process_reads_every_shard(tmp_path, monkeypatch):
    url = write(tmp_path / "s.tar", {"0": {"txt": b"x"}})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert len(read_shards(url)) == 1


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the member was unpickled",))

    bomb = pickle.dumps(Bomb())
    url = write(tmp_path / "s.tar", {"0": {"pyd": bomb, "pth": bomb, "pickle": bomb, "txt": b"x"}})
    (example,) = read_shards(url)
    assert example.members["pyd"] == bomb
    assert Example(example, MODALITIES)["letters"] == "x"


@pytest.mark.parametrize("url", ["pipe:touch hacked", "s3://bucket/s.tar"])
def test_what_may_not_or_cannot_be_fetched_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"give (the|its) path"):
        read_shards(url)
    with pytest.raises(ValueError, match=r"give (the|its) path"):
        Source("s", url)
    assert not list(tmp_path.iterdir())


def test_a_pipe_runs_where_it_is_allowed_and_once(tmp_path):
    write(tmp_path / "s.tar", {"0": {"txt": b"x"}})
    access = Access(str(tmp_path / "cache"), allow_pipes=True)
    url = f"pipe:echo run >> {tmp_path}/log; cat {tmp_path}/s.tar"
    for _ in range(2):
        assert [e.members for e in Source("s", url, access)] == [{"txt": b"x"}]
    assert (tmp_path / "log").read_text() == "run\n"


def test_a_failed_fetch_leaves_nothing_behind(tmp_path):
    access = Access(str(tmp_path / "cache"), allow_pipes=True)
    with pytest.raises(ValueError, match=r"nowhere\.tar .*could not be fetched"):
        list(Source("s", f"pipe:cat {tmp_path}/nowhere.tar 2>/dev/null", access))
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".lock"}


def test_the_cache_keeps_to_its_size_and_fetches_again(tmp_path):
    urls = [f"pipe:cat {write(tmp_path / f'{n}.tar', {str(n): {'txt': b'x'}})}" for n in range(3)]
    size = (tmp_path / "0.tar").stat().st_size
    access = Access(str(tmp_path / "cache"), cache_gb=1.5 * size / 1e9, allow_pipes=True)
    source = Source("s", urls, access)
    entries = [entry for url in urls for entry in source.shard(url)]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    assert [source.read(entry).key for entry in entries] == ["0", "1", "2"]


def _reads(folder: str, urls: list[str], size: float, seed: int) -> int:
    """Read examples at random from a cache that holds few of the shards."""
    source = Source("s", urls, Access(folder, cache_gb=size, allow_pipes=True))
    entries = [entry for url in urls for entry in source.shard(url)]
    draw = generator(seed)
    for _ in range(60):
        entry = entries[int(torch.randint(len(entries), (), generator=draw))]
        assert source.read(entry).key == entry.key
    return len(entries)


def test_processes_share_a_cache_that_is_too_small_for_all(tmp_path):
    urls = [f"pipe:cat {write(tmp_path / f'{n}.tar', {str(n): {'txt': b'x'}})}" for n in range(6)]
    size = 3.5 * (tmp_path / "0.tar").stat().st_size / 1e9
    with ProcessPoolExecutor(3) as pool:
        runs = [pool.submit(_reads, str(tmp_path / "cache"), urls, size, seed) for seed in range(3)]
        assert [run.result() for run in runs] == [6, 6, 6]


@pytest.mark.parametrize("prefix", ["file:", "file://"])
def test_a_file_url_is_a_path(prefix, tmp_path):
    url = write(tmp_path / "s.tar", {"0": {"txt": b"x"}})
    assert len(Source("s", prefix + url)) == 1


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar was not found"):
        read_shards(str(tmp_path / "nowhere.tar"))


def test_an_empty_shard_is_named(tmp_path):
    (tmp_path / "zero.tar").touch()
    with pytest.raises(ValueError, match=r"zero\.tar is empty"):
        read_shards(str(tmp_path / "zero.tar"))
    with pytest.raises(ValueError, match=r"none\.tar has no examples"):
        read_shards(write(tmp_path / "none.tar", {}))


@pytest.mark.parametrize("keep", [300, 512, 700, 1024, 1536, 2000, 2048])
def test_a_shard_cut_short_is_named(tmp_path, keep):
    write(tmp_path / "whole.tar", {str(i): {"txt": b"some text"} for i in range(4)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.tar is damaged, cut short"):
        read_shards(str(tmp_path / "cut.tar"))


def test_a_file_that_is_no_plain_tar_is_named(tmp_path):
    url = write(tmp_path / "good.tar", {"0": {"txt": b"some text"}, "1": {"txt": b"more"}})
    good = Path(url).read_bytes()
    contents = {
        "text": (b"hello " * 512, "is damaged"),
        "gz": (gzip.compress(good), "is damaged"),
        "header": (good[:1024] + b"x" * 512 + good[1536:], "is damaged.*no end mark at byte 1024"),
        "joined": (good + good, "is damaged.*no end mark at byte 2048"),
        "zeros": (bytes(10240), "has no examples"),
    }
    for name, (data, words) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} {words}"):
            read_shards(str(tmp_path / name))


def test_two_members_of_one_name_are_an_error(tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(ValueError, match=r"twice\.tar is damaged.*duplicate"):
        read_shards(str(tmp_path / "twice.tar"))


def test_the_embedded_data_loads():
    examples = read_shards(
        ["embedded:emoji/val{,-style}-00000.tar", "embedded:prose/val-00000.tar"]
    )
    assert len(examples) == 155 + 60 + 396
    assert set(examples[0].members) == {"webp", "txt", "json"}
    assert set(examples[-1].members) == {"txt"}
    assert {"name", "style", "license"} <= set(Example(examples[0], {}).metadata)
    with pytest.raises(FileNotFoundError, match=r"embedded:emoji/no\.tar"):
        read_shards("embedded:emoji/no.tar")


def test_a_source_names_its_splits(tmp_path):
    url = write(tmp_path / "s.tar", {"0": {"txt": b"x"}})
    config = SourceConfig(train=[url], splits={"style": [url, url]})
    assert len(Source.open("emoji", config)) == 1
    assert len(Source.open("emoji", config, "style")) == 2
    with pytest.raises(ValueError, match="emoji has no split val; it has train, style"):
        Source.open("emoji", config, "val")


# ---- examples and streams ----------------------------------------------------------------------


def test_an_example_maps_modalities_to_items(tmp_path):
    url = write(
        tmp_path / "s.tar",
        {
            "0": {"text": b"second", "txt": b"best"},
            "1": {"json": b'{"a": 1}'},
            "2": {"json": b"[]"},
        },
    )
    both, none, wrong = (Example(raw, MODALITIES) for raw in read_shards(url))
    assert dict(both) == {"letters": "best"}
    assert "letters" not in none
    assert (both.metadata, none.metadata) == ({}, {"a": 1})
    with pytest.raises(ValueError, match=r"s\.tar, example 1: no member for letters \(\.txt, \.te"):
        none["letters"]
    with pytest.raises(ValueError, match=r"example 2: \.json must hold an object, found list"):
        _ = wrong.metadata
    with pytest.raises(KeyError):
        both["sound"]


class Points(Letters):
    """Another modality of the same endings, and one with a dot in it."""

    extensions = ("seg.txt", "txt")


def test_an_example_may_have_several_items_of_a_modality(tmp_path):
    members = {"source.txt": b"s", "txt": b"t", "a.b.txt": b"x", "json": b"{}", "b.md": b"?"}
    (raw,) = read_shards(write(tmp_path / "s.tar", {"k": members}))
    assert set(raw.members) == set(members)
    example = Example(raw, MODALITIES)
    assert [example[name] for name in ("letters", "source.letters", "a.b.letters")] == list("tsx")
    assert list(example) == ["letters", "a.b.letters", "source.letters"]
    assert "source.letters" in example
    for absent in ("gone.letters", "b.letters", "source.image", "source.", "source"):
        assert absent not in example
    with pytest.raises(
        ValueError, match=r"example k: no member for gone.letters \(.gone.txt, .gone.text\);"
    ):
        example["gone.letters"]
    only = Example(RawExample("k", "s.tar", {"source.txt": b"s"}), MODALITIES)
    assert list(only) == ["source.letters"]
    assert "letters" not in only


def test_an_ending_of_a_modality_is_no_name_of_an_item():
    raw = RawExample("k", "s.tar", {"seg.txt": b"p", "txt": b"t"})
    example = Example(raw, {**MODALITIES, "points": Points()})
    assert list(example) == ["letters", "points"]  # and not "seg.letters"
    assert (example["letters"], example["points"]) == ("t", "p")


def test_a_task_stream_observes_every_segment(tmp_path):
    (raw,) = read_shards(write(tmp_path / "s.tar", {"0": {"txt": b"abcde"}}))
    example, draw = Example(raw, MODALITIES), generator(0)
    stream = TaskStream("echo", Echo(), MODALITIES, row_length=11)  # type: ignore[arg-type]
    observations, _ = stream.prepare(example, draw)
    # P is given: not closed. C is generated: closed, and filled up to whole blocks.
    assert {k: o.tolist() for k, o in observations.items()} == {
        "P": [97],
        "C": [98, 99, 100, 101, 0, 0],
    }
    with pytest.raises(
        # the last block of C is seen by nobody who learns
        ValueError,
        match=r"example 0: .* 11 latents \(P 1 \+ C 4 \+ N 6\) .* holds 10",
    ):
        TaskStream("echo", Echo(), MODALITIES, row_length=10).prepare(example, draw)  # type: ignore[arg-type]


def test_a_sample_too_long_is_cut_by_whole_blocks_if_so_configured(tmp_path):
    (raw,) = read_shards(write(tmp_path / "s.tar", {"0": {"txt": b"abcdefgh"}}))
    example, draw = Example(raw, MODALITIES), generator(0)

    def cut(row_length: int) -> tuple[list[int], bool]:
        stream = TaskStream("echo", Echo(), MODALITIES, row_length, "truncate")  # type: ignore[arg-type]
        observations, truncated = stream.prepare(example, draw)
        return observations["C"].tolist(), truncated

    whole = [ord(c) for c in "bcdefgh"] + [0]
    # P, four blocks of N, and C without its last
    assert cut(15) == (whole, False)
    assert cut(14) == (whole[:6], True)
    assert cut(3) == (whole[:2], True)
    with pytest.raises(ValueError, match=r"15 latents .* a row holds 2"):
        cut(2)


def test_a_stream_needs_its_modality():
    with pytest.raises(ValueError, match="task echo needs the modality letters"):
        TaskStream("echo", Echo(), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="asks for the modality sound"):
        ItemStream("s", "sound", MODALITIES)


def test_fixed_examples_are_the_first_good_ones(tmp_path, caplog):
    stream = ItemStream("v", "letters", MODALITIES)
    found = fixed_examples(source(tmp_path, "s", 6, bad=2), stream, 3)
    assert [(p.key, p.slot) for p in found] == [("0002", 0), ("0003", 1), ("0004", 2)]
    assert "skipped 2 bad" in caplog.text
    with pytest.raises(ValueError, match="has no usable example"):
        fixed_examples(source(tmp_path, "all_bad", 2, bad=2), stream, 3)


# ---- the mixture -------------------------------------------------------------------------------


def test_each_epoch_visits_each_example_once_in_its_own_order(tmp_path):
    m = mixture([feed(source(tmp_path, "s", 20))])
    keys = [p.key for step in range(15) for p in batch(m, step)]
    epochs = [keys[i : i + 20] for i in range(0, 60, 20)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_is_a_function_of_seed_stage_and_step(tmp_path):
    s = source(tmp_path, "s", 50)
    feeds = [feed(s, "a"), feed(s, "b")]
    runs = [[summary(m, i) for i in range(5)] for m in (mixture(feeds), mixture(feeds))]
    assert runs[0] == runs[1]
    other = Mixture(feeds, batch_size=4, seed=4, stage="joint")
    assert runs[0] != [summary(other, i) for i in range(5)]


def test_a_resumed_run_continues_exactly(tmp_path):
    feeds = [feed(source(tmp_path, "s", 10, bad=1), "a"), feed(source(tmp_path, "t", 7), "b", 2.0)]
    through = mixture(feeds, max_bad_share=0.5)
    batches = [summary(through, i) for i in range(12)]
    for stop in (1, 5, 11):
        first, second = (mixture(feeds, max_bad_share=0.5) for _ in range(2))
        for i in range(stop):
            first.batch(i)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [summary(second, i) for i in range(stop, 12)] == batches[stop:]
        assert second.state_dict() == through.state_dict()


def test_a_state_of_other_data_is_refused(tmp_path):
    state = mixture([feed(source(tmp_path, "s", 10))]).state_dict()
    with pytest.raises(ValueError, match="has 9 examples and had 10 when"):
        mixture([feed(source(tmp_path, "s", 9))]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"had the streams \['a'\], found \['b'\]"):
        mixture([feed(source(tmp_path, "s", 10), "b")]).load_state_dict(state)


def test_streams_are_drawn_by_ratio(tmp_path):
    s = source(tmp_path, "s", 10)
    m = mixture([feed(s, "a", 3.0), feed(s, "none", 0.0), feed(s, "b", 1.0)], batch_size=100)
    drawn = Counter(p.stream for step in range(20) for p in batch(m, step))
    assert set(drawn) == {"a", "b"}
    assert drawn["a"] / 2000 == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize(
    ("ratios", "words"),
    [((0.0, 0.0), "above 0"), ((2.0, -1.0), "found -1"), ((1.0, float("nan")), "found nan")],
)
def test_ratios_must_make_sense(tmp_path, ratios, words):
    s = source(tmp_path, "s", 2)
    with pytest.raises(ValueError, match=words):
        mixture([feed(s, name, ratio) for name, ratio in zip("ab", ratios, strict=True)])
    with pytest.raises(ValueError, match="different names"):
        mixture([feed(s), feed(s)])


def test_bad_examples_are_replaced_counted_and_reported(tmp_path, caplog):
    m = mixture([feed(source(tmp_path, "s", 20, bad=2))], batch_size=5, max_bad_share=0.2)
    with caplog.at_level(logging.WARNING):
        keys = [p.key for step in range(12) for p in batch(m, step)]
    for epoch in (keys[0:20], keys[20:40], keys[40:60]):
        assert set(epoch) == {f"{i:04}" for i in range(2, 20)}
    first = "replacing a bad example, the first of this epoch: shard"
    messages = [r.message for r in caplog.records]
    assert [m.startswith(first) for m in messages] == [True, False, True, False, True]
    assert messages[1].startswith("source s, stream a, epoch 0: replaced ")
    assert "s.tar, example 000" in caplog.text
    assert m.bad >= 6


def test_a_bad_example_moves_no_other(tmp_path):
    good, some = source(tmp_path, "good", 40), source(tmp_path, "some", 40, bad=2)
    one, other = (keys(mixture([feed(s)], max_bad_share=0.2), 10) for s in (good, some))
    assert sum(a != b for a, b in zip(one, other, strict=True)) == 2


def test_too_many_bad_examples_are_an_error(tmp_path):
    m = mixture([feed(source(tmp_path, "s", 20, bad=3))], max_bad_share=0.1)
    with pytest.raises(ValueError, match=r"source s has too many bad .*: 3 of 20.*example 000"):
        list(map(m.batch, range(5)))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nothing_but_bad_examples_is_an_error_not_a_loop(tmp_path, share):
    m = mixture([feed(source(tmp_path, "s", 20, bad=20))], max_bad_share=share)
    with pytest.raises(ValueError, match="too many bad examples"):
        m.batch(0)


# ---- windows, processes, workers -----------------------------------------------------------------


def shards(folder: Path, sizes: list[int]) -> Source:
    """Shards of so many examples, whose keys begin with the number of the shard."""
    urls = [
        write(folder / f"w{n}.tar", {f"{n}-{i}": {"txt": b"x"} for i in range(size)})
        for n, size in enumerate(sizes)
    ]
    return Source("w", urls)


def test_an_epoch_goes_through_windows_of_whole_shards(tmp_path):
    s = shards(tmp_path, [3, 4, 5, 2, 6])
    order = Order(s, "a", 0, shuffle_buffer=6)
    epochs = []
    for _ in range(2):
        visited = [order.next().key for _ in range(20)]
        assert len(set(visited)) == 20
        epochs.append(visited)
    assert epochs[0] != epochs[1]
    # a new shard is opened only when those of the window are used up
    for visited in epochs:
        numbers = [int(key.partition("-")[0]) for key in visited]
        at = {n: [i for i, m in enumerate(numbers) if m == n] for n in set(numbers)}
        spans = {n: (min(places), max(places)) for n, places in at.items()}
        assert sum(last - first + 1 for first, last in spans.values()) <= 20 + 3 * 11


def test_a_source_in_one_window_is_permuted_as_a_whole(tmp_path):
    s = shards(tmp_path, [3, 4, 5])
    one, same, windowed = (
        [order.next().key for _ in range(24)]
        for order in (Order(s, "a", 0, 12), Order(s, "a", 0, 10**6), Order(s, "a", 0, 4))
    )
    assert one == same != windowed


@pytest.mark.parametrize("buffer", [1, 5, 100])
def test_any_place_in_the_order_can_be_continued(tmp_path, buffer):
    s = shards(tmp_path, [3, 4, 5, 2])
    through = Order(s, "a", 1, buffer)
    taken, states = [], []
    for _ in range(40):
        states.append(through.state_dict())
        taken.append(through.next().key)
    for start in range(0, 40, 3):
        resumed = Order(s, "a", 1, buffer)
        resumed.load_state_dict(json.loads(json.dumps(states[start])))
        assert [resumed.next().key for _ in range(start, 40)] == taken[start:]


def test_only_the_shards_of_a_window_are_indexed(tmp_path):
    s = shards(tmp_path, [5] * 6)
    order = Order(s, "a", 0, shuffle_buffer=5)
    order.next()
    assert order._coming is not None
    order._coming.result()
    assert len(s._indexed) == 2


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_what_one_would_do_alone(tmp_path, processes):
    feeds = [feed(source(tmp_path, "s", 20, bad=1), "a"), feed(source(tmp_path, "t", 15), "b")]
    options: Any = {"batch_size": 6, "max_bad_share": 0.2}
    alone = mixture(feeds, **options)
    parts = [mixture(feeds, **options, process=i, processes=processes) for i in range(processes)]
    for step in range(8):
        whole = summary(alone, step)
        shared = [summary(part, step) for part in parts]
        assert all(len(part) == 6 // processes for part in shared)
        assert sorted(chain(*shared), key=lambda p: p[2]) == whole


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_and_do_not_run_ahead_of_the_state(tmp_path, workers):
    feeds = [feed(source(tmp_path, "s", 20, bad=1), "a"), feed(shards(tmp_path, [3, 4]), "b")]
    options: Any = {"max_bad_share": 0.2, "shuffle_buffer": 4}
    inline, ahead = mixture(feeds, **options), mixture(feeds, **options, workers=workers)
    for step in range(9):
        assert summary(ahead, step) == summary(inline, step)
        assert ahead.state_dict() == inline.state_dict()
    resumed = mixture(feeds, **options, workers=workers)
    resumed.load_state_dict(ahead.state_dict())
    assert summary(resumed, 9) == summary(inline, 9)
    before = len(multiprocessing.active_children())
    for m in (ahead, resumed):
        m.close()
    assert len(multiprocessing.active_children()) == before - 2 * workers


def test_several_processes_allow_for_chance_in_what_each_meets(tmp_path):
    """With 10% bad, a limit of 1% is passed on each of 8 processes, and one of 20% on none."""
    s = source(tmp_path, "s", 2000, bad=200)
    for process in range(8):
        options: Any = {"batch_size": 8, "process": process, "processes": 8}
        with pytest.raises(ValueError, match="too many bad examples"):
            keys(mixture([feed(s)], **options, max_bad_share=0.01), 250)
        keys(mixture([feed(s)], **options, max_bad_share=0.2), 250)


# ---- prefetching -------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_prefetching_changes_nothing(tmp_path, depth):
    feeds = [feed(source(tmp_path, "s", 10))]

    def run(depth: int) -> list[Any]:
        m = mixture(feeds)
        steps = prefetch(lambda step: (summary(m, step), m.state_dict()), 2, 9, depth)
        return list(steps)

    ahead = run(depth)
    assert ahead == run(0)
    # the state that comes with a batch is the one after that batch, not after those made ahead
    resumed = mixture(feeds)
    resumed.load_state_dict(ahead[3][1])
    assert summary(resumed, 6) == ahead[4][0]


def test_prefetching_runs_ahead_by_the_depth_and_stops_when_told():
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step

    threads = threading.active_count()
    with closing(prefetch(make, 0, 1000, depth=3)) as steps:
        assert [next(steps), next(steps)] == [0, 1]
    assert len(made) <= 5
    assert threading.active_count() == threads


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_arrives_at_its_step(depth):
    steps = prefetch(lambda i: 1 // (3 - i), 0, 10, depth)
    assert [next(steps) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(steps)


def test_a_negative_depth_is_refused():
    with pytest.raises(ValueError, match="found -1"):
        next(prefetch(str, 0, 1, -1))
