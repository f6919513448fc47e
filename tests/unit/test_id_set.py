"""Sets of ids that hold digests alone."""

import tracemalloc

import numpy as np

from captioner.artifacts.id_set import IdRows, IdSet


def test_what_was_put_in_is_in_and_nothing_else() -> None:
    ids = [f"a/{number}.jpg" for number in range(5000)]
    odd = ["", "é\x00", "e\u0301\x00", "\x00", "日本/1.jpg"]
    found = IdSet([ids[:3000], [], ids[3000:], odd])
    assert (len(found), found.repeated) == (5005, 0)
    asked = [*odd, "a/5000.jpg", "é", ids[0], ids[-1], "a/0.jpg "]
    assert found.holds(asked).tolist() == [True] * 5 + [False, False, True, True, False]
    assert IdSet().holds(asked).tolist() == [False] * 10
    assert IdSet([["x"]]).holds(["x", "y"]).tolist() == [True, False]
    assert found.holds([]).tolist() == []


def test_ids_that_came_again_are_counted() -> None:
    assert (len(IdSet([["a", "b"], ["b", "b", "c"]])), IdSet([["a", "b"], ["b", "b"]]).repeated) == (3, 2)  # fmt: skip


def test_an_id_of_any_length_takes_a_few_dozen_bytes() -> None:
    count = 200_000
    tracemalloc.start()
    try:
        starts = range(0, count, 1000)
        found = IdSet([f"{one:0200d}" for one in range(first, first + 1000)] for first in starts)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert now < 20 * count
    assert peak < 60 * count
    assert np.all(found.holds([f"{number:0200d}" for number in range(100)]))


def test_ids_are_found_where_they_stand() -> None:
    ids = [f"{number * 7919 % 1000}.jpg" for number in range(1000)]
    rows = IdRows([ids[:10], ids[10:]])
    assert rows.find([ids[999], "no", ids[0], ids[10]]).tolist() == [999, -1, 0, 10]
    assert IdRows([]).find(["a"]).tolist() == [-1]
