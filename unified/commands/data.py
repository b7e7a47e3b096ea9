"""``unified data``: make shards, check them, and store their latents."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from unified import shortcuts
from unified.commands.options import AsJson, Trust

app = typer.Typer(no_args_is_help=True, help="Make shards, check them, store their latents.")

#: names of what was left out that are printed
SHOWN = 20


class Precision(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


ImageColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of a table: paths, or bytes, of images.")
]
TextColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Of a table: texts.")]
Items = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=COLUMN]",
        help="A further item: of a folder, source takes cat.source.png with cat.png; of a table,"
        " source.image=COLUMN. Repeatable.",
    ),
]
Modalities = Annotated[
    str | None,
    typer.Option("--config", metavar="CONFIG", help="Whose modalities say what an item is."),
]
ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="A file, or a shipped name.")]
Workers = Annotated[int | None, typer.Option(min=1, help="By default one a processor.")]


@app.command("pack")
def pack(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder, a .jsonl or a .parquet.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write shards to.")],
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    item: Items = None,
    config: Modalities = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Examples in a shard.")] = 1000,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="Write in random order.")
    ] = None,
    val_share: Annotated[float, typer.Option(min=0, max=1, help="Share held out.")] = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards in OUT.")] = False,
    workers: Workers = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make shards of a folder of images (or other items) and texts, or of a table."""
    from unified.data.tools.inputs import open_input
    from unified.data.tools.pack import pack as run

    kinds, readers = _kinds(config, trust_remote_code)
    named = dict(pair.split("=", 1) for pair in item or [] if "=" in pair)
    columns = shortcuts.columns(image_column, text_column) | named
    names = [name for name in item or [] if "=" not in name]
    packed = run(
        open_input(source, kinds, columns, names),
        out,
        readers=readers,
        shard_size=shard_size,
        shuffle=shuffle,
        val_share=val_share,
        overwrite=overwrite,
        workers=workers,
    )
    if as_json:
        print(json.dumps(asdict(packed), indent=2))
        return
    from unified.tables import size

    for split, shards in packed.shards.items():
        many = f"{len(shards):,} shard{'s' * (len(shards) != 1)}"
        print(f"{split}: {packed.examples[split]:,} examples in {many}")
    print(f"{out}: {size(packed.bytes)}; left out: {len(packed.left_out):,}")
    for left in packed.left_out[:SHOWN]:
        print(f"  {left.name}: {left.reason}")
    if len(packed.left_out) > SHOWN:
        print(f"  and {len(packed.left_out) - SHOWN:,} more; --json has all")


def _kinds(config: str | None, trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(name -> class of a modality, ending -> what reads its members): those of a configuration,
    or all that have a short name, whose members are then not looked into."""
    from unified.config.registry import names, resolve

    if config is None:
        return {name: resolve("modality", name) for name in names("modality")}, {}
    from unified.config.loading import load_config
    from unified.config.plugins import resolve_model
    from unified.data.tools.needs import without_weights

    modalities = without_weights(resolve_model(load_config(config), trust))
    readers = {e: m.read for m in modalities.values() for e in m.extensions}
    return {name: type(modality) for name, modality in modalities.items()}, readers


@app.command("encode")
def encode(
    config: ConfigName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write latents to.")],
    checkpoint: Annotated[str, typer.Option(metavar="DIR", help="Whose autoencoders to use.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    dtype: Annotated[Precision, typer.Option(help="Of the stored numbers.")] = Precision.float32,
    part: Annotated[str, typer.Option(metavar="I/N", help="Do every N-th shard, from I.")] = "0/1",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples encoded at once.")] = 16,
    trust_remote_code: Trust = False,
) -> None:
    """Store the latents of a joint stage, to train without the autoencoders."""
    import torch

    from unified.commands.options import open_pipeline
    from unified.config.loading import load_config
    from unified.data.tools.encode import encode as run

    index, _, count = part.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--part is I/N with I from 0 to N - 1, found {part!r}")
    done = run(
        load_config(config, settings or []),
        open_pipeline(checkpoint, trust_remote_code),
        out,
        dtype=getattr(torch, dtype.value),
        part=(int(index), int(count)),
        batch_size=batch_size,
    )
    for name, examples in done.examples.items():
        print(f"{name}: {examples:,} examples")
    for reason in done.left_out[:SHOWN]:
        print(f"left out: {reason}")
    if len(done.left_out) > SHOWN:
        print(f"  and {len(done.left_out) - SHOWN:,} more")
    print(out / "latents.yaml")


@app.command("check")
def check(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]... | SHARD...",
            help="A configuration, whose sources are checked, or shards (.tar, embedded:...).",
        ),
    ],
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples of a step.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share a step.")] = 1,
    workers: Workers = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Read all shards and tell what is in them; exit code 1 if anything is bad."""
    from unified.data.tools import check_text as view

    if ranks > 1 and batch_size is None:
        raise ValueError("--ranks needs --batch-size: the examples of one step over all ranks")
    view.epoch(0, batch_size, ranks)  # a batch that does not divide is told before all the reading
    reports = _reports(what, workers, trust_remote_code)
    if as_json:
        told = [view.as_json(report, batch_size, ranks) for report in reports]
        print(json.dumps({"sources": told, "bad": view.total(reports)}, indent=2))
    else:
        print("\n\n".join(view.as_text(report, batch_size, ranks) for report in reports))
        print(f"\n{view.EVEN}\n{view.total(reports) or 'nothing'} bad")
    if view.total(reports):
        raise typer.Exit(1)


def _reports(what: list[str], workers: int | None, trust: bool) -> Any:
    from unified.config.loading import load_config
    from unified.data.tools.check import check_config, check_shards

    if what[0].startswith("embedded:") or what[0].endswith(".tar"):
        return check_shards(what, workers)
    return check_config(load_config(what[0], what[1:]), trust, workers)
