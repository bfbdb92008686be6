"""Compiles every Triton kernel ahead of time and prints what the machine code holds, as JSON.

Run by test_triton_compile.py in a process of its own: where TRITON_INTERPRET is set, triton
decorates kernels for its interpreter, and those cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from cuda_on_host import translate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from imbsam_fast.kernels import (
    launch,
    multi_tensor,
    soft_cross_entropy,
    split_cross_entropy,
    updates,
)
from imbsam_fast.ops.reference import arithmetic_dtype

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

TABLE = {"spans": "*i64", "addresses": "*i64"}
LISTS = {"SAVED": True, "HEAD": True}


# Operations that take master weights.
KEEPING = ("perturb_", *updates.UPDATES)

CROSS_ENTROPY = {
    "row_losses": split_cross_entropy.FORWARD,
    "backward": split_cross_entropy.BACKWARD,
    "soft_row_losses": soft_cross_entropy.FORWARD,
    "soft_backward": split_cross_entropy.BACKWARD,
}

CONFIGURATIONS = {
    **multi_tensor.CONFIGURATIONS,
    **{op: update.configuration for op, update in updates.UPDATES.items()},
}

Arguments = dict[str, Any]  # name -> a type, or a compile-time value


def update_arguments(update: updates.Update) -> Arguments:
    """Of a fused base, every list there: the scalars are annotated, the flags are its own."""
    scalars = {p.name: "fp64" for p in update.kernel.params if p.annotation == "fp64"}
    pointers = {"counts": "*fp32", "lr_tensor": "*fp64", "grad_scale": "*fp32"}
    flags = {p.name: True for p in update.kernel.params if p.is_constexpr}
    return {**flags, **scalars, **pointers, **TABLE, "found_inf": "*fp32"}


def multi_tensor_kernels() -> dict[str, tuple[Any, Arguments]]:
    return {
        "squared_norm": (
            multi_tensor.squared_norm_kernel,
            {**TABLE, "partials": "*fp64", "ADAPTIVE": True},
        ),
        "perturb_": (
            multi_tensor.perturb_kernel,
            {**TABLE, "scale": "*arithmetic", "ADAPTIVE": True, "MASTER": False, "HELD": False},
        ),
        **{op: (update.kernel, update_arguments(update)) for op, update in updates.UPDATES.items()},
        "merge_": (multi_tensor.merge_kernel, {**TABLE, **LISTS}),
        "grad_check": (
            multi_tensor.grad_check_kernel,
            {**TABLE, "partials": "*fp64", "found_inf": "*fp32", "HEAD": True},
        ),
    }  # fmt: skip


def cross_entropy_kernels(data: str, weights: str) -> dict[str, tuple[Any, Arguments]]:
    row = {"logits": data, "targets": "*i64", "lse": weights, "plain": weights}
    row |= {"sharp": weights, "class_weight": weights, "classes": "i32", "row_stride": "i32"}
    row |= {"label_smoothing": "fp64", "ignore_index": "i32", "SMOOTHED": True}
    labels = ("targets", "lse", "ignore_index")
    soft = {name: given for name, given in row.items() if name not in labels}
    soft |= {"q": weights, "q_stride": "i32", "row_numbers": weights}
    return {
        "soft_row_losses": (
            soft_cross_entropy.soft_row_losses_kernel,
            {**soft, "losses": "*fp64", "rows": "i32"},
        ),
        "soft_backward": (
            soft_cross_entropy.soft_backward_kernel,
            {**soft, "grad_head": weights, "grad_tail": weights, "b": weights,
             "weight_sum": "*fp64", "grad_logits": data,
             "SPAN": split_cross_entropy.BACKWARD_SPAN},
        ),
        "row_losses": (
            split_cross_entropy.row_losses_kernel,
            {**row, "losses": "*fp64", "rows": "i32"},
        ),
        "backward": (
            split_cross_entropy.backward_kernel,
            {**row, "grad_head": weights, "grad_tail": weights, "b": weights,
             "weight_sum": "*fp64", "grad_logits": data,
             "SPAN": split_cross_entropy.BACKWARD_SPAN},
        ),
    }  # fmt: skip


def cases(dtypes: Iterable[torch.dtype]) -> Iterator[tuple[str, tl.dtype, Any, Arguments, int]]:
    """Operation, dtype, kernel, arguments and threads, for all that the package launches."""
    for torch_dtype in dtypes:
        dtype = launch.DTYPES[torch_dtype]
        arithmetic = launch.DTYPES[arithmetic_dtype(torch_dtype)]
        types = {"DTYPE": dtype, "KEPT": dtype, "ARITHMETIC": arithmetic}
        for op, (kernel, arguments) in multi_tensor_kernels().items():
            _, block, threads = CONFIGURATIONS[op]
            arguments = {**arguments, **types, "BLOCK": block}
            if "scale" in arguments:
                arguments["scale"] = f"*{arithmetic.name}"
            yield op, dtype, kernel, arguments, threads
            if op == "perturb_":
                yield f"{op} held", dtype, kernel, {**arguments, "HELD": True}, threads
            if op in KEEPING and dtype in (tl.bfloat16, tl.float16):  # with master weights
                arguments |= {"KEPT": arithmetic, "MASTER": True}
                yield f"{op} master", dtype, kernel, arguments, threads
        pointers = f"*{dtype.name}", f"*{arithmetic.name}"
        for op, (kernel, arguments) in cross_entropy_kernels(*pointers).items():
            for _, block, threads in CROSS_ENTROPY[op]:
                yield op, dtype, kernel, {**types, **arguments, "BLOCK": block}, threads
    for arithmetic in (tl.float32, tl.float64):
        arguments = dict.fromkeys(("head", "tail", "b"), f"*{arithmetic.name}")
        arguments |= {"losses": "*fp64", "targets": "*i64", "rows": "i32", "ignore_index": "i32"}
        arguments |= {"batch_size": "fp64", "BLOCK": split_cross_entropy.TOTALS_BLOCK}
        kernel = split_cross_entropy.totals_kernel
        yield "totals", arithmetic, kernel, arguments, split_cross_entropy.TOTALS_THREADS
        soft = {k: v for k, v in arguments.items() if k not in ("targets", "ignore_index")}
        kernel = soft_cross_entropy.soft_totals_kernel
        yield "soft_totals", arithmetic, kernel, soft, split_cross_entropy.TOTALS_THREADS
        arguments = {"partials": "*fp64", "scale": f"*{arithmetic.name}", "count": "i32"}
        arguments |= {"rho": "fp64", "ARITHMETIC": arithmetic, "BLOCK": multi_tensor.PARTIALS_BLOCK}
        yield (
            "scale",
            arithmetic,
            multi_tensor.scale_kernel,
            arguments,
            multi_tensor.PARTIALS_THREADS,
        )


def compiled(kernel: Any, arguments: Arguments, threads: int, target: GPUTarget) -> Any:
    arguments = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    assert list(arguments) == kernel.arg_names, set(kernel.arg_names) - set(arguments)
    is_type = {name: isinstance(value, str) for name, value in arguments.items()}
    signature = {n: v if is_type[n] else "constexpr" for n, v in arguments.items()}
    constants = {n: v for n, v in arguments.items() if not is_type[n]}
    # As at a launch: memory from torch's allocator is aligned.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, type_ in enumerate(signature.values())
        if type_.startswith("*")
    }
    options = launch.launch_options(threads) | {"num_warps": max(1, threads // target.warp_size)}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def not_translated(ptx: str) -> str | None:
    """The instruction for which tests/cuda_on_host/ cannot run a kernel."""
    try:
        translate.kernels(ptx)
    except NotImplementedError as error:
        return str(error)
    return None


def ptx_facts(binary: Any) -> dict[str, Any]:
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    wide = r"\S*\.(?:v4\.\w32|v2\.\w64)"
    return {
        "wide_loads": len(re.findall(rf"ld\.global{wide}", ptx)),
        "wide_stores": len(re.findall(rf"st\.global{wide}", ptx)),
        "fused": len(re.findall(r"\bfma\.rn\.f(?:32|64)", ptx)),
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "not_translated": not_translated(ptx),
    }


def amdgcn_facts(binary: Any) -> dict[str, Any]:
    code = binary.asm["amdgcn"]
    used = {
        name: int(re.findall(rf"\.{name}:\s+(\d+)", code)[0])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count",
                     "private_segment_fixed_size")
    }  # fmt: skip
    return {
        "wide_loads": len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", code)),
        "wide_stores": len(re.findall(r"(?:global|buffer|flat)_store_dwordx4", code)),
        "fused": None,  # fma also carries out plain products and sums of mixed dtypes
        "registers": used.pop("vgpr_count"),
        "spilled": sum(used.values()),
    }


def main() -> None:
    target = TARGETS[sys.argv[1]]
    # sm_80 differs from sm_90 in nothing that these kernels use: two dtypes show that.
    dtypes = (torch.float32, torch.bfloat16) if sys.argv[1] == "sm_80" else launch.DTYPES
    found = []
    for op, dtype, kernel, arguments, threads in cases(dtypes):
        binary = compiled(kernel, arguments, threads, target)
        facts = ptx_facts(binary) if target.backend == "cuda" else amdgcn_facts(binary)
        block = arguments["BLOCK"]
        facts["bytes_per_thread"] = block * dtype.primitive_bitwidth // 8 // threads
        found.append({"op": op, "block": block, "dtype": dtype.name, **facts})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
