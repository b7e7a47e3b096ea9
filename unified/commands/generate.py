"""``unified generate``: an item by any task of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unified.commands.options import (
    Checkpoint,
    Guidance,
    MaxNewTokens,
    Seed,
    Settings,
    Steps,
    Trust,
    given,
    open_pipeline,
)
from unified.config.schema import GenerationConfig
from unified.shortcuts import ONLY, SHORTHANDS, Asked, Shorthand, read_image

if TYPE_CHECKING:
    from unified.latents.modality import Modality
    from unified.sequence.layout import Segment
    from unified.sequence.task import Task

#: before the name of a file
FILE = "@"

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A task of the model.")]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--given",
        metavar="NAME=TEXT|@FILE",
        help="An item for the segment of that name or letter; repeat it for several. A text that"
        " begins with @ is written @@.",
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(help="Shorthand: the text to go on with (repeatable), to ask, or to paint."),
]
Images = Annotated[
    list[Path] | None, typer.Option(help="Shorthand of captioning: an image file; repeatable.")
]
Of = Annotated[
    str | None,
    typer.Option("--task", help="Shorthand of captioning: the model's own name for the task."),
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Where to write it; a text is printed without."),
]
Size = Annotated[
    int | None, typer.Option(min=1, help="In the unit of what is made: pixels per side, tokens.")
]


def generate(
    task: TaskName,
    checkpoint: Checkpoint,
    settings: Settings = None,
    given_items: Given = None,
    output: Output = None,
    prompt: Prompt = None,
    image: Images = None,
    of: Of = None,
    size: Size = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    max_new_tokens: MaxNewTokens = None,
    trust_remote_code: Trust = False,
) -> None:
    """Generate an item by any task of a checkpoint: text_to_image, captioning, continuation, ..."""
    options = given(
        GenerationConfig,
        settings,
        num_steps=steps,
        guidance_scale=guidance,
        max_new_tokens=max_new_tokens,
    )
    images = [read_image(path) for path in image or []]
    asked = Asked(prompt or (), images, of, size, max_new_tokens)
    options["seed"] = seed
    shorthand = SHORTHANDS.get(task)
    if shorthand is None or given_items:
        _refuse_shorthands(task, asked)
        _generate(task, given_items or [], checkpoint, size, output, options, trust_remote_code)
    else:
        shorthand.check(task, asked)
        _by_shorthand(shorthand, asked, checkpoint, output, options, trust_remote_code)


def _by_shorthand(
    shorthand: Shorthand,
    asked: Asked,
    checkpoint: str,
    output: Path | None,
    options: Mapping[str, Any],
    trust: bool,
) -> None:
    from unified.config.registry import resolve

    makes: Any = resolve("modality", shorthand.makes)
    _check_output(makes, output)
    if output is not None and asked.outputs > 1:
        raise ValueError(f"--output is one file, but {asked.outputs} texts are to be made")
    _deliver(shorthand.run(open_pipeline(checkpoint, trust), asked, options), makes, output)


def _generate(
    task: str,
    told: Sequence[str],
    checkpoint: str,
    size: int | None,
    output: Path | None,
    options: dict[str, Any],
    trust: bool,
) -> None:
    """What can be wrong is found before any weight is read."""
    from unified.config.plugins import resolve_model
    from unified.errors import did_you_mean
    from unified.pipeline import read_index

    folder, config, _ = read_index(checkpoint)
    plugins = resolve_model(config, trust)
    tasks = plugins.tasks
    if task not in tasks:
        raise ValueError(f"this model has no task {task!r}; {did_you_mean(task, tasks)}")
    classes = {name: cls for name, (cls, _) in plugins.modalities.items()}
    words = _words(task, tasks[task], told, classes)
    makes = classes[tasks[task].layout[tasks[task].generates].modality]
    _check_output(makes, output)
    pipeline = open_pipeline(str(folder), trust)
    if size is None and options.get("max_new_tokens") is None:
        size = pipeline.usual_size(task)
    items = {s.kind: _item(pipeline.modalities[s.modality], s, word) for s, word in words}
    chosen = {**tasks[task].defaults, **items}
    _deliver(pipeline.generate(task, [chosen], size, **options), makes, output)


def _words(
    name: str, task: Task, told: Sequence[str], classes: Mapping[str, type[Modality]]
) -> list[tuple[Segment, str]]:
    """(segment, what was given for it) of each NAME=... ValueError for a name that the task does
    not take, or takes and lacks, and for what its modality cannot read."""
    from unified.errors import did_you_mean

    known = {word: s for s in task.given for word in (s.kind, s.title)}
    found: dict[str, tuple[Segment, str]] = {}
    for pair in told:
        word, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--given should read NAME=TEXT or NAME=@FILE, found {pair!r}")
        if word not in known:
            near = did_you_mean(word, {s.title for s in task.given})
            raise ValueError(f"{name} takes no {word!r}; {near}")
        if known[word].kind in found:
            raise ValueError(f"{known[word].title} is given twice, the second time as {pair!r}")
        _check_word(known[word], value, classes[known[word].modality])
        found[known[word].kind] = known[word], value
    missing = [
        s.title for s in task.given if s.kind not in {*found, *task.defaults, task.continues}
    ]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}: say --given {missing[0]}=...")
    return list(found.values())


def _check_word(segment: Segment, value: str, cls: type[Modality]) -> None:
    file = value.startswith(FILE) and not value.startswith(FILE * 2)
    if not file and not cls.is_text:
        raise ValueError(
            f"{segment.title} is no text but of the modality {segment.modality}: name a file,"
            f" --given {segment.title}={FILE}FILE"
        )
    if file and not Path(value[1:]).is_file():
        raise FileNotFoundError(f"--given {segment.title}: there is no file {value[1:]}")


def _item(modality: Modality, segment: Segment, value: str) -> Any:
    """The item that a TEXT or an @FILE stands for."""
    if not value.startswith(FILE):
        return value
    if value.startswith(FILE * 2):
        return value[1:]
    try:
        return modality.read(Path(value[1:]).read_bytes())
    except ValueError as error:
        raise ValueError(f"--given {segment.title}: {value[1:]}: {error}") from error


def _refuse_shorthands(task: str, asked: Asked) -> None:
    """`size` and `max_new_tokens` are no shorthands: they serve any task."""
    for field in sorted(ONLY & set(asked.options)):
        raise ValueError(
            f"{asked.options[field]} is a shorthand of {', '.join(SHORTHANDS)}, and does not go"
            f" with {'--given' if task in SHORTHANDS else task}: say --given NAME=..., with the"
            f" names that unified show task {task} lists"
        )


def _check_output(makes: type[Modality], output: Path | None) -> None:
    """Before minutes are spent: can what is made be written there, or printed?"""
    if output is None:
        if not makes.is_text:
            raise ValueError("what is made is no text to print: name a file for it with --output")
        return
    try:
        makes.check_output(output)
    except ValueError as error:
        raise ValueError(f"--output {error}") from None
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no folder {output.parent}")


def _deliver(items: Sequence[Any], makes: type[Modality], output: Path | None) -> None:
    """Print the items, or write the one that there is."""
    if output is None:
        for item in items:
            print(item)
    else:
        makes.save_item(items[0], output)
        print(output)
