"""The comparison of inventories, as the algorithm that it is: whatever two inventories hold, exactly what
differs is found, and what it costs follows the difference."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.reconcile_tree import ASK_NODES_MAX, FAN_OUT, Content, Descent, Tree, depth_for, in_leaves

SALT = bytes(range(16))


def content(number: int) -> Content:
    return f"1.2.3.{number}", hashlib.sha256(str(number).encode()).digest()


def compared(ours: set[Content], theirs: set[Content], depth: int) -> tuple[set[Content], set[Content], int]:
    """What only we have, what only they have, and how many sums were told."""
    mine, other = Tree(SALT, depth), Tree(SALT, depth)
    mine.add(ours)
    other.add(theirs)
    descent, told = Descent(mine, other.root), 1
    while (question := descent.question()) is not None:
        level, nodes = question
        assert len(nodes) <= ASK_NODES_MAX
        sums = other.children(level, nodes)
        told += len(sums)
        descent.answer(sums)
    leaves = frozenset(descent.leaves)
    here, there = in_leaves(mine, ours, leaves), in_leaves(other, theirs, leaves)
    return ({here[value] for value in here.keys() - there.keys()},
            {there[value] for value in there.keys() - here.keys()}, told)


@given(
    st.sets(st.integers(0, 400), max_size=300), st.sets(st.integers(0, 400), max_size=60), st.integers(0, 3)
)
def test_exactly_what_differs_is_found(numbers: set[int], changed: set[int], depth: int) -> None:
    ours = {content(number) for number in numbers}
    theirs = {content(number) for number in numbers ^ changed}
    only_ours, only_theirs, _ = compared(ours, theirs, depth)
    assert only_ours == ours - theirs
    assert only_theirs == theirs - ours


def test_the_same_uid_with_another_digest_is_a_difference_on_both_sides() -> None:
    ours, theirs = {("1.2", b"a" * 32), content(1)}, {("1.2", b"b" * 32), content(1)}
    assert compared(ours, theirs, 2)[:2] == ({("1.2", b"a" * 32)}, {("1.2", b"b" * 32)})


def test_equal_inventories_cost_one_sum_and_few_differences_little() -> None:
    ours = {content(number) for number in range(20_000)}
    assert compared(ours, set(ours), depth_for(20_000))[2] == 1
    theirs = ours - {content(7), content(8)} | {content(20_001)}
    only_ours, only_theirs, told = compared(ours, theirs, depth_for(20_000))
    assert (only_ours, only_theirs) == ({content(7), content(8)}, {content(20_001)})
    assert told <= 1 + 3 * depth_for(20_000) * FAN_OUT


@given(st.integers(0, 10**9))
def test_a_leaf_holds_about_as_many_rows_however_large_it_all_is(rows: int) -> None:
    assert rows // FAN_OUT ** depth_for(rows) <= 48 or depth_for(rows) == 5


def test_another_salt_gives_other_sums_and_answers_are_checked() -> None:
    first, second = Tree(SALT, 1), Tree(bytes(16), 1)
    first.add([content(1)])
    second.add([content(1)])
    assert first.root != second.root
    descent = Descent(first, second.root)
    assert descent.question() is not None
    with pytest.raises(ValueError, match="sixteen"):
        descent.answer([0])
