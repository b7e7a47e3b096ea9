"""Scoring benchmark answers: both rules, the official prompts, the published figures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import golden
import pytest
import tiny

from unified import cli
from unified.evaluation.benchmarks.answering import answer_file
from unified.evaluation.benchmarks.answers import score_file
from unified.evaluation.benchmarks.prompts import TEMPLATES, prompt, query
from unified.evaluation.benchmarks.scoring import KINDS, cut, normalise, official, paper, similarity

SHARED = Path(__file__).parents[2] / "shared" / "eval"
#: what the official release publishes, and the paper's own rule on the same answers
PUBLISHED = {"lambada": 50.80, "hellaswag": 10.70, "obqa": 23.00, "story_cloze": 30.77}
CHOICES = ["a red kite", "two blue boats", "three green hats"]


@golden.here
def test_the_official_verdict_on_every_golden_answer() -> None:
    rows = [json.loads(x) for x in (golden.FOLDER / "eval_scoring.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        kept = cut(row["generate"])
        assert kept == row["expected_generate_after_cut"], row
        found = official(row["task"], kept, row["ground_truth"], row.get("choices") or [])
        assert found.correct == row["expected_correct"], row
        assert found.score == pytest.approx(row["expected_score"], abs=5e-5), row
        assert (found.prediction or "") == (row["expected_prediction"] or ""), row


@golden.here
def test_every_golden_prompt_after_its_examples() -> None:
    rows = json.loads((golden.FOLDER / "prompt_templates.json").read_text())
    for row in rows:
        asked = query(row["task"], row)
        assert asked == row["tail"], row
        assert len(asked) == row["prompt_chars"] - row["head_chars"], row


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not beside the project")
@golden.here
def test_whole_prompts_with_the_published_examples() -> None:
    rows = {r["task"]: r for r in json.loads((golden.FOLDER / "prompt_templates.json").read_text())}
    for task in ("obqa", "hellaswag", "story_cloze"):
        first = json.loads((SHARED / f"{task}.jsonl").open(encoding="utf-8").readline())
        heading = TEMPLATES[task].heading
        examples = first["few_shot_prefix"].removesuffix(heading)
        whole = prompt(task, rows[task], examples)
        assert hashlib.sha256(whole.encode()).hexdigest() == rows[task]["prompt_sha256"]
        assert prompt(task, first) == first["few_shot_prefix"] + first["prompt"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not beside the project")
@pytest.mark.parametrize("task", list(PUBLISHED))
def test_the_published_accuracies(task: str) -> None:
    found = score_file(SHARED / f"{task}.jsonl")
    assert found.official == PUBLISHED[task]
    if KINDS[task] == "word":
        assert found.paper == found.official
    else:
        assert found.paper > found.official


def test_the_rules_differ_where_an_answer_is_vague() -> None:
    """The official script takes nothing vague, the paper always takes the nearest option."""
    vague = "two bloats, I would say"
    assert not official("obqa", vague, CHOICES[1], CHOICES).correct
    assert paper("obqa", vague, CHOICES[1], CHOICES).correct
    assert not paper("obqa", vague, CHOICES[0], CHOICES).correct
    for said in ("B", " (b).", "The answer is B", "Two blue boats!", "two blue boats it is"):
        assert official("obqa", said, CHOICES[1], CHOICES).correct, said
    assert not official("obqa", "D", CHOICES[1], CHOICES).correct  # no such option


def test_small_parts() -> None:
    assert cut("\n\n the end\nof it") == "\n\n the end"
    assert cut("no break") == "no break"
    assert normalise("  The  End!! ") == "the end"
    assert similarity("", "!") == 1.0
    assert official("lambada", "Dogs, said he", "dogs").correct
    assert not official("lambada", "", "dogs").correct


# ---- files --------------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return path


ROW = {"id": 1, "prompt": "One two", "generate": "three", "ground_truth": "three"}


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("lambada", ["{"], "line 1, is not JSON"),
        ("lambada", [ROW, [1]], "line 2, should hold an object, found list"),
        ("lambada", [ROW, ROW], "line 2, repeats the id 1"),
        ("lambada", [{"id": 1, "prompt": ""}], "line 1, lacks generate, ground_truth; it has id"),
        ("lambada", [], "has no rows"),
        ("lambda", [ROW], "should be one of lambada, .*, found 'lambda'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, rows: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        score_file(write(tmp_path / f"{name}.jsonl", *rows))


def test_eval_answers_prints_both_rules(tmp_path: Path, capsys: Any) -> None:
    wrong = {**ROW, "id": 2, "generate": "four"}
    path = write(tmp_path / "mine.jsonl", ROW, wrong)
    with pytest.raises(SystemExit):
        cli.main(["eval", "answers", str(path), "--task", "lambada", "--json"])
    (told,) = json.loads(capsys.readouterr().out)
    assert told == {"task": "lambada", "rows": 2, "official": 50.0, "paper": 50.0}


class Echo:
    """A pipeline that answers with the number of its prompt's words, and counts its calls."""

    def __init__(self, fail_at: int = 10**6) -> None:
        self.asked: list[str] = []
        self.settings: dict[str, Any] = {}
        self.fail_at = fail_at

    def continue_text(self, prompts: list[str], seed: Any, **settings: Any) -> list[str]:
        if len(self.asked) + len(prompts) > self.fail_at:
            raise KeyboardInterrupt
        self.asked += prompts
        self.settings = settings
        return [f" {len(p.split())}\nmore" for p in prompts]


def test_a_stopped_run_goes_on_and_scores_the_same(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": "w " * i, "ground_truth": str(i)} for i in range(1, 8)]
    questions = write(tmp_path / "lambada.jsonl", *rows)
    whole = answer_file(Echo(), "lambada", questions, tmp_path / "a", batch_size=2)  # type: ignore[arg-type]
    told: Any = {"guidance_interval": (0.2, 1.0), "batch_size": 2}
    first = Echo(fail_at=4)
    with pytest.raises(KeyboardInterrupt):
        answer_file(first, "lambada", questions, tmp_path / "b", **told)  # type: ignore[arg-type]
    rest = Echo()
    again = answer_file(rest, "lambada", questions, tmp_path / "b", **told)  # type: ignore[arg-type]
    assert len(first.asked) == 4
    assert len(rest.asked) == 3
    assert again == whole
    assert whole.official == 100.0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert rest.settings["guidance_scale"] == 7.0
    one = json.loads((tmp_path / "a").read_text().splitlines()[0])
    assert (one["generate"], one["others"]) == (" 1", "\nmore")


def test_a_line_that_a_kill_left_half_written_is_made_again(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": "w " * i, "ground_truth": str(i)} for i in range(1, 5)]
    questions = write(tmp_path / "lambada.jsonl", *rows)
    answer_file(Echo(), "lambada", questions, tmp_path / "a")  # type: ignore[arg-type]
    whole = (tmp_path / "a").read_text()
    for left, again in ((whole[:-9], 1), (whole[:9], 4)):
        (tmp_path / "a").write_text(left)
        rest = Echo()
        answer_file(rest, "lambada", questions, tmp_path / "a")  # type: ignore[arg-type]
        assert len(rest.asked) == again
        assert (tmp_path / "a").read_text() == whole


def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    questions = write(tmp_path / "lambada.jsonl", {"id": 1, "prompt": "w", "ground_truth": "1"})
    (tmp_path / "a").write_text("no line break")
    with pytest.raises(ValueError, match="was not begun here; give another --output"):
        answer_file(Echo(), "lambada", questions, tmp_path / "a")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_text() == "no line break"


def test_other_line_separators_are_text(tmp_path: Path) -> None:
    odd = {**ROW, "generate": "three\u2028\x85four"}
    path = tmp_path / "lambada.jsonl"
    path.write_text(json.dumps(odd, ensure_ascii=False) + "\n", "utf-8")
    assert score_file(path).rows == 1


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("lambada", {"id": 1, "answer": "x"}, "line 1, lacks prompt or question"),
        ("lambada", {"id": 1, "question": "x"}, "line 1, lacks ground_truth or answer"),
        ("squad", {"id": 1, "question": "x", "answer": "y"}, "lacks prompt or context"),
        (
            "lambada",
            {"id": [1], "question": "x", "answer": "y"},
            r"has the id \[1\]",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(
    tmp_path: Path, task: str, row: dict[str, Any], says: str
) -> None:
    asked = Echo()
    with pytest.raises(ValueError, match=says):
        answer_file(asked, task, write(tmp_path / "q", row), tmp_path / "a")  # type: ignore[arg-type]
    assert not asked.asked


def test_a_prompt_is_made_of_a_question() -> None:
    row = {"question": "Where?", "choices": ["here", "there"], "answer": "here"}
    assert prompt("obqa", row, "Examples.\n\n") == (
        "Examples.\n\nQuestion: Where?\n(A) here\n(B) there\nAnswer:"
    )
    kept = {"few_shot_prefix": "Before. ", "prompt": "Asked?"}
    assert prompt("obqa", kept) == "Before. Asked?"


def test_eval_run_answers_with_a_model(tmp_path: Path, capsys: Any) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "model")
    questions = write(
        tmp_path / "questions.jsonl",
        *({"id": i, "question": f"a big {i}", "answer": "red"} for i in range(3)),
    )
    given = ["eval", "run", "--checkpoint", str(tmp_path / "model"), "--task", "lambada"]
    given += ["--file", str(questions), "--limit", "2", "num_steps=2", "max_new_tokens=4"]
    with pytest.raises(SystemExit) as end:
        cli.main(given)
    told = capsys.readouterr()
    assert end.value.code == 0, told.err
    assert "lambada" in told.out
    answers = tmp_path / "questions.answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1]
    assert set(rows[0]) == {"id", "prompt", "generate", "others", "ground_truth"}
    with pytest.raises(SystemExit) as end:
        cli.main([*given[:-2], "num_steps=3", "max_new_tokens=4"])
    assert end.value.code == 2
    assert "was begun with num_steps 2, not 3; give another --output" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main([*given[:-2], "max_new_tokens=4"])
    assert "was begun with num_steps 2, not 16" in capsys.readouterr().err
    for wrong, says in (
        ("num_stps=2", "did you mean num_steps"),
        ("num_steps=0", "num_steps is 0"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([*given[:-2], wrong, "--output", str(tmp_path / "other")])
        assert end.value.code == 2
        assert says in capsys.readouterr().err
