"""Let a model answer a benchmark file: generate, write, score. A run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified.evaluation.benchmarks.answers import Accuracy, Field, read_rows, score_rows, task_of
from unified.evaluation.benchmarks.prompts import prompt, truth
from unified.evaluation.benchmarks.scoring import cut
from unified.pipeline import read_json, write_json

if TYPE_CHECKING:
    from unified.pipeline import UnifiedPipeline

#: the settings of the published run
PUBLISHED: dict[str, Any] = {
    "num_steps": 16,
    "guidance_scale": 7.0,
    "max_new_tokens": 32,
    "repetition_penalty": 1.1,
    "temperature": 0.0,
}


def answer_file(
    pipeline: UnifiedPipeline,
    task: str,
    path: Path,
    output: Path,
    limit: int | None = None,
    batch_size: int = 20,
    seed: int = 66,
    examples: str = "",
    checkpoint: str = "",
    **settings: Any,
) -> Accuracy:
    """Answer the rows of `path` into `output`, and score them.

    Rows whose id `output` holds already are not generated again; each answer depends on the seed
    and its own row, not on its batch. ValueError if they were answered in another way, which
    ``OUTPUT.settings.json`` beside the answers says.
    """
    from tqdm import tqdm

    task = task_of(path, task)
    rows = questions(path, task)[:limit]
    settings = PUBLISHED | settings
    told = {"task": task, "seed": seed, "examples": examples, "checkpoint": checkpoint}
    done = begin(output, told | settings)
    missing = [(i, row) for i, row in enumerate(rows) if row["id"] not in done]
    with output.open("a", encoding="utf-8") as file, tqdm(total=len(missing), disable=None) as bar:
        for batch in _batches(missing, batch_size):
            prompts = [prompt(task, row, examples) for _, row in batch]
            seeds = [seed * 1_000_003 + i for i, _ in batch]
            texts = pipeline.continue_text(prompts, seed=seeds, **settings)
            for (_, row), asked, text in zip(batch, prompts, texts, strict=True):
                done[row["id"]] = _answer(row, asked, text)
                file.write(json.dumps(done[row["id"]], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    return score_rows(task, [done[row["id"]] for row in rows])


def questions(path: Path, task: str) -> list[dict[str, Any]]:
    """The rows of a file that can all be asked and scored."""
    needed: list[Field] = ["id", ("prompt", "question"), ("ground_truth", "answer")]
    needed += [("prompt", "context")] if task == "squad" else []
    return read_rows(path, needed)


def begin(output: Path, told: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Answers that `output` holds already, by id; how it is answered is written beside it.

    ValueError if it was begun in another way, or is no file of this command's.
    """
    record = output.with_name(f"{output.name}.settings.json")
    if not (output.is_file() and output.stat().st_size):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, told)
        return {}
    if not record.is_file():
        raise ValueError(f"{output} exists and was not begun here; give another --output")
    before, told = read_json(record), json.loads(json.dumps(told))  # as JSON keeps it
    for key in (k for k in {**told, **before} if before.get(k) != told.get(k)):
        raise ValueError(
            f"{output} was begun with {key} {before.get(key)!r}, not {told.get(key)!r}; give"
            " another --output, or the same settings to continue"
        )
    if not drop_unfinished(output):
        return {}
    return {row["id"]: row for row in read_rows(output, ("id", "generate"))}


def drop_unfinished(output: Path) -> bool:
    """Cut off a last line that a kill left half-written; whether anything is left."""
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        output.write_bytes(whole)
    return bool(whole)


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _answer(row: Mapping[str, Any], asked: str, text: str) -> dict[str, Any]:
    """A line of an answers file."""
    kept = cut(text)
    answer = {
        "id": row["id"],
        "prompt": row.get("prompt", asked),
        "generate": kept,
        "others": text[len(kept) :],
        "ground_truth": truth(row),
    }
    return answer | {k: row[k] for k in ("choices", "few_shot_prefix") if row.get(k)}
