"""Tokenizers: trained, read from either kind of file, and the commands around them."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny

from unified import cli
from unified.modalities.text.tokenizer import CL100K, IM_END, Tokenizer

CORPUS = ["It is a truth universally acknowledged", "a flat emoji of a lime"] * 3


def rank_file(path: Path, count: int = CL100K) -> Path:
    """A file as tiktoken writes it: all bytes, then pairs of letters, then longer ones."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes(p) for p in itertools.product(range(256), repeat=2)]
    tokens += [b"ab" + bytes(p) for p in itertools.product(range(256), repeat=2)]
    lines = [base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens[:count])]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_cl100k_ranks_become_the_olmo_2_vocabulary(tmp_path: Path) -> None:
    made = Tokenizer.load(rank_file(tmp_path / "cl100k.tiktoken"))
    assert len(made) == 100_278
    assert (made.eos_id, made.pad_id) == (100_257, 100_277)
    found = {t: made.core.token_to_id(t) for t in ("<|im_start|>", IM_END, "<|endofprompt|>")}
    assert list(found.values()) == [100_264, 100_265, 100_276]
    assert made.end_ids == {100_257, 100_265}
    text = "abide with me: 漢字 <|endoftext|>\n"
    assert made.decode_all(made.encode(text)) == text
    assert max(made.encode(text)) < CL100K
    made.save(tmp_path / "folder")
    again = Tokenizer.load(tmp_path / "folder")
    assert again.encode(text) == made.encode(text)
    assert (len(again), again.pad_id) == (len(made), made.pad_id)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not base64! 1\n", "neither a tokenizer.json nor a tiktoken file, whose line 1"),
        (b"YQ== 0\nYg== x\n", "whose line 2 would be a token in base64 and its rank"),
        (b"YQ== 0\nYg== 1\n", "has 2 ranks, but only cl100k's are known here: 0 to 100,255"),
        (b'{"version": "1.0"}', "is no tokenizer file"),
        (b"", "has 0 ranks"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Tokenizer.load(tmp_path / "mine")


def test_a_text_ends_at_the_first_token_that_ends_it() -> None:
    made = Tokenizer.train(CORPUS, 300)
    assert made.end_ids == {made.eos_id}
    ids = made.encode("a lime")
    assert made.decode([*ids, made.pad_id, made.eos_id, *ids]) == "a lime"


def test_what_spells_special_tokens_only_is_known() -> None:
    made = Tokenizer.train(CORPUS, 300)
    assert made.special_only("<|endoftext|> <|pad|>")
    for text in ("a lime<|endoftext|>", "<|endof", " ", ""):
        assert not made.special_only(text), text


# ---- commands -----------------------------------------------------------------------------------


def run(capsys: Any, *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["tokenizer", *arguments])
    told = capsys.readouterr()
    assert end.value.code == code, told.err
    return str(told.out or told.err)


def test_train_reads_texts_lines_and_shards(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.txt").write_text(CORPUS[0])
    (tmp_path / "b.jsonl").write_text('{"said": "a flat emoji"}\n\n{"said": "a lime"}\n')
    shard = tiny.write_shard(tmp_path / "c.tar", tiny.squares())
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), shard]
    out = str(tmp_path / "out")
    told = run(capsys, "train", *sources, "--vocab-size", "290", "--output", out, "--field", "said")
    assert told == f"{out}: 290 tokens\n"
    shown = run(capsys, "show", out, "--text", "square")
    assert "".join(line.split()[1].strip("'") for line in shown.splitlines()) == "square"
    wrong = run(capsys, "train", sources[1], "--vocab-size", "290", "--output", out, code=2)
    assert "line 1, has no text in 'text'; name another with --field" in wrong
    small = run(capsys, "train", sources[0], "--vocab-size", "9", "--output", out, code=2)
    assert "vocab_size 9 is too small" in small


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\xff\xfe", "a.txt should be text in UTF-8: invalid start byte, byte 0"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl should be text in UTF-8"),
        ("a.jsonl", b"", "there is no text in"),
        ("a.txt", b"", "there is no text in"),
    ],
)
def test_a_source_without_text_is_named(
    tmp_path: Path, capsys: Any, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    output = tmp_path / "out"
    given = [str(tmp_path / name), "--vocab-size", "300", "--output", str(output)]
    assert says in run(capsys, "train", *given, code=2)
    assert not output.exists()


def test_convert_writes_a_folder(tmp_path: Path, capsys: Any) -> None:
    ranks = rank_file(tmp_path / "cl100k.tiktoken")
    told = run(capsys, "convert", str(ranks), "--output", str(tmp_path / "out"))
    assert told.endswith("100278 tokens\n")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
