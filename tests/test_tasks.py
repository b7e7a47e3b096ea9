"""The three published layouts: their grids, what cannot leak, and how examples fill them."""

from __future__ import annotations

import pytest
import torch

from unified.config.registry import SHIPPED, resolve
from unified.sequence.layout import Layout, place
from unified.sequence.visibility import ALL, BEFORE, SAME, UP_TO, closure, draw

TASKS = sorted(SHIPPED["task"])
#: those whose text has blocks
BLOCKED = [name for name in TASKS if name != "editing"]


def make(name: str, **options):
    cls = resolve("task", name)
    if name == "editing":  # it has no blocks
        options.pop("block", None)
    return cls(cls.Config(source="any", **options))


def drawing(layout: Layout, **lengths: int) -> list[str]:
    kinds, _, visible = layout.grid(lengths)
    return draw(kinds, visible).splitlines()


# The published grids, blocks of one: "all" shows as a full run, "<=" as a lower triangle.
PUBLISHED = {
    "continuation": """
  C C C N N N
C # . . . . .
C # # . . . .
C # # # . . .
N . . . # . .
N # . . . # .
N # # . . . #""",
    "captioning": """
  P P I I C C N N
P # # # # . . . .
P # # # # . . . .
I # # # # . . . .
I # # # # . . . .
C # # # # # . . .
C # # # # # # . .
N # # # # . . # .
N # # # # # . . #""",
    "text_to_image": """
  C C I I N N
C # . . . . .
C # # . . . .
I # # # # . .
I # # # # . .
N . . . . # .
N # . . . . #""",
}
PUBLISHED["editing"] = """
  S S P I I
S # # # . .
S # # # . .
P # # # . .
I # # # # #
I # # # # #"""
LENGTHS = {
    "continuation": {"C": 3},
    "captioning": {"P": 2, "I": 2, "C": 2},
    "text_to_image": {"C": 2, "I": 2},
    "editing": {"S": 2, "P": 1, "I": 2},
}
GIVEN = {"P": ALL, "I": ALL}
TABLES = {
    "continuation": {"C": {"C": UP_TO}, "N": {"C": BEFORE, "N": SAME}},
    "captioning": {
        "P": GIVEN,
        "I": GIVEN,
        "C": {**GIVEN, "C": UP_TO},
        "N": {**GIVEN, "C": BEFORE, "N": SAME},
    },
    "text_to_image": {
        "C": {"C": UP_TO},
        "I": {"C": ALL, "I": ALL},
        "N": {"C": BEFORE, "N": SAME},
    },
    "editing": {
        "S": {"S": ALL, "P": ALL},
        "P": {"S": ALL, "P": ALL},
        "I": {"S": ALL, "P": ALL, "I": ALL},
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_layout_is_the_published_one(name):
    layout = make(name, block=1).layout
    assert drawing(layout, **LENGTHS[name]) == PUBLISHED[name].splitlines()[1:]
    assert {q: dict(row) for q, row in layout.sees.items()} == TABLES[name]


@pytest.mark.parametrize("name", TASKS)
def test_the_module_docstring_draws_its_grid(name):
    module = __import__(f"unified.tasks.{name}", fromlist=["__doc__"])
    lengths = {kind: 4 if kind == "C" else 2 for kind in LENGTHS[name]}
    lines = [line.strip() for line in module.__doc__.splitlines()]
    drawn = [line.strip() for line in drawing(make(name, block=2).layout, **lengths)]
    start = lines.index(drawn[0])
    assert lines[start : start + len(drawn)] == drawn


def test_nothing_given_can_reach_the_answer():
    captioning = make("captioning").layout.sees
    assert closure(captioning, "P") == closure(captioning, "I") == {"P", "I"}
    painting = make("text_to_image").layout.sees
    assert "N" not in closure(painting, "I")
    assert "I" not in closure(painting, "N")


@pytest.mark.parametrize("name", TASKS)
def test_no_clean_segment_sees_a_noisy_one(name):
    layout = make(name).layout
    for segment in layout.segments:
        if segment.noise == "clean":
            assert all(layout[kind].noise == "clean" for kind in closure(layout.sees, segment.kind))


@pytest.mark.parametrize("name", BLOCKED)
def test_options_reach_the_layout(name):
    layout = make(name, block=5, unconditional_rate=0.25).layout
    assert layout["C"].block == layout["N"].block == 5
    assert layout.unconditional_rate == 0.25
    assert layout.is_target(layout[make(name).generates])
    with pytest.raises(ValueError, match="block"):
        make(name, block=0)


def test_modalities_are_taken_by_name():
    assert make("captioning", observes="sound", text="prose").layout["I"].modality == "sound"
    assert make("captioning", text="prose").layout["P"].modality == "prose"
    assert make("text_to_image", paints="sound").layout["I"].modality == "sound"
    assert make("continuation", text="prose").layout["N"].modality == "prose"
    assert make("captioning", observes="sound").fill({"sound": 1, "text": "x"})["I"] == 1


def test_the_caption_is_an_auxiliary_target():
    layout = make("text_to_image", caption_weight=0.5).layout
    assert (layout["I"].weight, layout["N"].weight) == (1.0, 0.5)
    assert layout["I"].noise == "segment"


@pytest.mark.parametrize("name", TASKS)
def test_fill_gives_an_item_to_every_segment_but_twins(name):
    task = make(name)
    example = {"text": "a red boat", "image": object(), "other": 1, "source.image": object()}
    filled = task.fill(example)
    assert set(filled) == {s.kind for s in task.layout.filled}
    assert filled.get("C", filled.get("P")) == "a red boat"
    assert filled.get("I", example["image"]) is example["image"]


def test_an_edited_picture_lies_on_its_source():
    layout = make("editing", edits="sound").layout
    assert layout["S"].modality == layout["I"].modality == "sound"
    assert layout["I"].positions_of == "S"
    placed = place(layout, {"S": (2, 3), "P": (5,), "I": (2, 3)}, axes=3)
    assert torch.equal(placed[0].positions, placed[2].positions)
    example = {"text": "as line art", "image": 1, "before.image": 2}
    assert make("editing", original="before").fill(example) == {"S": 2, "P": "as line art", "I": 1}
    with pytest.raises(ValueError, match=r"editing needs an example with 'source.image', found"):
        make("editing").fill(example)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("continuation", {"C": "prompt"}),
        ("captioning", {"P": "prompt", "I": "image"}),
        ("text_to_image", {"C": "prompt"}),
        ("editing", {"S": "source", "P": "prompt"}),
    ],
)
def test_what_a_person_gives_has_a_name(name, given):
    assert {s.kind: s.name for s in make(name).given} == given


def test_captioning_brings_its_instruction_unless_examples_ask():
    assert make("captioning").defaults == {"P": "Describe the image."}
    assert make("captioning", question="q").defaults == make("editing").defaults == {}


def test_captioning_asks_its_instruction():
    example = {"text": "blue", "image": object()}
    assert make("captioning", instruction="Which colour?").fill(example)["P"] == "Which colour?"


def test_an_example_without_the_modality_is_named():
    with pytest.raises(ValueError, match="captioning needs an example with 'image', found text"):
        make("captioning").fill({"text": "x"})
    with pytest.raises(
        ValueError, match="continuation needs an example with 'text', found nothing"
    ):
        make("continuation").fill({})


def test_continuation_limits_its_passage():
    assert make("continuation", max_tokens=48).limits == {"C": 48}
