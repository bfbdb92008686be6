"""The operations of a step, on whichever backend runs them.

`reference.py` says what each computes, `operators.py` and `updates.py` are how torch sees it,
`dispatch.py` chooses the backend.
"""

from .dispatch import use_backend
from .operators import (
    computes_in_place,
    grad_check,
    merge_,
    perturb_,
    split_cross_entropy,
    squared_norm,
)
from .soft_targets import split_soft_cross_entropy
from .updates import (
    adam_update_,
    check_adam_update,
    check_rmsprop_update,
    check_sgd_update,
    rmsprop_update_,
    sgd_update_,
)

__all__ = [
    "adam_update_",
    "check_adam_update",
    "check_rmsprop_update",
    "check_sgd_update",
    "computes_in_place",
    "grad_check",
    "merge_",
    "perturb_",
    "rmsprop_update_",
    "sgd_update_",
    "split_cross_entropy",
    "split_soft_cross_entropy",
    "squared_norm",
    "use_backend",
]
