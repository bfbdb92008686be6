"""How the CUDA kernels cut a call into launches and tiles: plain C++, tested without a GPU."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from imbsam_fast.ops import native

pytestmark = pytest.mark.skipif(
    native.reason_unavailable("cpu") is not None, reason=str(native.reason_unavailable("cpu"))
)

# Tensors that fit the argument of a kernel over five lists: 40 bytes of addresses each, 8 of the
# number of elements, 4 of the first tile.
CAPACITY = (32764 - 256) // 52

SIZES: dict[str, list[int]] = {
    "none": [],
    "empty": [0, 0, 0],
    "one element": [1],
    "one tile": [64],
    "one tile and an element": [65],
    "empty ones between": [0, 3, 0, 0, 200, 64, 0],
    "as many as fit": [3] * CAPACITY,
    "one more than fits": [3] * (CAPACITY + 1),
    "empty ones take no place": [3, 0] * CAPACITY,
    "three launches": [n % 150 for n in range(3 * CAPACITY)],
    "random": random.Random(0).choices([0, 1, 63, 64, 65, 128, 5000], k=1000),
}


@pytest.mark.parametrize("case", SIZES)
def test_every_element_is_covered_once_and_in_order(case: str) -> None:
    numel = SIZES[case]
    covered: dict[int, int] = defaultdict(int)
    previous = (0, -1)
    for launch, tensor, begin, elements in native._C.cuda_tiles(numel, 64):
        assert previous <= (launch, tensor)
        previous = (launch, tensor)
        assert begin == covered[tensor] and begin % 64 == 0
        assert elements == min(64, numel[tensor] - begin) > 0
        covered[tensor] += elements
    assert dict(covered) == {i: n for i, n in enumerate(numel) if n}


@pytest.mark.parametrize("case", SIZES)
def test_launches_are_as_full_as_they_can_be(case: str) -> None:
    tensors: dict[int, set[int]] = defaultdict(set)
    for launch, tensor, _, _ in native._C.cuda_tiles(SIZES[case], 64):
        tensors[launch].add(tensor)
    counts = [len(tensors[launch]) for launch in range(len(tensors))]
    assert all(count == CAPACITY for count in counts[:-1])
    assert sum(counts) == sum(n > 0 for n in SIZES[case])


def test_offsets_beyond_32_bits() -> None:
    tile = 2**30
    tiles = native._C.cuda_tiles([1, 5 * tile + 7], tile)
    assert tiles == [(0, 0, 0, 1), *((0, 1, i * tile, tile) for i in range(5)), (0, 1, 5 * tile, 7)]


def test_a_tensor_of_too_many_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a tensor has 4294967296 elements, expected at most"):
        native._C.cuda_tiles([2**32], 1)
