"""The shipped tasks and modalities by name: shorthands of what the rest says of any.

Nothing else in ``unified`` knows a task or a modality by its name, but the table of short names
(`unified.config.registry`) and the official format (`unified.cola`). What stands here is thin: each
function calls the general door, `UnifiedPipeline.generate`, and each command is one of these.
"""

from __future__ import annotations

TEXT, IMAGE = "text", "image"
CONTINUATION, CAPTIONING, TEXT_TO_IMAGE = "continuation", "captioning", "text_to_image"
#: field of a .jsonl line that holds its text
FIELD = "text"


def columns(image: str | None, text: str | None) -> dict[str, str]:
    """Modality -> column of a table, of those that are named."""
    named = {IMAGE: image, TEXT: text}
    return {modality: column for modality, column in named.items() if column is not None}
