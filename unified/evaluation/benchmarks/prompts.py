"""Prompts of the benchmark tasks, as the official evaluation words them.

A prompt is worked examples (few-shot, from the rows or a file of the user's), then the question
under the task's heading. Options stand one a line, and the prompt stops where the answer begins.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """What stands before the question, before its options and before the answer."""

    heading: str = ""
    options: str = ""
    end: str = ""


TEMPLATES = {
    "lambada": Template(),
    "mmlu": Template("Question: ", "", "Answer:"),
    "obqa": Template("Question: ", "", "Answer:"),
    "siqa": Template("Question: ", "", "Answer:"),
    "hellaswag": Template("Context: ", "", "Answer:"),
    "race": Template("Article: ", "Options:", "Answer:"),
    "squad": Template("Context: ", "", "Answer:"),
    "story_cloze": Template("Story: ", "", "End:"),
}


def query(task: str, row: Mapping[str, Any]) -> str:
    """The question of a row with ``question`` (and ``context`` for squad), without examples."""
    template = TEMPLATES.get(task, Template())
    lines = [str(row["question"])]
    if task == "squad":
        lines = [str(row["context"]), f"Question: {row['question']}"]
    choices = row.get("choices") or []
    if choices and template.options:
        lines.append(template.options)
    lines += [
        f"({letter}) {choice}"
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    ]
    return "\n".join([*lines, template.end] if template.end else lines)


def prompt(task: str, row: Mapping[str, Any], examples: str = "") -> str:
    """All that the model is to read.

    A row of an answers file holds its prompt and perhaps its ``few_shot_prefix``; for others the
    prompt is made, after the `examples`.
    """
    if "prompt" in row:
        return str(row.get("few_shot_prefix", "")) + str(row["prompt"])
    return examples + TEMPLATES[task].heading + query(task, row)


def truth(row: Mapping[str, Any]) -> str:
    """The right answer: ``ground_truth``, or ``answer``."""
    return str(row["ground_truth"] if "ground_truth" in row else row["answer"])
