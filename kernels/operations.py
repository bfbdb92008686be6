"""The backend `triton`: every operation of `reference.py`, on Triton kernels."""

from .launch import INTERPRETED
from .multi_tensor import grad_check, merge_, perturb_, sgd_update_, squared_norm
from .split_cross_entropy import split_cross_entropy, split_cross_entropy_backward

__all__ = [
    "INTERPRETED",
    "grad_check",
    "merge_",
    "perturb_",
    "sgd_update_",
    "split_cross_entropy",
    "split_cross_entropy_backward",
    "squared_norm",
]
