"""Whether the checks of the PTX would see a wrong kernel: mutants of perturb_, all its barriers.

Those of other kernels too: `python -m cuda_on_host.mutants` in tests/, in minutes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch
from cuda_on_host import build
from cuda_on_host.translate import Mutation

if (missing := build.reason_unavailable()) is not None:
    pytest.skip(missing, allow_module_level=True)

from cuda_on_host import mutants

from imbsam_fast.ops import native_cuda

pytestmark = pytest.mark.slow  # compiles the CUDA sources

SHARE = 40  # one of so many operators and indices


@pytest.fixture(scope="module")
def host() -> Iterator[build.Host]:
    before = native_cuda._C, native_cuda._on
    threads = torch.get_num_threads()
    yield mutants.prepared()
    native_cuda._C, native_cuda._on = before
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def is_drawn(mutation: Mutation) -> bool:
    text = f"{mutation.kernel} {mutation.instruction} {mutation.line}"
    return mutation.kind == "barrier" or zlib.crc32(text.encode()) % SHARE == 0


def test_mutants_are_caught(host: build.Host) -> None:
    barriers, unknown = 0, []
    for mutation, survived in mutants.survivors(host, "perturb", is_drawn):
        barriers += mutation.kind == "barrier"
        if survived and mutants.reason_harmless(mutation) is None:
            unknown.append(f"{mutation} {mutants.source_line(mutation)}")
    assert barriers == 6  # three in each of two kernels: with a held gradient and without
    assert not unknown, "\n".join(unknown)
