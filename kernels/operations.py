"""The backend `triton`: every operation of `reference.py`, on Triton kernels."""

from .launch import INTERPRETED
from .multi_tensor import grad_check, merge_, perturb_, squared_norm
from .split_cross_entropy import split_cross_entropy, split_cross_entropy_backward
from .updates import adam_update_, sgd_update_

__all__ = [
    "INTERPRETED",
    "adam_update_",
    "grad_check",
    "merge_",
    "perturb_",
    "sgd_update_",
    "split_cross_entropy",
    "split_cross_entropy_backward",
    "squared_norm",
]
