"""A table of text within a width: what it leaves out, and what it never does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from results.columns import Column, fitted
from results.formats import shortened_in_the_middle

words = st.text(alphabet="abc,|", min_size=1, max_size=30)


@given(st.lists(st.tuples(words, words, st.none() | st.integers(4, 20)), min_size=1, max_size=8), st.integers(20, 200))
def test_a_table_fits_its_width_and_leaves_out_the_least_important_columns(parts, width):
    columns = [Column("first", ["1"]), *(Column(title, [cell], at_most=at_most) for title, cell, at_most in parts)]
    lines, left_out = fitted(columns, width)
    assert max(map(len, lines)) <= width
    shown = columns[: len(columns) - len(left_out)]
    assert left_out == [column.title for column in columns[len(shown) :]]
    if left_out:
        least = [column.least_width + 2 for column in columns[: len(shown) + 1]]
        assert sum(least) - 2 > width
    for column in shown:
        assert column.title in lines[0]
        if column.at_most is None:
            assert column.cells[0] in lines[1]


def test_room_that_is_left_goes_to_the_text_that_was_shortened():
    label = Column("label", ["4,2,3|4,4,5|4,1,4|4,1,6|64"], is_text=True, at_most=10)
    columns = [Column("rank", ["1"]), label, Column("digest", ["dbb5c134"])]
    assert fitted(columns, 80) == (["rank  label                         digest", "   1  4,2,3|4,4,5|4,1,4|4,1,6|64  dbb5c134"], [])
    assert fitted(columns, 27) == (["rank  label          digest", "   1  4,2,3…,6|64  dbb5c134"], [])
    assert fitted(columns, 23) == (["rank  label", "   1  4,2,3|4,…4,1,6|64"], ["digest"])


def test_a_long_label_keeps_its_beginning_and_its_end():
    assert shortened_in_the_middle("as_vit:8,2,3|64", 15) == "as_vit:8,2,3|64"
    assert shortened_in_the_middle("as_vit:8,2,3|64", 10) == "as_vi…3|64"
    assert len(shortened_in_the_middle("as_vit:8,2,3|64", 9)) == 9
