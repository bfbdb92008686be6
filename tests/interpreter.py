"""Triton's interpreter, as the tests of the Triton kernels need it on a machine without a GPU."""

from __future__ import annotations

import os
from typing import Any

import torch

from imbsam_fast import ops
from imbsam_fast.ops.dispatch import use_backend


def use_the_interpreter() -> None:
    """Make Triton run kernels on the CPU; to be called before anything imports triton."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        from triton.runtime import interpreter
    except ImportError:  # no triton or no numpy: the backend is not available then
        return
    _check_alignment(interpreter)
    _round_to_bfloat16(interpreter)
    _patch_once(interpreter)


def interpreter_error() -> str | None:
    """What keeps the interpreter from running a kernel: older tritons break on newer NumPys."""
    try:
        with use_backend("triton"):
            ops.squared_norm([torch.ones(3)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check_alignment(interpreter: Any) -> None:
    """Fail where a GPU would: at 16-byte accesses that are promised to be aligned and are not."""
    set_attr = interpreter.TensorHandle.set_attr

    def checked(self: Any, name: str, values: list[int]) -> None:
        if name == "tt.divisibility" and self.data.flat[0] % values[0]:
            raise RuntimeError(f"address {self.data.flat[0]} is not a multiple of {values[0]}")
        set_attr(self, name, values)

    interpreter.TensorHandle.set_attr = checked


def _round_to_bfloat16(interpreter: Any) -> None:
    """Round to the nearest, as GPUs do: the interpreter drops bits of float32 instead."""
    convert = interpreter._convert_float

    def rounded(x: Any, from_: Any, to: Any, mode: Any) -> Any:
        if (from_.name, to.name) != ("fp32", "bf16"):
            return convert(x, from_, to, mode)
        nearest = torch.tensor(x).bfloat16()
        return nearest.view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = rounded


def _patch_once(interpreter: Any) -> None:
    """Halve the time of a kernel.

    The interpreter prepares triton.language again at every call of one jit function by another,
    though the launch, or the first such call, has done so.
    """
    call = interpreter.InterpretedFunction.__call__
    language = interpreter.tl

    def call_prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        uses = [m for m in self.fn.__globals__.values() if m is language or m is language.core]
        if any(language.core.is_builtin(module.arange) for module in uses):
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_prepared
