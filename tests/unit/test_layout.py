"""Where tensors lie: aligned, in chunks that never span groups, without overlaps."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.core.layout import (
    ALIGNMENT,
    ALIGNMENT_BYTES,
    BUFFERS,
    Layout,
    aligned,
    make_layout,
)

Shapes = list[list[tuple[int, ...]]]
SHAPE = st.lists(st.integers(0, 9), max_size=3).map(tuple)
GROUPS = st.lists(st.lists(SHAPE, max_size=4), max_size=3)
UNITS = st.integers(1, 6)  # chunk size in units of the alignment


def lay_out(groups: Shapes, buffers: list[tuple[int, ...]] = [], *, chunk: int = 64) -> Layout:  # noqa: B006
    return make_layout(
        [[(f"g{i}.p{j}", s) for j, s in enumerate(group)] for i, group in enumerate(groups)],
        buffers=[(f"b{i}", shape) for i, shape in enumerate(buffers)],
        chunk_elements=chunk,
    )


@settings(max_examples=150, deadline=None)
@given(groups=GROUPS, buffers=st.lists(SHAPE, max_size=3), units=UNITS)
def test_every_layout(groups: Shapes, buffers: list[tuple[int, ...]], units: int) -> None:
    layout = lay_out(groups, buffers, chunk=units * ALIGNMENT)
    check_fields(layout)
    check_chunks(layout, units * ALIGNMENT)
    check_groups(layout, groups, buffers)


def check_fields(layout: Layout) -> None:
    for one in layout.fields:
        assert 4 * one.start % ALIGNMENT_BYTES == 0
        assert one.size == math.prod(one.shape)
        assert one.stop == one.start + one.size <= layout.num_elements
    for one, after in itertools.pairwise(layout.fields):
        assert one.stop <= after.start < one.stop + ALIGNMENT or one.stop == after.start


def check_chunks(layout: Layout, largest: int) -> None:
    assert [chunk.index for chunk in layout.chunks] == list(range(len(layout.chunks)))
    borders = [0, *(chunk.stop for chunk in layout.chunks)]
    assert borders == [*(chunk.start for chunk in layout.chunks), layout.num_elements]
    for chunk in layout.chunks:
        assert chunk.start % ALIGNMENT == chunk.size % ALIGNMENT == 0
        assert 0 < chunk.size <= largest


def check_groups(layout: Layout, groups: Shapes, buffers: list[tuple[int, ...]]) -> None:
    """Each element lies in a chunk of its own group; buffers come last, no chunk holds two."""
    owners = [index for index, group in enumerate(groups) for _ in group] + [BUFFERS] * len(buffers)
    held: dict[int, set[str]] = {}
    for one, group in zip(layout.fields, owners, strict=True):
        for chunk in layout.chunks:
            if chunk.start < one.stop and one.start < chunk.stop:
                assert chunk.group == group
                held.setdefault(chunk.index, set()).add(one.name)
    assert all(len(held[one.index]) == 1 for one in layout.chunks if one.group == BUFFERS)
    trained = [chunk.stop for chunk in layout.chunks if chunk.group != BUFFERS]
    assert layout.num_parameter_elements == max(trained, default=0)
    assert all(one.start >= layout.num_parameter_elements for one in layout.buffers)


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS, buffers=st.lists(SHAPE, max_size=3), units=UNITS, block=st.integers(1, 100))
def test_pieces_cover_every_tensor_once_in_order(
    groups: Shapes, buffers: list[tuple[int, ...]], units: int, block: int
) -> None:
    layout = lay_out(groups, buffers, chunk=units * ALIGNMENT)
    covered = dict.fromkeys(range(len(layout.fields)), 0)
    last = 0
    for piece in layout.pieces(block):
        one, chunk = layout.fields[piece.field], layout.chunks[piece.chunk]
        assert piece.field_start == covered[piece.field]
        assert piece.start == one.start + piece.field_start >= last
        assert 0 < piece.size <= block
        assert chunk.start <= piece.start
        assert piece.start + piece.size <= chunk.stop
        covered[piece.field] += piece.size
        last = piece.start + piece.size
    assert covered == {index: one.size for index, one in enumerate(layout.fields)}


def test_a_small_layout() -> None:
    layout = lay_out([[(3, 5), (), (17,)], [(2,)]], [(4,)], chunk=32)
    assert [(one.name, one.start) for one in layout.fields] == [
        ("g0.p0", 0),
        ("g0.p1", 16),
        ("g0.p2", 32),
        ("g1.p0", 64),
        ("b0", 80),
    ]
    assert [(one.group, one.start, one.size) for one in layout.chunks] == [
        (0, 0, 32),
        (0, 32, 32),
        (1, 64, 16),
        (BUFFERS, 80, 16),
    ]
    assert (layout.num_parameter_elements, layout.num_elements) == (80, 96)


def test_a_scalar_has_one_element_and_an_empty_tensor_none() -> None:
    layout = lay_out([[(), (0,), (1,)]])
    assert [one.size for one in layout.fields] == [1, 0, 1]
    assert [one.start for one in layout.fields] == [0, 16, 16]


def test_nothing_to_lay_out() -> None:
    for layout in (lay_out([]), lay_out([[]]), lay_out([[(0,)]])):
        assert layout.chunks == ()
        assert (layout.num_elements, layout.num_parameter_elements) == (0, 0)
        assert layout.counters_bytes == 0
        assert list(layout.pieces(10)) == []


def test_counters_are_bytes_of_their_own() -> None:
    counters = [("steps", (), "int64", 8), ("seen", (100,), "bool", 100), ("none", (0,), "int8", 0)]
    layout = make_layout([[("p", (2,))]], counters=counters, chunk_elements=16)
    assert [(one.name, one.start_byte, one.size_bytes) for one in layout.counters] == [
        ("steps", 0, 8),
        ("seen", 64, 100),
        ("none", 192, 0),
    ]
    assert layout.counters_bytes == 192
    assert layout.num_elements == 16  # they take no elements


def test_the_same_names_and_shapes_give_the_same_layout() -> None:
    assert lay_out([[(3,)], [(4, 4)]]) == lay_out([[(3,)], [(4, 4)]])
    assert pickle.loads(pickle.dumps(lay_out([[(3,)]], [(2,)]))) == lay_out([[(3,)]], [(2,)])


@pytest.mark.parametrize(
    ("value", "to", "result"), [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 64, 128)]
)
def test_aligned(value: int, to: int, result: int) -> None:
    assert aligned(value, to) == result
