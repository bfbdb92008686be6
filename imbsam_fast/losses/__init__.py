"""Criteria that return the head and the tail part of a batch's loss.

A criterion is anything with `split: ClassSplit` and
`__call__(outputs, targets, batch_size=None) -> SplitLoss`. `batch_size` is b of docs/design.md
section 2, for when only some rows of the batch are passed; without it b is the number of
rows that count. Targets other than labels (N,) need `parts(targets) -> Parts` too.
"""

from .cross_entropy import SplitCrossEntropy
from .multi_label import SplitBCEWithLogits
from .parts import LABELS, Parts, SplitLoss, check_split_loss, is_labels, parts_of
from .per_sample import split_loss

__all__ = [
    "LABELS",
    "Parts",
    "SplitBCEWithLogits",
    "SplitCrossEntropy",
    "SplitLoss",
    "check_split_loss",
    "is_labels",
    "parts_of",
    "split_loss",
]
