"""A page to play with a trained model: one tab a task.

It needs the extra ``demo``: ``pip install 'unified-latents[demo]'``.

python -m unified.demos.app CHECKPOINT [PORT]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from unified.errors import one_line
from unified.latents.modality import Modality
from unified.pipeline import UnifiedPipeline

if TYPE_CHECKING:
    import gradio

USAGE = "usage: python -m unified.demos.app CHECKPOINT [PORT]"


def page(pipeline: UnifiedPipeline) -> gradio.Blocks:
    """The page of a pipeline: a tab for each of its tasks."""
    import gradio

    with gradio.Blocks(title="Unified") as blocks:
        for name in pipeline.tasks:
            with gradio.Tab(words(name)):
                tab(gradio, pipeline, name)
    return blocks


def tab(gradio: Any, pipeline: UnifiedPipeline, name: str) -> None:
    """A component for each segment that the task is given, and one for what it generates."""
    task = pipeline.tasks[name]
    target = task.layout[task.generates]
    given = [
        component(gradio, pipeline.modalities[s.modality], s.title, task.defaults.get(s.kind))
        for s in task.given
    ]
    made = "what follows" if task.continues else target.title
    out = component(gradio, pipeline.modalities[target.modality], made)
    inputs = [*given, *settings(gradio, pipeline)]
    gradio.Button("Generate").click(runner(gradio, pipeline, name), inputs, out)


def component(gradio: Any, modality: Modality, label: str, value: Any = None) -> Any:
    """What shows an item of a modality: a text by itself, anything else by its file."""
    options = {"value": value} if modality.is_text else {"type": "filepath"}
    return getattr(gradio, modality.component)(label=words(label), **options)


def runner(gradio: Any, pipeline: UnifiedPipeline, name: str) -> Callable[..., Any]:
    """What the button of a tab does with what its components hold."""
    segments = pipeline.tasks[name].given

    def run(*values: Any) -> Any:
        held, chosen = values[: len(segments)], values[len(segments) :]
        items = {}
        for segment, value in zip(segments, held, strict=True):
            if not value:
                raise gradio.Error(f"give the {words(segment.title)} first")
            modality = pipeline.modalities[segment.modality]
            items[segment.kind] = value if modality.is_text else read(gradio, modality, value)
        size = pipeline.usual_size(name)
        (item,) = pipeline.generate(name, [items], size, **options(*chosen))
        return shown(pipeline, name, item)

    return run


def read(gradio: Any, modality: Modality, path: str) -> Any:
    """The item in a file that was brought to the page."""
    try:
        return modality.read(Path(path).read_bytes())
    except ValueError as error:
        raise gradio.Error(one_line(error)) from None


def shown(pipeline: UnifiedPipeline, name: str, item: Any) -> Any:
    """What was made, as its component takes it: a text, or the path of a file."""
    task = pipeline.tasks[name]
    modality = pipeline.modalities[task.layout[task.generates].modality]
    return item if modality.is_text else str(modality.write(item, Path(mkdtemp()) / name))


def settings(gradio: Any, pipeline: UnifiedPipeline) -> list[Any]:
    """Controls of seed, steps and guidance."""
    default = pipeline.config.generation
    return [
        gradio.Number(0, label="seed", precision=0),
        gradio.Slider(1, 64, default.num_steps, step=1, label="steps"),
        gradio.Slider(0, 12, default.guidance_scale, label="guidance scale"),
    ]


def options(seed: float, steps: float, guidance: float) -> dict[str, Any]:
    return {"seed": int(seed), "num_steps": int(steps), "guidance_scale": float(guidance)}


def words(name: str) -> str:
    return name.replace("_", " ")


def main(arguments: list[str]) -> None:
    """Serve the page on this machine only."""
    if len(arguments) not in (1, 2) or arguments[0].startswith("-"):
        print(USAGE)
        return
    try:
        import gradio  # noqa: F401

        pipeline = UnifiedPipeline.from_pretrained(arguments[0])
    except ImportError:
        raise SystemExit(
            "error: gradio is not installed: pip install 'unified-latents[demo]'"
        ) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {one_line(error)}") from None
    port = int(arguments[1]) if len(arguments) == 2 else 7860
    page(pipeline).launch(server_name="127.0.0.1", server_port=port)


if __name__ == "__main__":
    main(sys.argv[1:])
