"""``unified tokenizer``: train one, bring one in, look at one.

The tokenizer is that of a modality which has one, found through the registry: the core imports no
plugin.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from unified.shortcuts import FIELD

#: attribute of a modality's class
TOKENIZER = "tokenizer_class"

app = typer.Typer(no_args_is_help=True, help="Byte-level BPE tokenizers.")

Output = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")]


def _class() -> Any:
    from unified.config.registry import names, resolve

    classes = (resolve("modality", name) for name in names("modality"))
    return next(getattr(cls, TOKENIZER) for cls in classes if hasattr(cls, TOKENIZER))


@app.command("train")
def train(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Text files, .jsonl files or shards.")
    ],
    vocab_size: Annotated[int, typer.Option(help="Most tokens; 258 at least.")],
    output: Output,
    field: Annotated[str, typer.Option(help="Which field of a .jsonl line is text.")] = FIELD,
) -> None:
    """Train a tokenizer on text."""
    texts = [text for text in _texts(sources, field) if text]
    if not texts:
        raise ValueError(f"there is no text in {', '.join(sources)} to train a tokenizer on")
    tokenizer = _class().train(texts, vocab_size)
    tokenizer.save(output)
    print(f"{output}: {len(tokenizer)} tokens")


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="tokenizer.json, or a tiktoken rank file.")],
    output: Output,
) -> None:
    """Make a tokenizer folder of a file; cl100k ranks get the OLMo 2 special tokens."""
    tokenizer = _class().load(source)
    tokenizer.save(output)
    print(f"{output}: {len(tokenizer)} tokens")


@app.command("show")
def show(
    source: Annotated[Path, typer.Argument(help="A tokenizer's folder or file.")],
    text: Annotated[str, typer.Option(help="The text to take apart.")],
) -> None:
    """Print the ids of a text and what each stands for."""
    from unified.tables import table

    tokenizer = _class().load(source)
    rows = [(str(i), repr(tokenizer.decode_all([i]))) for i in tokenizer.encode(text)]
    print(table(rows, "rl"))


def _texts(sources: list[str], field: str) -> Iterator[str]:
    """All texts of files (as they are), of .jsonl lines, or of the .txt members of shards."""
    from unified.data.shards import read_shards
    from unified.errors import as_text
    from unified.evaluation.benchmarks.answers import read_objects

    for source in sources:
        if source.endswith(".tar"):
            for e in read_shards(source):
                yield as_text(e.members.get("txt", b""), f"shard {source}, example {e.key}")
        elif source.endswith(".jsonl"):
            for place, row in read_objects(Path(source)):
                if not isinstance(row.get(field), str):
                    raise ValueError(f"{place} has no text in {field!r}; name another with --field")
                yield row[field]
        else:
            yield as_text(Path(source).read_bytes(), source)
