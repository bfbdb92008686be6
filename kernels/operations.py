"""The backend `triton`: every operation of `reference.py`, on Triton kernels."""

from .launch import INTERPRETED
from .multi_tensor import grad_check, merge_, perturb_, squared_norm
from .soft_cross_entropy import split_soft_cross_entropy, split_soft_cross_entropy_backward
from .split_cross_entropy import split_cross_entropy, split_cross_entropy_backward
from .updates import update_

__all__ = [
    "INTERPRETED",
    "grad_check",
    "merge_",
    "perturb_",
    "split_cross_entropy",
    "split_cross_entropy_backward",
    "split_soft_cross_entropy",
    "split_soft_cross_entropy_backward",
    "squared_norm",
    "update_",
]
