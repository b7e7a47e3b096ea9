"""Packing and checking: what was put in comes out, and what is found is what was planted."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import types
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from PIL import Image

from unified import cli, shortcuts
from unified.config.loading import load_config
from unified.config.registry import resolve
from unified.data import members
from unified.data.examples import Example
from unified.data.shards import read_shards
from unified.data.tools import check_text as report
from unified.data.tools.check import check_config, check_shards, scan
from unified.data.tools.inputs import open_input
from unified.data.tools.pack import pack, write_shard

SCRIPTS = {
    "arabic": "قطة حمراء على سجادة",
    "chinese": "一只红色的猫",
    "devanagari": "लाल बिल्ली",
    "emoji": "🐈‍⬛ a cat",
}
GIGANTIC = "a cat and " * 20_000


KINDS = {name: resolve("modality", name) for name in ("text", "image")}


def opened(source: Path, image: str | None, text: str | None, *items: str, **columns: str) -> Any:
    """`source` with an image column and a text column, and what else is named."""
    return open_input(source, KINDS, shortcuts.columns(image, text) | columns, items)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def odd_images() -> dict[str, bytes]:
    """Images that are unusual and good, by file name."""
    red, blue = (Image.new("RGB", (32, 16), colour) for colour in ("red", "blue"))
    frames = {"save_all": True, "append_images": [blue]}
    exif = Image.Exif()
    exif[members.ORIENTATION] = 6
    return {
        "cmyk.jpg": encoded(Image.new("CMYK", (32, 16)), "JPEG"),
        "deep.png": encoded(Image.new("I;16", (32, 16), 40_000), "PNG"),
        "moving.gif": encoded(red, "GIF", **frames),
        "moving.webp": encoded(red, "WEBP", **frames),
        "turned.JPG": encoded(red, "JPEG", exif=exif),
        "glass.png": encoded(Image.new("RGBA", (32, 16), (9, 9, 9, 0)), "PNG"),
    }


def bomb() -> bytes:
    """A PNG of a few kB whose header promises more pixels than any limit."""
    data = bytearray(tiny.as_png(Image.new("L", (8, 8))))
    data[16:24] = (9_000).to_bytes(4) * 2
    return bytes(data[:29]) + zlib.crc32(data[12:29]).to_bytes(4) + bytes(data[33:])


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Good images with texts in many scripts, and one of every kind of bad file."""
    image = tiny.as_png(tiny.square(tiny.CAPTIONS[0]))
    files: dict[str, bytes | str] = {}
    for folder, (name, data) in zip("abcdef", odd_images().items(), strict=True):
        files |= {f"{folder}/{name}": data, f"{folder}/{Path(name).stem}.txt": f"a {name}"}
    for name, text in SCRIPTS.items():
        files |= {f"scripts/{name}.png": image, f"scripts/{name}.txt": text}
    files |= {"big.png": image, "big.txt": GIGANTIC, "big.json": '{"a": 1}'}
    files |= {
        "bad/empty.png": b"",
        "bad/cut.png": image[: len(image) // 2],
        "bad/lonely.txt": "no image",
        "bad/latin.png": image,
        "bad/latin.txt": b"caf\xe9",
        "bad/json.png": image,
        "bad/json.json": "[1]",
        "bad/bomb.png": bomb(),
        "bad/two.png": image,
        "bad/two.webp": image,
        "bad/old.bmp": encoded(Image.new("RGB", (8, 8)), "BMP"),
        "bad/old.txt": "an old format",
        "bad/words.png": "hello",
        ".hidden/x.png": b"x",
    }
    return fill(tmp_path / "pictures", files)


LEFT_OUT = {
    "bad/empty": r".png: it is empty",
    "bad/cut": r"PNG image is damaged",
    "bad/lonely": "it has no image",
    "bad/latin": r".txt: it should be text in UTF-8",
    "bad/json": r".json: it should hold an object, found list",
    "bad/bomb": "9000 x 9000 is above the limit of 64,000,000 pixels",
    "bad/two": "it has 2 images: two.png, two.webp",
    "bad/old": "old.bmp is none of .webp, .png",
    "bad/words": "5 bytes are no WebP, PNG, JPEG or GIF",
}


def packed_shards(out: Path) -> list[Path]:
    return sorted(out.glob("*"))


# ---- packing -----------------------------------------------------------------------------------


def test_a_folder_is_packed_and_what_is_bad_is_named(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = pack(opened(pictures, None, None), out, shard_size=4, val_share=0)
    assert {b.name for b in told.left_out} == set(LEFT_OUT)
    for bad in told.left_out:
        assert LEFT_OUT[bad.name] in bad.reason
    assert told.examples == {"train": 11, "val": 0}
    assert told.shards["train"] == [f"train-0000{i}.tar" for i in range(3)]
    assert [p.name for p in packed_shards(out)] == told.shards["train"]
    found = read_shards([str(p) for p in packed_shards(out)])
    assert len({e.key for e in found}) == 11
    assert all(len(e.key) == 9 for e in found)
    texts = {e.members["txt"].decode() for e in found}
    assert texts >= {GIGANTIC, *SCRIPTS.values()}
    images = {data for e in found for end, data in e.members.items() if end in members.IMAGES}
    assert images >= set(odd_images().values())
    assert told.bytes == sum(len(data) for e in found for data in e.members.values())


def test_what_was_packed_is_good_for_training(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(opened(pictures, None, None), out, val_share=0)
    shard = str(out / "train-00000.tar")
    image = {**tiny.IMAGE, "max_size": 64}
    config = tiny.config(shard=shard, modalities={"text": tiny.TEXT, "image": image})
    (found,) = check_config(config, workers=1)
    assert found.found.bad == []
    assert set(found.found.usable.values()) == {11}
    assert set(found.found.usable) == {
        *(f"task {name}" for name in tiny.TASKS),
        "stage text_vae",
        "stage image_vae",
    }
    model = tiny.pipeline(config)
    for raw in read_shards(shard):
        example = Example(raw, model.modalities)
        assert example["image"].mode == "RGB"
        model.modalities["image"].observe(example["image"])
    assert found.found.sizes[16, 32] == 1  # the image that EXIF turns upright


def test_the_same_input_gives_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    source = opened(pictures, None, None)
    runs = [
        {**{"shard_size": 3, "val_share": 0.3, "shuffle": seed}, "workers": workers}
        for seed, workers in ((None, 1), (None, 3), (5, 1), (5, 3))
    ]
    made = []
    for i, options in enumerate(runs):
        pack(source, tmp_path / str(i), **options)
        made.append({p.name: p.read_bytes() for p in packed_shards(tmp_path / str(i))})
    assert made[0] == made[1]
    assert made[2] == made[3]
    assert made[0] != made[2]
    with tarfile.open(tmp_path / "0" / "train-00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}


def test_keys_and_splits_stay_when_others_are_added_or_the_order_changes(tmp_path: Path) -> None:
    def split(name: str, count: int, **options: Any) -> dict[str, dict[bytes, str]]:
        table = tmp_path / f"{name}.jsonl"
        table.write_text("".join(f'{{"t": "text {i}"}}\n' for i in range(count)))
        told = pack(opened(table, None, "t"), tmp_path / name, val_share=0.3, **options)
        return {
            s: {e.members["txt"]: e.key for e in read_shards([f"{tmp_path}/{name}/{x}" for x in n])}
            for s, n in told.shards.items()
        }

    few, shuffled, many = split("few", 60), split("s", 60, shuffle=1), split("many", 90)
    assert 5 < len(few["val"]) < 30
    assert few == shuffled
    for name in ("train", "val"):
        assert few[name].items() <= many[name].items()


def test_shards_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", {f"{i}.txt": str(i) for i in range(6)})
    out = tmp_path / "out"
    pack(opened(source, None, None), out, shard_size=1, val_share=0)
    before = {p.name: p.read_bytes() for p in packed_shards(out)}
    with pytest.raises(ValueError, match=r"out holds shards already \(train-00000.tar\)"):
        pack(opened(source, None, None), out)
    assert {p.name: p.read_bytes() for p in packed_shards(out)} == before
    pack(opened(source, None, None), out, shard_size=4, val_share=0, overwrite=True)
    assert [p.name for p in packed_shards(out)] == ["train-00000.tar", "train-00001.tar"]
    assert len(read_shards(f"{out}/train-{{00000..00001}}.tar")) == 6


def test_a_shard_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = tmp_path / "s.tar"
    write_shard(shard, [("0", {"txt": b"old"})])
    old = shard.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("webdataset.writer.TarWriter.write", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(shard, [("0", {"txt": b"new"})])
    assert packed_shards(tmp_path) == [shard]
    assert shard.read_bytes() == old


def test_a_table_names_its_columns(tmp_path: Path) -> None:
    image = tiny.as_png(tiny.square(tiny.CAPTIONS[0]))
    fill(tmp_path, {"secret.png": image, "t/images/a.png": image, "t/images/notes.md": "x"})
    rows: list[Any] = [
        {"file": "images/a.png", "caption": "a cat", "year": 1999, "tags": ["x", "é"]},
        {"file": "../secret.png", "caption": "out"},
        {"file": str(tmp_path / "secret.png"), "caption": "out"},
        {"file": "images/b.png", "caption": "gone"},
        {"file": "images/notes.md", "caption": "no image"},
        {"file": None, "caption": "none"},
        {"file": "images/a.png", "caption": 3},
        {"file": "images/a.png"},
        [1],
    ]
    text = "\n\n".join(json.dumps(row) for row in rows) + "\n{broken\n"
    table = fill(tmp_path / "t", {"t.jsonl": text}) / "t.jsonl"
    told = pack(opened(table, "file", "caption"), tmp_path / "out", val_share=0)
    (example,) = read_shards(str(tmp_path / "out" / "train-00000.tar"))
    assert example.key == "000000000"
    assert example.members["png"] == image
    assert example.members["txt"] == b"a cat"
    assert json.loads(example.members["json"]) == {"year": 1999, "tags": ["x", "é"]}
    reasons = {b.name: b.reason for b in told.left_out}
    for line, words in {
        3: "leaves the table's folder",
        5: "leaves the table's folder",
        7: "No such file",
        9: "images/notes.md is no image",
        11: "column file should be a path or bytes, found None",
        13: "column caption should be a text, found 3",
        15: "it has no column 'caption'; known: file",
        17: "should be an object, found list",
        18: "it is no JSON",
    }.items():
        assert words in reasons[f"line {line}"]
    assert len(reasons) == 9


def test_a_parquet_table_may_hold_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "t.parquet"
    table.touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"t\.parquet: parquet needs pyarrow; pip install pyarrow"):
        opened(table, "image", None)
    images = odd_images()
    rows = [{"image": images["turned.JPG"], "n": 1}, {"image": {"bytes": images["moving.gif"]}}]
    arrow = types.ModuleType("pyarrow")
    arrow.parquet = types.SimpleNamespace(read_table=lambda path: _Table(rows))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    pack(opened(table, "image", None), tmp_path, val_share=0)
    first, second = read_shards(str(tmp_path / "train-00000.tar"))
    assert first.members == {"jpg": images["turned.JPG"], "json": b'{"n": 1}'}
    assert second.members == {"gif": images["moving.gif"]}


class _Table:
    """What packing asks of a pyarrow.Table."""

    def __init__(self, rows: list[dict[str, Any]]):
        self._rows, self.num_rows = rows, len(rows)

    def slice(self, start: int, length: int) -> _Table:
        return _Table(self._rows[start : start + length])

    def to_pylist(self) -> list[dict[str, Any]]:
        return self._rows


@pytest.mark.parametrize(
    ("name", "columns", "says"),
    [
        ("nowhere", (None, None), "nowhere was not found: name a folder, a .jsonl or a .parquet"),
        ("t.csv", (None, "t"), "should be a folder, or a table in .jsonl or .parquet"),
        ("t.jsonl", (None, None), "say which column of .*: --image-column, --text-column"),
        ("folder", ("x", None), "is a folder and has no column 'x': drop the option"),
        ("folder", (None, None), "nothing can be packed, of 0 examples"),
        ("t.jsonl", (None, "u"), "of 1 examples: line 1: it has no column 'u'; did you mean t|kno"),
    ],
)
def test_what_cannot_be_packed_is_told(
    tmp_path: Path, name: str, columns: tuple[str | None, str | None], says: str
) -> None:
    fill(tmp_path, {"t.csv": "t\n", "t.jsonl": '{"t": "x"}\n', "folder/.keep": ""})
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        pack(opened(tmp_path / name, *columns), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_may_hold_further_items_by_name(tmp_path: Path) -> None:
    red, blue = (encoded(Image.new("RGB", (32, 32), colour), "PNG") for colour in ("red", "blue"))
    files: dict[str, bytes | str] = {"cat.png": red, "cat.Source.webp": blue, "cat.txt": "as art"}
    files |= {"dog.png": red, "dog.source.txt": "what it was", "dog.old.source.png": blue}
    files |= {"two.png": red, "two.source.png": red, "two.source.webp": blue}
    files |= {"bad.png": red, "bad.source.png": b"no image", "only.source.png": red}
    folder = fill(tmp_path / "in", files)
    told = pack(opened(folder, None, None, "source", "old.source"), tmp_path / "out", val_share=0)
    cat, dog = read_shards(str(tmp_path / "out" / "train-00000.tar"))
    assert cat.members == {"png": red, "source.webp": blue, "txt": b"as art"}
    assert dog.members == {"png": red, "source.txt": b"what it was", "old.source.png": blue}
    reasons = {b.name: b.reason for b in told.left_out}
    assert reasons.pop("bad").startswith(".source.png: 8 bytes are no WebP")
    assert reasons == {
        "two": "it has 2 source.images: two.source.png, two.source.webp",
        "only": "it has no image",
    }
    pack(
        opened(folder, None, None), tmp_path / "plain", val_share=0
    )  # names that are not asked for
    plain = read_shards(str(tmp_path / "plain" / "train-00000.tar"))
    assert {b"as art", None} == {e.members.get("txt") for e in plain}
    assert not [e for e in plain if any("." in ending for ending in e.members)]


def test_a_table_may_hold_further_items_by_name(tmp_path: Path) -> None:
    image = tiny.as_png(tiny.square(tiny.CAPTIONS[0]))
    row = {"was": "a.png", "is": "b.png", "told": "as art", "why": "no reason", "year": 3}
    table = fill(tmp_path, {"a.png": image, "b.png": image, "t.jsonl": json.dumps(row)}) / "t.jsonl"
    columns = {"source.image": "was", "why.text": "why"}
    pack(opened(table, "is", "told", **columns), tmp_path / "out", val_share=0)
    (example,) = read_shards(str(tmp_path / "out" / "train-00000.tar"))
    assert set(example.members) == {"png", "txt", "source.png", "why.txt", "json"}
    assert json.loads(example.members["json"]) == {"year": 3}
    with pytest.raises(ValueError, match=r"no modality holds 'source.sound'; known: image, text"):
        opened(table, None, None, **{"source.sound": "was"})
    with pytest.raises(ValueError, match=r"say which column of .* or --item NAME.MODALITY=COLUMN"):
        opened(table, "is", None, "source")
    with pytest.raises(ValueError, match=r"an item's name has small letters, .* found 'So/x'"):
        opened(tmp_path, None, None, "So/x")


def test_checking_understands_named_items(tmp_path: Path) -> None:
    image = tiny.as_png(tiny.square(tiny.CAPTIONS[0]))
    good = {"png": image, "source.png": image, "txt": b"as art"}
    shard = str(tmp_path / "s.tar")
    lame = good | {"source.png": image[: len(image) // 2]}
    plain = {"png": image, "txt": b"a cat"}
    write_shard(Path(shard), [("0", good), ("1", lame), ("2", plain), ("3", good | {"w.txt": b""})])
    (found,) = check_shards([shard], workers=1)
    assert [(b.key, b.reason) for b in found.found.bad] == [("3", ".w.txt: it is empty (0 bytes)")]
    assert found.found.members["source.png"] == 3
    assert sum(found.found.sizes.values()) == 7
    tasks = {"editing": {"type": "editing", "source": "s"}, **tiny.TASKS}
    (found,) = check_config(tiny.config(shard=shard, tasks=tasks), workers=1)
    assert found.found.usable["task editing"] == 2
    assert found.found.usable["task captioning"] == 4
    told = {b.key: b.reason for b in found.found.bad}
    assert "damaged" in told["1"]
    assert told["2"].startswith("no good for task editing: editing needs an example with 'source.")


def test_a_modality_of_a_configuration_says_what_an_item_is(tmp_path: Path, capsys: Any) -> None:
    fill(tmp_path, {"m.py": NOTE, "m.yaml": NOTES, "in/a.note": "abc", "in/a.txt": "three"})
    fill(tmp_path, {"in/b.note": "", "in/c.note": "xyz", "in/c.txt": "x", "in/d.txt": "alone"})
    fill(tmp_path, {"in/a.low.note": "cba", "in/e.note": "12"})
    command = [
        "data",
        "pack",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--json",
        "--item",
        "low",
    ]
    asked = ["--config", str(tmp_path / "m.yaml"), "--trust-remote-code", "--val-share", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(SystemExit) as end:
            cli.main([*command, *asked])
    assert not end.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["examples"] == {"train": 2, "val": 0}
    reasons = {b["name"]: b["reason"] for b in told["left_out"]}
    assert reasons["b"] == ".note: it is empty (0 bytes)"
    assert reasons["d"] == "it has no note"
    assert reasons["e"] == "a note has three letters, found 2"
    first, _ = read_shards(str(tmp_path / "out" / "train-00000.tar"))
    assert first.members == {"low.note": b"cba", "note": b"abc", "txt": b"three"}


NOTE = """
from unified.modalities.text.modality import TextModality

class Note(TextModality):
    extensions, is_text = ("note",), False

    def read(self, data):
        if len(data) != 3:
            raise ValueError(f"a note has three letters, found {len(data)}")
        return data.decode()
"""
NOTES = yaml.safe_dump(
    {
        "modalities": {"text": tiny.TEXT, "note": {**tiny.TEXT, "type": "m:Note"}},
        "tasks": {},
        "data": {},
    }
)

# ---- checking ----------------------------------------------------------------------------------


def damaged(folder: Path) -> tuple[list[str], Counter[tuple[str, str, str]]]:
    """Shards with one of every fault, and each fault as (shard, key, words of the reason)."""
    image = tiny.as_png(tiny.square(tiny.CAPTIONS[0]))
    whole = tiny.write_shard(folder / "whole.tar", tiny.squares())
    data = Path(whole).read_bytes()
    (folder / "cut.tar").write_bytes(data[:2000])
    other = [(f"other-{name}", data) for name, data in tiny.squares()]
    data = Path(tiny.write_shard(folder / "header.tar", other)).read_bytes()
    (folder / "header.tar").write_bytes(data[:3072] + b"x" * 512 + data[3584:])
    (folder / "empty.tar").touch()
    (folder / "text.tar").write_text("hello " * 200)
    members = [
        ("a.png", image), ("a.txt", b"good"),
        ("b.png", b""), ("b.txt", b"an image of no bytes"),
        ("c.png", image[:60]), ("c.txt", b"an image that is cut"),
        ("d.png", image), ("d.txt", b"caf\xe9"),
        ("e.png", image), ("e.txt", b"json"), ("e.json", b"{"),
        ("f.png", image),
        ("g.txt", b"no image"),
        ("h.png", image), ("h.txt", b"one"), ("h.txt", b"two"),
        ("a.png", image), ("a.txt", b"again"),
        ("i.png", bomb()), ("i.txt", b"huge"),
        ("j.png", b"not an image"), ("j.txt", b"words"),
    ]  # fmt: skip
    tiny.write_shard(folder / "bad.tar", members)
    tiny.write_shard(folder / "twice.tar", [("a.png", image), ("a.txt", b"elsewhere")])
    names = ["whole", "cut", "header", "empty", "text", "bad", "twice", "gone"]
    planted = {
        ("cut", "", "damaged, cut short"): 1,
        ("header", "", "no end mark at byte 3072"): 1,
        ("empty", "", "damaged, cut short"): 1,
        ("text", "", "damaged, cut short"): 1,
        ("gone", "", "there is no file"): 1,
        ("bad", "b", ".png: it is empty (0 bytes)"): 1,
        ("bad", "d", ".txt: it should be text in UTF-8"): 1,
        ("bad", "e", ".json: it is no JSON"): 1,
        ("bad", "h", "it has 2 .txt members"): 1,
        ("bad", "a", "the key comes again"): 1,
        ("bad", "i", "pixels"): 1,
        ("bad", "j", ".png: 12 bytes are no WebP"): 1,
        ("twice", "", "1 of its keys are also in"): 1,
    }
    return [str(folder / f"{name}.tar") for name in names], Counter(planted)


#: what only a configuration can say
NEEDED = {
    ("bad", "c", "is damaged and cannot be decoded"): 1,
    ("bad", "f", "no good for task continuation, task captioning, task text_to_image, stage"): 1,
    ("bad", "g", "no good for task captioning, task text_to_image, stage image_vae: captio"): 1,
}


def matched(found: list[Any], planted: Counter[tuple[str, str, str]]) -> Counter[Any]:
    """Findings as the planted faults whose words they have; others as themselves."""
    told = []
    for bad in found:
        about = (Path(bad.shard).stem, bad.key)
        told.append(
            next(
                (p for p in planted if p[:2] == about and p[2] in bad.reason), (*about, bad.reason)
            )
        )
    return Counter(told)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_found_is_what_was_planted(tmp_path: Path, workers: int) -> None:
    urls, planted = damaged(tmp_path)
    (told,) = check_shards(urls, workers)
    assert matched(told.found.bad, planted) == planted
    assert [told.found.examples[url] for url in urls] == [6, 0, 1, 0, 0, 11, 1, 0]


def test_a_configuration_also_says_what_is_missing(tmp_path: Path) -> None:
    urls, planted = damaged(tmp_path)
    planted += Counter(NEEDED)
    source = {"train": [str(tmp_path / "{whole,bad}.tar")], "val": urls[6:7]}
    tree = tiny.tree(data={"sources": {"s": source}})
    train, val = check_config(tiny.Config.model_validate(tree), workers=1)
    there = Counter(p for p in planted if p[0] in ("whole", "bad"))
    assert matched(train.found.bad, planted) == there
    assert val.found.bad == []  # a key of train may come again in val
    pairs, texts, images = ("a", "e", "h", "a"), ("b", "c", "g", "i", "j"), ("d", "f")
    usable = train.found.usable
    assert usable["task captioning"] == usable["task text_to_image"] == 6 + len(pairs)
    assert usable["task continuation"] == usable["stage text_vae"] == 6 + len(pairs + texts)
    assert usable["stage image_vae"] == 6 + len(pairs + images)


def test_questions_are_needed_where_a_task_asks_them(tmp_path: Path) -> None:
    image = tiny.as_png(tiny.square(tiny.CAPTIONS[0]))
    members = [("0.png", image), ("0.json", b'{"q": "?", "a": "!"}'), ("1.png", image)]
    shard = tiny.write_shard(tmp_path / "s.tar", members)
    vqa = {"type": "captioning", "source": "s", "question": "q", "answer": "a"}
    (told,) = check_config(tiny.config(shard=shard, tasks={"vqa": vqa}, stages=[]), workers=1)
    assert told.found.usable == {"task vqa": 1}
    (bad,) = told.found.bad
    assert (bad.key, bad.reason) == (
        "1",
        "no good for task vqa: captioning needs a .json with the field 'q', found nothing",
    )


def test_every_embedded_shard_is_good() -> None:
    told = {s.split: s.found for s in check_config(load_config("quickstart"), workers=1)}
    assert not [found.bad for found in told.values() if found.bad]
    assert told["val-style"].examples == {"embedded:emoji/val-style-00000.tar": 60}


def test_a_report_counts(tmp_path: Path) -> None:
    sizes = [(64, 64), (127, 127), (128, 128), (640, 360), (300, 100)]
    members = []
    for i, size in enumerate(sizes):
        members += [(f"{i}.PNG", tiny.as_png(Image.new("1", size))), (f"{i}.txt", b"w " * (i + 1))]
    (told,) = check_shards([tiny.write_shard(tmp_path / "s.tar", members)], workers=1)
    data = report.as_json(told, batch_size=2, ranks=2)
    assert data["members"] == {"png": 5, "txt": 5}
    assert data["image_sides"] == {"64-127": 2, "128-255": 2, "256-511": 1}
    assert data["image_shapes"] == {"1:1": 3, "16:9": 1, "3:1": 1}
    assert data["text_words"] == {"min": 1, "median": 3, "p95": 5, "max": 5}
    assert data["text_characters"] == {"min": 2, "median": 6, "p95": 10, "max": 10}
    assert data["examples_per_shard"] == dict.fromkeys(("min", "median", "p95", "max"), 5)
    assert data["epoch"] == {"steps": 2, "examples_per_rank": 1, "remainder": 1}
    assert data["bytes"] == (tmp_path / "s.tar").stat().st_size
    json.dumps(data)


def test_a_shard_is_scanned_as_training_reads_it(tmp_path: Path) -> None:
    files = [("dir.x/0.TXT", b"a"), ("dir.x/0.seg.bin", b"b"), ("noending", b"c"), ("1.txt", b"d")]
    url = tiny.write_shard(tmp_path / "s.tar", files)
    seen: list[Any] = []
    told = scan(url, lambda raw: (seen.append(raw), ([], []))[1])  # type: ignore[func-returns-value]
    assert seen == read_shards(url)
    assert told.bad == []


# ---- the command line --------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code, *capsys.readouterr()


def test_pack_then_check(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, _ = run(capsys, "data", "pack", str(pictures), str(out), "--val-share", "0")
    assert code == 0
    assert "train: 11 examples in 1 shard\n" in printed
    assert "left out: 9\n" in printed
    assert all(f"  {name}: " in printed for name in LEFT_OUT)
    shard = str(out / "train-00000.tar")
    code, printed, _ = run(
        capsys, "data", "check", shard, "--workers", "1", "--batch-size", "4", "--ranks", "2"
    )
    assert code == 0
    assert "2 steps of 4 examples, 2 on each of 2 ranks, and 3 that share a step" in printed
    assert "Every rank trains on the same number of examples" in printed
    assert printed.endswith("nothing bad\n")


def test_check_fails_where_something_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls, planted = damaged(tmp_path)
    code, printed, _ = run(capsys, "data", "check", *urls, "--workers", "1", "--json")
    assert code == 1
    told = json.loads(printed)
    assert told["bad"] == len(told["sources"][0]["bad"]) == planted.total()
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump(tiny.tree(shard=urls[0])))
    check = ("data", "check", str(config), "--workers", "1")
    assert run(capsys, *check)[0] == 0
    code, printed, _ = run(capsys, *check, f"data.sources.s.train=[{urls[5]}]")
    assert code == 1
    assert f"{urls[5]}, b: .png: it is empty" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("s.tar", "--ranks", "2"), "--ranks needs --batch-size"),
        (("s.tar", "--ranks", "2", "--batch-size", "3"), "a batch of 3 does not divide over 2"),
        (("quickstrt",), "no configuration 'quickstrt'"),
        (("quickstart", "tasks.captioning.questoin=q"), "did you mean tasks.captioning.question"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    code, printed, error = run(capsys, "data", "check", *arguments)
    assert (code, printed) == (2, "")
    assert error.startswith("error: ")
    assert says in error
