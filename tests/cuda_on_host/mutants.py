"""Whether the checks here would see a wrong kernel: `python -m cuda_on_host.mutants [kernel ...]`,
from tests/.

Changes nvcc's PTX of the float32 kernels one instruction at a time: every barrier is removed,
operators become others, addresses in shared memory, shuffles and special registers move; of the
kernels that add up the losses of rows the barriers alone. A mutant that runs to its end with the
bits of the unchanged kernel, under several orders of warps, survives; what is known to change
nothing is named in HARMLESS. Prints the others, and fails on one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from cuda_on_host import build
from cuda_on_host.translate import Mutation
from torch import Tensor

from imbsam_fast.ops import native_cuda

ARCHITECTURE = "compute_90"
SECONDS = 20  # of CPU time, after which a mutant counts as caught in an endless loop
SEEDS = (1, 2, 3)

# How a kernel's name begins -> a part of the source line (of the file's name where that is not
# ours), and where not all of the line's instructions are meant what the instruction matches -> why
# the change is harmless.
Line = str | tuple[str, str]
_ONE_SUM: dict[Line, str] = {
    "of_warp may be written again": "the kernel reduces once: nobody writes of_warp again"
}
_LOADED = "whether a single is loaded; whether it is added is asked again"
_NEXT_ROW = "what the next row's block writes afterwards (memcheck sees it in the last row)"
_NO_PACKS = "other elements go without packs"
_BEHIND = "behind the tensor, which no check of bits sees (memcheck does)"
_LOWER_HALF = "the lower half of a double: less than a float keeps"
_FULL = "all warps are there, and other lanes do not reach the first"
_SINGLES = "single elements, added in the same order"
_SUMS: dict[Line, str] = {
    ("middle = (tensor + after) / 2", r"add\.s32"): "of numbers above 0",
    ("start ? start + at.begin", r"add\.s64"): "compared with null; where it is read it is caught",
    ("aligned = bits % 16 == 0", r"and\.b64 .*, 15"): _SINGLES,
    ("const int whole = aligned ?", r"add\.s32|shr\.u32 .*, 30"): "of numbers above 0",
    ("v < whole; v += kBlock", r"setp\.\w+\.[su]32"): _SINGLES,
    ("v * lanes < elements", r"setp\.\w+\.s32"): "where nothing is left",
    "return {h[0], l[0], zero ||": "at the bounds themselves either way is right",
    "warps = blockDim.x / 32": _FULL,
    "lane < warps ?": _FULL,
}
_ROWS: dict[Line, str] = {
    "const int whole = (classes - before) / lanes": "of numbers above 0",
    "assert(target >= 0": "of labels in range",
}
_LOSSES_OF_ROWS: dict[Line, str] = {
    "if (higher > max) raise(higher)": "raised to where it was",
    "const bool has_single": _LOADED,
    "singles = classes - packs * lanes": _LOADED,
    "if (v < layout.packs) add(v": "adds packs that are not there",
    "v + u * stride < layout.packs) {": "the first pack of a round is there",
    "const double log_sum = log(": "nvcc's log: less than a float keeps",
    "return max == -(S)INFINITY ? S(0)": "there is no sum to be shifted yet",
    "sm_30_intrinsics.hpp": _LOWER_HALF,
    ("single, w ? w + k : nullptr", r"add\.s64"): "compared with null",
}
_GRADIENTS_OF_ROWS: dict[Line, str] = {
    **_ROWS,
    "if (threadIdx.x == 0) shared =": "all others would write the same",
    "packs = whole > 0 ? whole": "a row has as many classes",
    "singles = classes - packs * lanes": _NEXT_ROW,
    "v < layout.packs; v += blockDim.x": _NEXT_ROW,
    "j < layout.singles; j +=": _NEXT_ROW,
    "v + stride < layout.packs; v += 2": _NEXT_ROW,
    "if (v < layout.packs) write": _NEXT_ROW,
    "before = before < classes ?": _NO_PACKS,
    "reinterpret_cast<uint4*>(p)[i]": "a shift by a part of a word, where no float begins",
    "const int to_aligned": _NO_PACKS,
    "layout(dz, classes, after != 0)": _NO_PACKS,
    "classes, stride = blockDim.x": "of fewer singles than threads",
}
HARMLESS: dict[str, dict[Line, str]] = {
    "": {"return expf(x)": "nvcc's expf: another multiple of log 2, or less than a float rounds"},
    "perturb_kernel": {
        **_ONE_SUM,
        "warps = blockDim.x / 32": _FULL,
        "lane < warps ?": _FULL,
        "sm_30_intrinsics.hpp": _LOWER_HALF,
        "i < count; i += kThreads": "whether four are added at once",
        "S(1) / ((S)sqrt(squared_norm) + S(1e-16))": "1e-16 is less than a float keeps",
        "const int whole = aligned ?": "of numbers above 0",
        "e < elements; e += kBlock": "where nothing is left",
        "i < tiles; i += gridDim.x": "a block has one tile",
        "aligned = bits % 16 == 0": _NO_PACKS,
        "middle = (tensor + after) / 2": "of numbers above 0",
        "table.numel[tensor] - begin": _BEHIND,
        "left < tile_elements ? left": _BEHIND,
    },
    "squared_norm_kernel": _SUMS,
    "grad_check_kernel": _SUMS,
    "row_losses_kernel": {
        **_ROWS,
        **_ONE_SUM,
        **_LOSSES_OF_ROWS,
    },
    "row_losses_kernelfLb0E": {"(1 - s.label_smoothing)": "it is 0"},
    "soft_row_losses_kernelfLb0E": {
        ("(1 - s.label_smoothing)", r"sub\.f64|0d0{16}"): "it is 0, as is what is added",
    },
    "soft_row_losses_kernel": {
        **_ROWS,
        **_ONE_SUM,
        **_LOSSES_OF_ROWS,
        ("if (warp == 0) {", r"setp"): "another warp finds the same maximum",
        ("first < classes; first +=", r"setp"): "a round of nothing",
        ("label[u] = k < classes", r"setp"): "the first of a round is there",
        ("weighted[part] += share", "0f00000000"): "adds to 0",
        ("mass[part] += share", "0f00000000"): "adds to 0",
    },
    "row_gradients_kernel": _GRADIENTS_OF_ROWS,
    "soft_gradients_kernel": {
        **_GRADIENTS_OF_ROWS,
        ("first < classes;", r"setp"): "a round of nothing",
        ("logit[u] = k < classes", r"setp"): "of no class, for which nothing is written",
        ("const int k = first + u", r"add\.s32 .*, (64|96)"): "the same, compared with the classes",
        ("soft_cross_entropy.cu", r"shl\.b32 .*, 2"): "rounds overlap, and write the same",
    },
}


def numbers(*sizes: int, seed: int = 0, shift: int = 0) -> list[Tensor]:
    """Normal float32 tensors, `shift` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n + shift, generator=generator)[shift:] for n in sizes]


def sums(kernel: str) -> list[Tensor]:
    found = []
    # Sums of squares of packs on both sides of what floats are added up for: nearly all of them
    # inside, and mixed at the lower and at the upper bound. Of whole packs threads take 16, 6, 5, 4
    # or none. Behind each tensor are 4 elements of its kind.
    for shift, factor in product((0, 1), (1, 3e-15, 4e18)):
        sizes = 33_001, 11_003, 8195, 8196, 130, 3, 64
        lists = [numbers(*(n + 4 for n in sizes), seed=i, shift=shift) for i in range(2)]
        for t in (*lists[0], *lists[1]) if kernel.startswith("grad_check") else lists[0]:
            t *= factor
            t[len(t) // 3 : len(t) // 2] = 0
            for some in (t[len(t) // 2 : len(t) * 2 // 3], t[len(t) * 5 // 6 : -8]):
                some[torch.arange(len(some)) % 5 > 0] = 0  # packs of one number, in every lane
            for u in range(len(t) // 2048 if factor == 1 else 0):  # a few threads' every fourth
                t[2048 * u + 200 * (u % 4) :][:20] *= 1e-30
            if factor == 1:  # the last pack too, which is all of the smallest
                t[-8:] *= 1e-30
        g, theta = ([t[:-4] for t in tensors] for tensors in lists)
        # One element decides whether the last pack of a thread that reads others again fits.
        for one, other in zip(g[2:4], theta[2:4]) if factor == 1 else ():
            one[8192:], other[8192:] = 1e-30, 0
            one[-1] = 1
        if kernel.startswith("squared_norm"):
            found += [native_cuda.squared_norm(g), native_cuda.squared_norm(g, theta)]
            found.append(native_cuda.squared_norm(g[4:6]))
            continue
        found += [*native_cuda.grad_check(g, theta), *native_cuda.grad_check([], theta)]
        found += native_cuda.grad_check(g[2:6], theta[2:6])
        found += native_cuda.grad_check(theta[2:4], g[2:4])
        for lane in range(4 if factor == 1 else 0):
            infinite = [t.clone() for t in theta]
            infinite[0][10_440 + lane] = float("inf")  # of a thread that reads a later pack again
            found += native_cuda.grad_check(g, infinite)
    return found


def perturbed(kernel: str) -> list[Tensor]:
    found = []
    shifts = ((0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 1), (0, 0, 1))
    for count, subtracts, of_lists in product((1, 33, 300, 1100), (False, True), shifts):
        sizes = (9001, 33, 257, 4352, 513, 64)[: 6 if any(of_lists) else 2]
        theta, g, held = (numbers(*sizes, seed=i, shift=s) for i, s in enumerate(of_lists))
        (partials,) = numbers(count, seed=2)
        partials = partials.double().square()
        native_cuda.perturb_(
            theta, g, partials, 0.05, adaptive=count == 33, held=held if subtracts else ()
        )
        found += [*theta, *g, *held]
    return found


# Rows, classes, label smoothing. Rows of 1,003 begin at every place beside an aligned one. In the
# row of 15,000 threads meet a higher maximum in each of their loops, without class weights.
# Rows of 1,004 and 15,001 have a spike each. More rows than a block adds up take long, and only the
# kernels that add up rows need them.
ROWS = (
    *((5, 1003, 0.0), (14, 1003, 0.1), (15, 1003, 0.1), (16, 1003, 0.0)),
    *((1, 15_000, 0.0), (1, 15_000, 0.1), (9, 7, 0.1), (5, 2, 0.1)),
    *((43, 1004, 0.0), (43, 1004, 0.1), (1, 15_001, 0.0), (1, 15_001, 0.1)),
)
MANY_ROWS = ((9300, 3, 0.0),)  # of which the last of two blocks has an odd share


def rows_of_logits(rows: int, classes: int, smoothing: float) -> Tensor:
    """Whose running maximum rises all along a row, never after its begin, or is met at its end."""
    shift = rows % 4 if classes == 1003 else int(classes != 1004 or smoothing == 0)
    logits = numbers(rows * classes, seed=classes, shift=shift)[0].reshape(rows, classes)
    slope = torch.linspace(0, 6, classes)
    logits[1 % rows :: 3] += slope
    logits[2::3] -= slope
    logits[0::3, -2:] += 9  # a maximum that no pack has
    # Of which exp is infinite, where it is not seen to be the maximum.
    if classes == 1004:
        logits[range(rows), spikes(3 * shift)] += 200
    if classes == 15_001:
        logits[0, 3 + 4 * 511] += 200  # the last thread's
    return logits


def spikes(before: int) -> list[int]:
    """In rows of 1,004 logits, of which 64 threads take packs from `before` on, 4 at a time.

    All places of thread 0, and of two threads whose last round has fewer packs; one of a thread
    whose number has all bits; two elements outside of packs.
    """
    packs = [t + 64 * u for t in (0, 58, 60) for u in range(4) if t + 64 * u < 250]
    return [*(before + 4 * pack + j for pack in packs for j in range(4)), before + 4 * 63, 0, 1003]


def losses(kernel: str) -> list[Tensor]:
    found = []
    for rows, classes, smoothing in MANY_ROWS if kernel.startswith("sum_") else ROWS:
        logits = rows_of_logits(rows, classes, smoothing)
        # In every lane of a pack, in every pack that a thread takes, and beside the packs.
        targets = (73 * torch.arange(rows) + 5) % classes
        targets[-1:] = 0
        if classes == 1004:
            targets = torch.tensor(spikes(0))
        targets[1:2] = -100
        plain, sharp, weight = (w.abs() for w in numbers(classes, classes, classes, seed=3))
        plain[0] = 0
        rest = plain, sharp, weight if rows > 1 else None, smoothing, -100
        head, tail, b, lse = native_cuda.split_cross_entropy(logits, targets, *rest, None)
        found += [head, tail, b, lse]
        if kernel.startswith("sum_"):
            continue
        gradient = native_cuda.split_cross_entropy_backward(
            torch.ones(()), torch.full((), 2.0), logits, targets, lse, b, *rest
        )
        alone = native_cuda.split_cross_entropy_backward(
            torch.ones(()), None, logits, targets, lse, b, *rest
        )
        found += [gradient, alone]
    return found


def soft_losses(kernel: str) -> list[Tensor]:
    found = []
    # Rows that end at each of the elements that a thread takes at once.
    ends = tuple((5, 32 * u + 5, s) for u in range(8) for s in (0.0, 0.1))
    for rows, classes, smoothing in MANY_ROWS if kernel.startswith("sum_") else ROWS + ends:
        logits = rows_of_logits(rows, classes, smoothing)
        q = numbers(rows * classes, seed=classes + 1)[0].reshape(rows, classes).abs()
        q[1:2] = q[:, 3::4] = q[2:3, :-1] = 0  # row 2: its last class alone
        plain, sharp, weight = (w.abs() for w in numbers(classes, classes, classes, seed=3))
        plain[:1] = plain[4:5] = sharp[4:5] = 0
        if not smoothing:  # of a class that q has not, and of one without weight
            logits[:, 3:5] = -float("inf")
        rest = plain, sharp, weight if rows > 1 else None, smoothing
        head, tail, b, of_rows = native_cuda.split_soft_cross_entropy(logits, q, *rest, None)
        found += [head, tail, b, of_rows]
        if kernel.startswith("sum_"):
            continue
        found += [
            native_cuda.split_soft_cross_entropy_backward(
                torch.ones(()), other, logits, q, of_rows, b, *rest
            )
            for other in (None, torch.full((), 2.0))
        ]
    return found


# Source -> what runs its kernels, one of which is named.
CHECKS: dict[str, Callable[[str], list[Tensor]]] = {
    "squared_norm": sums,
    "perturb": perturbed,
    "soft_cross_entropy": soft_losses,
    "split_cross_entropy": losses,
}


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def survives(
    number: int, mutant: ctypes.c_int, host: build.Host, check: Callable, right: list
) -> bool:
    """Runs a mutant in a process of its own."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        faulthandler.disable()  # pytest's tells of a mutant's crash at length
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        mutant.value = number
        for seed in SEEDS:
            host.seed(seed)
            if bits(check()) != right:
                os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def source_line(mutation: Mutation) -> str:
    found = [p for p in build.CSRC.rglob(mutation.file) if mutation.file and mutation.line]
    return found[0].read_text().splitlines()[mutation.line - 1].strip() if found else ""


def reason_harmless(mutation: Mutation) -> str | None:
    line = source_line(mutation)
    for kernel, reasons in HARMLESS.items():
        if not mutation.kernel.startswith(kernel):
            continue
        for where, why in reasons.items():
            part, instruction = (where, "") if isinstance(where, str) else where
            text = " ".join(mutation.instruction.split())
            if part in (line or mutation.file) and re.search(instruction, text):
                return why
    return None


def survivors(
    host: build.Host, name: str, wanted: Callable[[Mutation], bool] = lambda mutation: True
) -> Iterator[tuple[Mutation, bool]]:
    """Each mutation of the float32 kernels of a source that is wanted, and whether it survives."""
    text = build.ptx_of(build.CSRC / f"cuda/{name}.cu", ARCHITECTURE)
    library = build.build_ptx(host.path, text, r"_kernelf", mutable=True)
    (loaded,) = host.run_ptx([library])
    mutant = ctypes.c_int.in_dll(loaded, "mutant")
    for kernel in library.kernels:
        check = functools.partial(CHECKS[name], kernel.key)
        right = bits(check())
        for mutation in filter(wanted, kernel.mutations):
            # Most of what they are made of is for more rows than a check can have.
            if kernel.key.startswith("sum_") and mutation.kind != "barrier":
                continue
            yield mutation, survives(mutation.number, mutant, host, check, right)
    host.run_sources()


def prepared() -> build.Host:
    torch.set_num_threads(1)  # a forked process has one
    # New memory is not-a-number then: what is not written shows.
    torch.use_deterministic_algorithms(True)
    host = build.Host(build.build_sources())
    native_cuda._C = host.module
    native_cuda._on = lambda device: (0, 0)
    return host


def main(names: list[str]) -> None:
    host, unknown = prepared(), 0
    for name in names or CHECKS:
        caught = {kind: [0, 0] for kind in ("barrier", "operator", "index")}
        for mutation, survived in survivors(host, name):
            caught[mutation.kind][survived] += 1
            why = reason_harmless(mutation) if survived else None
            unknown += survived and why is None
            if survived:
                where = f"{mutation.file}:{mutation.line}"
                print(f"{mutation.kind} {where} {mutation.kernel}: {mutation.instruction}")
                print(
                    f"    {source_line(mutation)}\n    {why or 'NOT KNOWN TO BE HARMLESS'}",
                    flush=True,
                )
        for kind, (dead, alive) in caught.items():
            print(f"{name}, {kind}: {dead} of {dead + alive} caught", flush=True)
    sys.exit(unknown > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1:])
