"""The cases that conftest.py chooses of a test for `make test`."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace

import pytest
from conftest import _mark_pairs


class Item:
    """What is looked at of a test's case."""

    def __init__(self, test: str, *values: str) -> None:
        self.values = values
        self.nodeid = f"{test}[{'-'.join(values)}]" if values else test
        self.chosen = False
        if values:
            self.callspec = SimpleNamespace(_idlist=values)

    def add_marker(self, name: str) -> None:
        assert name == "pairs" and not self.chosen
        self.chosen = True


def cases(*sizes: int) -> list[Item]:
    return [Item("test", *values) for values in product(*(map(str, range(n)) for n in sizes))]


@pytest.mark.parametrize("sizes, most", [((4, 3, 5), 24), ((2, 2, 2, 2), 7), ((5, 4, 3, 2), 25)])
@pytest.mark.parametrize("left_out", [False, True])
def test_any_two_values_that_occur_together_meet(sizes, most, left_out):
    items = cases(*sizes)
    if left_out:
        items = [item for item in items if item.values[:2] != ("1", "1")]
    _mark_pairs(items)
    pairs = [set(combinations(enumerate(item.values), 2)) for item in items]
    met = set().union(*(p for p, item in zip(pairs, items, strict=True) if item.chosen))
    assert met == set().union(*pairs)
    assert sum(item.chosen for item in items) <= most < len(items)


def test_all_cases_of_up_to_two_parameters_and_of_every_test():
    items = [Item("a"), Item("b"), *(Item("c", str(k)) for k in range(3))]
    items += [Item("d", *values) for values in product("xyz", "uv")]
    _mark_pairs(items)
    assert all(item.chosen for item in items)
