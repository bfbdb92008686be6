"""What the losses of the compiled module refuse before they read anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imbsam_fast.ops import native

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(
        native.reason_unavailable("cpu") is not None, reason="the compiled module did not load"
    ),
]

SIZES = "dtype rows classes row_stride"
LABELS = f"{SIZES} logits targets plain sharp class_weight label_smoothing ignore_index batch_size"
SOFT = f"{SIZES} logits q q_stride plain sharp class_weight label_smoothing batch_size"
LABELS_BACKWARD = f"{SIZES} grad_head grad_tail logits targets lse b plain sharp class_weight"
SOFT_BACKWARD = (
    f"{SIZES} grad_head grad_tail logits q q_stride row_numbers b plain sharp class_weight"
)
# The arguments of each function, in their order.
ARGUMENTS = {
    "split_cross_entropy": f"{LABELS} head tail b lse threads",
    "split_soft_cross_entropy": f"{SOFT} head tail b row_numbers threads",
    "split_cross_entropy_backward": (
        f"{LABELS_BACKWARD} label_smoothing ignore_index grad_logits threads"
    ),
    "split_soft_cross_entropy_backward": f"{SOFT_BACKWARD} label_smoothing grad_logits threads",
    "cuda_split_cross_entropy": f"{LABELS} losses head tail b lse device stream",
    "cuda_split_soft_cross_entropy": f"{SOFT} losses head tail b row_numbers device stream",
    "cuda_split_cross_entropy_backward": (
        f"{LABELS_BACKWARD} weight_sum label_smoothing ignore_index grad_logits device stream"
    ),
    "cuda_split_soft_cross_entropy_backward": (
        f"{SOFT_BACKWARD} weight_sum label_smoothing grad_logits device stream"
    ),
}
POINTERS = {"logits", "targets", "q", "plain", "sharp", "head", "tail", "b", "lse", "row_numbers"}
POINTERS |= {"losses", "grad_logits"}
# Two rows of three classes, in float32.
SETTINGS: dict[str, Any] = {
    "dtype": 0, "rows": 2, "classes": 3, "row_stride": 3, "q_stride": 3, "grad_head": 1.0,
    "grad_tail": 1.0, "class_weight": 0, "weight_sum": 0, "label_smoothing": 0.0,
    "ignore_index": -100, "batch_size": None, "threads": 1, "device": 0, "stream": 0,
}  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": 9}, "dtype is 9, expected 0 to 3"),
    ({"rows": -1}, r"logits is \(-1, 3\), expected \(N, K\) with K > 0"),
    ({"classes": 0}, r"logits is \(2, 0\), expected"),
    ({"row_stride": -1}, "row_stride is -1, expected >= 0"),
    ({"q_stride": -1}, "q_stride is -1, expected >= 0"),
]
TOO_MANY: list[tuple[dict[str, Any], str]] = [
    ({name: 2**31}, rf"logits is \({shape}\), expected at most 1073741824 rows and classes")
    for name, shape in (("rows", "2147483648, 3"), ("classes", "2, 2147483648"))
]


def call(function: str, **changes: Any) -> None:
    memory = {name: torch.zeros(12) for name in POINTERS} | {"targets": torch.zeros(2).long()}
    values = SETTINGS | {name: tensor.data_ptr() for name, tensor in memory.items()}
    if function.endswith("_backward"):  # where one place has numbers, the other has addresses
        on_cuda = function.startswith("cuda_")
        values |= {"grad_head": 0, "grad_tail": 0} if on_cuda else {"b": 2.0}
    values |= changes
    getattr(native._C, function)(*(values[name] for name in ARGUMENTS[function].split()))


@pytest.mark.parametrize("function", ARGUMENTS)
def test_refusals(function: str) -> None:
    if function.startswith("cuda_") and not native._C.has_cuda:
        pytest.skip("the module was built without CUDA")
    names = set(ARGUMENTS[function].split())
    refused = [(changes, message) for changes, message in REFUSED if set(changes) <= names]
    on_host = not function.startswith("cuda_")
    if on_host:
        call(function)
    else:
        refused += TOO_MANY
    pointers = names & POINTERS
    if on_host and function.endswith("_backward"):
        pointers -= {"b"}
    refused += [({name: 0}, f"({name}|head, tail or b) is a null pointer") for name in pointers]
    for changes, message in refused:
        with pytest.raises(ValueError, match=f"^{function.removeprefix('cuda_')}: {message}"):
            call(function, **changes)
