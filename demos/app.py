"""A page to play with a trained model: one tab a task.

It needs the extra ``demo``: ``pip install 'unified-latents[demo]'``.

python -m unified.demos.app CHECKPOINT [PORT]
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from unified.errors import one_line
from unified.pipeline import UnifiedPipeline

if TYPE_CHECKING:
    import gradio

USAGE = "usage: python -m unified.demos.app CHECKPOINT [PORT]"


def page(pipeline: UnifiedPipeline) -> gradio.Blocks:
    """The page of a pipeline: a tab for each of its tasks that this module knows to show."""
    import gradio

    with gradio.Blocks(title="Unified") as blocks:
        for name, tab in TABS.items():
            if name in pipeline.tasks:
                with gradio.Tab(name.replace("_", " ")):
                    tab(gradio, pipeline)
    return blocks


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


def continuation(gradio: Any, pipeline: UnifiedPipeline) -> None:
    prompt, out = gradio.Textbox(label="beginning"), gradio.Textbox(label="what follows")

    def run(text: str, *given: float) -> str:
        return pipeline.continue_text([text], **options(*given))[0]

    gradio.Button("Continue").click(run, [prompt, *settings(gradio, pipeline)], out)


def captioning(gradio: Any, pipeline: UnifiedPipeline) -> None:
    image, out = gradio.Image(type="pil", label="image"), gradio.Textbox(label="caption")

    def run(shown: Any, *given: float) -> str:
        if shown is None:
            raise gradio.Error("choose an image first")
        return pipeline.caption([shown], **options(*given))[0]

    gradio.Button("Describe").click(run, [image, *settings(gradio, pipeline)], out)


def text_to_image(gradio: Any, pipeline: UnifiedPipeline) -> None:
    prompt, out = gradio.Textbox(label="caption"), gradio.Image(label="image")

    def run(text: str, *given: float) -> Any:
        return pipeline.text_to_image([text], **options(*given))[0]

    gradio.Button("Paint").click(run, [prompt, *settings(gradio, pipeline)], out)


TABS = {"text_to_image": text_to_image, "captioning": captioning, "continuation": continuation}


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
