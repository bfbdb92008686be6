"""The namespace torch.ops.imbsam_fast: how operators are registered and what torch is told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

LIBRARY = torch.library.Library("imbsam_fast", "DEF")
NAMESPACE = torch.ops.imbsam_fast

# The names of all operators, in the order of their definition.
OPERATORS: list[str] = []


def define(schema: str):
    """Register the decorated function as the operator `schema` on every device."""

    def register(implementation):
        implementation = torch.no_grad()(implementation)
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        OPERATORS.append(name)
        return implementation

    return register


def fake(name: str):
    """Register the decorated function as what the operator `name` returns without data."""
    return torch.library.register_fake(f"imbsam_fast::{name}", lib=LIBRARY)


def mutated(*lists: Sequence[Tensor]) -> None:
    """Tell torch what a kernel wrote: autograd, and autocast, which keeps casts of weights."""
    increment_version([*itertools.chain.from_iterable(lists)])
    torch.clear_autocast_cache()


def run(
    implementation: Callable[..., None],
    operator: Callable[..., None],
    read: list[Any] | None,
    arguments: tuple[Any, ...],
) -> None:
    """The implementation at once, or through torch's dispatcher.

    `read` stands for the lists among the arguments, which come first, and for master, the last one;
    None asks for the dispatcher.
    """
    if read is None:
        operator(*arguments)
    else:
        *lists, master = read
        implementation(*lists, *arguments[len(lists) : -1], master)
