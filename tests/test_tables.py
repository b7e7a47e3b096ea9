"""Tables as text."""

from __future__ import annotations

import pytest

from unified.tables import table

ROWS = [("name", "n", "words"), ("a", "10", "two words"), ("longer", "7", "")]


@pytest.mark.parametrize(
    ("align", "lines"),
    [
        ("lr", ["name     n      words", "a       10  two words", "longer   7"]),
        ("lrl", ["name     n  words", "a       10  two words", "longer   7"]),
        ("r", ["  name   n      words", "     a  10  two words", "longer   7"]),
    ],
)
def test_columns_are_of_equal_width_and_lines_end_with_their_words(align, lines):
    assert table(ROWS, align).splitlines() == lines


def test_no_rows_are_no_lines_and_rows_of_other_lengths_are_refused():
    assert table([]) == ""
    with pytest.raises(ValueError, match="zip"):
        table([("a", "b"), ("c",)])
