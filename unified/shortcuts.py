"""The shipped tasks and modalities by name: shorthands of what the rest says of any.

Nothing else in ``unified`` knows a task or a modality by its name, but the table of short names
(`unified.config.registry`) and the official format (`unified.cola`). What stands here is thin: the
functions are methods of the pipeline and call its general door, `UnifiedPipeline.generate`, and the
commands call them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified.pipeline import UnifiedPipeline

TEXT, IMAGE = "text", "image"
CONTINUATION, CAPTIONING, TEXT_TO_IMAGE = "continuation", "captioning", "text_to_image"
#: field of a .jsonl line that holds its text
FIELD = "text"


def columns(image: str | None, text: str | None) -> dict[str, str]:
    """Modality -> column of a table, of those that are named."""
    named = {IMAGE: image, TEXT: text}
    return {modality: column for modality, column in named.items() if column is not None}


# ---- methods of the pipeline -------------------------------------------------------------------


def continue_text(
    pipeline: UnifiedPipeline,
    prompts: Sequence[str],
    max_new_tokens: int | None = None,
    **settings: Any,
) -> list[str]:
    """What follows each prompt. See `UnifiedPipeline.generate`."""
    given = [{"C": prompt} for prompt in texts(prompts)]
    size = pipeline.new_tokens(max_new_tokens)
    return pipeline.generate(CONTINUATION, given, size, **settings)


def caption(
    pipeline: UnifiedPipeline,
    images: Sequence[Any],
    prompts: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    task: str | None = None,
    **settings: Any,
) -> list[str]:
    """A text about each image, told by `prompts` (default: the instruction of training).

    `task` is the model's name for the task, by default ``captioning``. One that learned from a
    question of each image has no instruction: ValueError without `prompts`.
    """
    task = task or CAPTIONING
    if not isinstance(images, Sequence) or isinstance(images, str):
        kind = type(images).__name__
        raise ValueError(f"images must be a list, found one {kind}: put it in a list")
    told = [_instruction(pipeline, task)] * len(images) if prompts is None else texts(prompts)
    if len(told) != len(images):
        raise ValueError(f"{len(told)} prompts for {len(images)} images; give one for each")
    given = [{"I": image, "P": prompt} for image, prompt in zip(images, told, strict=True)]
    return pipeline.generate(task, given, pipeline.new_tokens(max_new_tokens), **settings)


def _instruction(pipeline: UnifiedPipeline, task: str) -> str:
    """What `task` is told where the caller tells nothing."""
    instruction = pipeline.task(task).defaults.get("P")
    if instruction is None:
        raise ValueError(f"{task} has no instruction for every image: give prompts, one for each")
    return str(instruction)


def text_to_image(
    pipeline: UnifiedPipeline,
    prompts: Sequence[str],
    size: int | tuple[int, int] | None = None,
    **settings: Any,
) -> list[Any]:
    """An image of each prompt; `size` is (height, width) in pixels, or one side of a square."""
    given = [{"C": prompt} for prompt in texts(prompts)]
    return pipeline.generate(TEXT_TO_IMAGE, given, size, **settings)


def scored_task(pipeline: UnifiedPipeline) -> str:
    """The task under which texts are scored, unless another is named: one that goes on with what is
    given. ValueError where there is none, or several of which none has the usual name."""
    found = [name for name, task in pipeline.tasks.items() if task.continues]
    if CONTINUATION in found:
        return CONTINUATION
    if len(found) != 1:
        many = f"several that do, {', '.join(found)}: name one" if found else "none that does"
        raise ValueError(f"a score needs a task that goes on with a text; this model has {many}")
    return found[0]


def texts(prompts: Sequence[str]) -> Sequence[str]:
    """`prompts`, once they are known to be a list of texts that say something."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of texts, found one text: put it in a list")
    if not all(prompts):
        raise ValueError("a prompt is empty; it must say something, if only one word")
    return prompts


# ---- the command -------------------------------------------------------------------------------


#: options that only shorthands have
ONLY = frozenset({"prompt", "image", "task"})


@dataclass(frozen=True)
class Asked:
    """What `unified generate` is told by options that not every task has; the images are read."""

    prompt: Sequence[str] = ()
    image: Sequence[Any] = ()
    task: str | None = None
    size: int | None = None
    max_new_tokens: int | None = None

    @property
    def outputs(self) -> int:
        """How many items are made of it."""
        return len(self.image or self.prompt)

    @property
    def options(self) -> dict[str, str]:
        """Field -> option, of those that were given."""
        return {n: f"--{n.replace('_', '-')}" for n, v in vars(self).items() if v}


@dataclass(frozen=True)
class Shorthand:
    """A task with options of its own: the one it needs, those it may have, the one that may be
    repeated, the modality that it makes, and what it does with them."""

    needs: str
    takes: frozenset[str]
    repeats: str | None
    makes: str
    run: Callable[[UnifiedPipeline, Asked, Mapping[str, Any]], list[Any]]

    def check(self, name: str, asked: Asked) -> None:
        """ValueError for an option that is missing, that the task does not have, or that may not be
        repeated."""
        for field, option in asked.options.items():
            if field != self.needs and field not in self.takes:
                raise ValueError(f"{name} takes no {option}")
            value = getattr(asked, field)
            if isinstance(value, list) and len(value) > 1 and field != self.repeats:
                raise ValueError(f"{name} takes one {option}, found {len(value)}")
        if self.needs not in asked.options:
            raise ValueError(f"{name} needs --{self.needs}, or --given for each segment")


def _continue(pipeline: UnifiedPipeline, asked: Asked, settings: Mapping[str, Any]) -> list[str]:
    return pipeline.continue_text(list(asked.prompt), **settings)


def _caption(pipeline: UnifiedPipeline, asked: Asked, settings: Mapping[str, Any]) -> list[str]:
    prompts = [asked.prompt[0]] * len(asked.image) if asked.prompt else None
    task = asked.task or CAPTIONING
    return pipeline.caption(list(asked.image), prompts=prompts, task=task, **settings)


def _paint(pipeline: UnifiedPipeline, asked: Asked, settings: Mapping[str, Any]) -> list[Any]:
    return pipeline.text_to_image(list(asked.prompt), asked.size, **settings)


SHORTHANDS: Mapping[str, Shorthand] = {
    CONTINUATION: Shorthand("prompt", frozenset({"max_new_tokens"}), "prompt", TEXT, _continue),
    CAPTIONING: Shorthand(
        "image", frozenset({"prompt", "task", "max_new_tokens"}), "image", TEXT, _caption
    ),
    TEXT_TO_IMAGE: Shorthand("prompt", frozenset({"size"}), None, IMAGE, _paint),
}


def read_image(path: Path) -> Any:
    """The image as it is: turning it upright, and onto white, is the modality's part."""
    from io import BytesIO

    from PIL import Image

    data = BytesIO(path.read_bytes())
    try:
        image = Image.open(data)
        image.load()
    except Exception as error:  # decoders raise nearly anything on bytes that are no image
        reason = str(error).replace(repr(data), "its format is unknown")
        raise ValueError(
            f"{path} should be an image file, but it cannot be read: {reason}"
        ) from None
    return image
