"""When an answer counts as right: the official script's rule, and the paper's (16.3).

Both cut the generated text at its first line break after a word and compare normalised texts. The
official script maps a multiple-choice answer to a letter by patterns and accepts nothing vague; the
paper maps it to the most similar option, so a guess is always made.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

Kind = Literal["word", "choice", "whole"]

#: task -> what its answer is: the first word, one of the options, or the whole text
KINDS: dict[str, Kind] = {
    "lambada": "word",
    "mmlu": "choice",
    "obqa": "choice",
    "race": "choice",
    "siqa": "choice",
    "hellaswag": "whole",
    "story_cloze": "whole",
    "squad": "whole",
}

STATED = re.compile(r"(?:answer|option|choice)\s*(?:is|=|:)?\s*[\(\[]?([A-Za-z])(?=[\s\W]|$)", re.I)
BRACKETED = re.compile(r"[\(\[]([A-Za-z])[\)\]]")
SEGMENT = re.compile(r"(?:final\s+)?answer\s*(?:is|=|:)\s*(.+)", re.I)
PREAMBLE = re.compile(
    r"^\s*(?:the\s+)?(?:correct\s+)?(?:final\s+)?(?:answer|option|choice)\s*(?:is|:|=)\s*:?\s*",
    re.I,
)


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, what it was taken for (a letter or a text), how similar."""

    correct: bool
    prediction: str | None
    score: float


def cut(text: str) -> str:
    """Up to the first line break that has a word character before it."""
    for found in re.finditer("\n", text):
        if re.search(r"\w", text[: found.start()]):
            return text[: found.start()]
    return text


def normalise(text: object) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", "", str(text).lower().strip()).split())


def similarity(a: object, b: object) -> float:
    """Ratio of matching characters of the normalised texts; 1 if both are empty."""
    first, second = normalise(a), normalise(b)
    if not first and not second:
        return 1.0
    return SequenceMatcher(None, first, second).ratio()


def official(task: str, answer: str, truth: str, choices: Sequence[str] = ()) -> Verdict:
    """The rule of the official scoring script."""
    kind = KINDS.get(task, "whole")
    if kind == "word":
        said, wanted = first_word(answer), first_word(truth)
        return Verdict(said == wanted, said, similarity(said, wanted))
    score = similarity(answer, truth)
    if kind == "choice" and choices:
        letter = as_letter(answer, choices)
        if letter is not None and letter == as_letter(truth, choices):
            return Verdict(True, letter, 1.0)
        return Verdict(score >= 1, letter or "", score)
    return Verdict(score >= 1, None, score)


def paper(task: str, answer: str, truth: str, choices: Sequence[str] = ()) -> Verdict:
    """The paper's rule: the most similar option is the answer (the first of several)."""
    if not choices:
        return official(task, answer, truth)
    scores = [similarity(answer, choice) for choice in choices]
    best = scores.index(max(scores))
    return Verdict(normalise(choices[best]) == normalise(truth), choices[best], scores[best])


def first_word(text: str) -> str:
    return next(iter(normalise(text).split()), "")


def as_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that `text` means: from its last "answer: ..." line, else from all of it."""
    segments = [m.group(1) for line in text.splitlines() if (m := SEGMENT.search(line))]
    for part in (segments[-1] if segments else text, text):
        found = letter_in(part, len(choices)) or option_in(part, choices)
        if found is not None:
            return found
    return None


def letter_in(text: str, count: int) -> str | None:
    """A letter by itself, after "answer" or the like, or in brackets in a short text."""
    whole = re.fullmatch(r"\s*[\(\[]?([A-Za-z])[\)\]]?\.?\s*", text)
    found = [whole.group(1)] if whole else STATED.findall(text)
    if not found and len(text.strip()) <= 40:
        found = BRACKETED.findall(text)
    if not found:
        return None
    letter = found[-1].upper()
    return letter if string.ascii_uppercase.index(letter) < count else None


def option_in(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `text` says, contains, or nearly says."""
    options = [normalise(choice) for choice in choices]
    said = normalise(text)
    stripped = normalise(PREAMBLE.sub("", text))
    for candidate in (said, stripped):
        if candidate in options:
            return string.ascii_uppercase[options.index(candidate)]
    inside = [i for i, option in enumerate(options) if option and option in stripped]
    if len(inside) == 1:
        return string.ascii_uppercase[inside[0]]
    scores = [similarity(stripped, choice) for choice in choices]
    best = max(range(len(scores)), key=scores.__getitem__, default=None)
    if best is None or scores[best] < 0.9:
        return None
    return string.ascii_uppercase[best]
