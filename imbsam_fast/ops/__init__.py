"""The operations of a step, on whichever backend runs them.

`reference.py` says what each computes, `operators.py` is how torch sees it, `dispatch.py` chooses
the backend.
"""

from .dispatch import use_backend
from .operators import (
    adam_update_,
    check_adam_update,
    check_sgd_update,
    computes_in_place,
    grad_check,
    merge_,
    perturb_,
    sgd_update_,
    split_cross_entropy,
    squared_norm,
)

__all__ = [
    "adam_update_",
    "check_adam_update",
    "check_sgd_update",
    "computes_in_place",
    "grad_check",
    "merge_",
    "perturb_",
    "sgd_update_",
    "split_cross_entropy",
    "squared_norm",
    "use_backend",
]
