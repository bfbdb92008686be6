"""The compiled module; 0 is the address of an absent tensor, [] an absent list.

See csrc/imbsam.h for what each function does. Raises ValueError for lists that cannot be right.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

class TensorList:  # stands for a sequence of tensors wherever Pointers or Sizes are taken
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Tensor: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    dtype_code: int
    chunks: int

# One tensor or address a parameter.
Pointers = Sequence[Tensor | int] | TensorList
Sizes = list[int] | TensorList

has_cuda: bool

def connect(tensor: type, parameter: type) -> bool: ...
def read_lists(lists: Sequence[Sequence[Tensor]]) -> list[TensorList] | None: ...
def take_gradients(params: list[Tensor]) -> list[Tensor | None] | None: ...
def all_alone(tensors: Sequence[Tensor | None]) -> bool: ...

# A phase in one call, False where Python has to look; pending is imbsam_fast.optim's, which notes
# what was written. groups: how many parameters each has; versions: those of MasterWeights, None
# without; threads: 0 for CUDA.
def perturb_all(
    groups: list[int],
    params: list[Tensor],
    g_t: list[Tensor | None],
    state: Any,
    versions: dict[Tensor, list[int]] | None,
    rho: list[float],
    adaptive: list[bool],
    empty: Callable[[int], Tensor],
    pending: Any,
    threads: int,
    device: int,
    stream: int,
) -> bool: ...

# The tensors of an update, read and checked: None where Python has to look. lists: saved, g_h, g_p;
# names: those in state[p], which of them each group wants, and whether "step" is there too;
# is_scaled: grad_check is wanted, or scalars on a device.
def read_update(
    groups: list[int],
    params: list[Tensor],
    lists: Sequence[list[Tensor | None]],
    state: Any,
    names: Sequence[str],
    wanted: list[list[bool]],
    step: bool,
    versions: dict[Tensor, list[int]] | None,
    is_scaled: bool,
) -> Phase | None: ...

class Phase:
    @property
    def is_double(self) -> bool: ...
    def grad_check(
        self,
        empty: Callable[[int], Tensor],
        found_inf: Tensor | None,
        threads: int,
        device: int,
        stream: int,
    ) -> tuple[Tensor, bool]: ...
    # settings: those of update_ for each group; the last two numbers are addresses on a device.
    def update(
        self,
        op: str,
        lr: list[float],
        settings: Sequence[Sequence[float]],
        maximize: list[bool],
        grad_scale: float,
        skip: bool,
        grad_scale_at: int,
        found_inf_at: int,
        pending: Any,
        threads: int,
        device: int,
        stream: int,
    ) -> None: ...

def state_of(
    state: dict[Tensor, Any], params: list[Tensor], name: str, needed: Sequence[Tensor | None]
) -> list[Tensor | None] | None: ...
def partition(
    sizes: list[int], params: list[Tensor], lists: Sequence[Sequence[Tensor | None]]
) -> list[tuple[int, Sequence[int]]] | None: ...
def occupancy(slots: Sequence[Tensor | None]) -> bool | None: ...
def pairs_match(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool: ...
def isas() -> list[str]: ...
def isa_in_use() -> str: ...
def use_isa(name: str) -> None: ...
def has_openmp() -> bool: ...
def last_level_cache_bytes() -> int: ...
def squared_norm(
    dtype: int, numel: Sizes, g_t: Pointers, theta: Pointers, partials: int, threads: int
) -> None: ...
def perturb_(
    dtype: int,
    numel: Sizes,
    theta: Pointers,
    g_t: Pointers,
    master: Pointers,
    held: Pointers,
    partials: int,
    partial_count: int,
    rho: float,
    adaptive: bool,
    threads: int,
) -> None: ...
def needs_counts(op: str) -> bool: ...

# op: the operator of a base, such as "sgd_update_"; settings: those after lr, without maximize.
def update_(
    op: str,
    dtype: int,
    numel: Sizes,
    theta: Pointers,
    saved: Pointers,
    g_h: Pointers,
    g_p: Pointers,
    state: Sequence[Pointers],
    master: Pointers,
    step: Pointers,
    step_dtype: int,
    lr: float,
    settings: Sequence[float],
    maximize: bool,
    grad_scale: float,
    skip: bool,
    threads: int,
) -> None: ...
def merge_(
    dtype: int,
    numel: Sizes,
    theta: Pointers,
    saved: Pointers,
    g_h: Pointers,
    g_p: Pointers,
    threads: int,
) -> None: ...
def grad_check(
    dtype: int, numel: Sizes, g_h: Pointers, g_p: Pointers, partials: int, threads: int
) -> bool: ...
def split_cross_entropy(
    dtype: int,
    rows: int,
    classes: int,
    row_stride: int,
    logits: int,
    targets: int,
    plain: int,
    sharp: int,
    class_weight: int,
    label_smoothing: float,
    ignore_index: int,
    batch_size: float | None,
    head: int,
    tail: int,
    b: int,
    lse: int,
    threads: int,
) -> None: ...
def split_cross_entropy_backward(
    dtype: int,
    rows: int,
    classes: int,
    row_stride: int,
    grad_head: float,
    grad_tail: float,
    logits: int,
    targets: int,
    lse: int,
    b: float,
    plain: int,
    sharp: int,
    class_weight: int,
    label_smoothing: float,
    ignore_index: int,
    grad_logits: int,
    threads: int,
) -> None: ...
def split_soft_cross_entropy(
    dtype: int,
    rows: int,
    classes: int,
    row_stride: int,
    logits: int,
    q: int,
    q_stride: int,
    plain: int,
    sharp: int,
    class_weight: int,
    label_smoothing: float,
    batch_size: float | None,
    head: int,
    tail: int,
    b: int,
    row_numbers: int,
    threads: int,
) -> None: ...
def split_soft_cross_entropy_backward(
    dtype: int,
    rows: int,
    classes: int,
    row_stride: int,
    grad_head: float,
    grad_tail: float,
    logits: int,
    q: int,
    q_stride: int,
    row_numbers: int,
    b: float,
    plain: int,
    sharp: int,
    class_weight: int,
    label_smoothing: float,
    grad_logits: int,
    threads: int,
) -> None: ...
def bandwidth(
    kind: str, stream: bool, a: int, b: int, c: int, numel: int, threads: int
) -> float: ...
def cuda_tiles(numel: list[int], tile_elements: int) -> list[tuple[int, int, int, int]]: ...

# Only where has_cuda. The addresses are on `device`, and `stream` is one of its streams.
def cuda_reason_unavailable() -> str | None: ...
def cuda_squared_norm(
    dtype: int,
    numel: Sizes,
    g_t: Pointers,
    theta: Pointers,
    partials: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_perturb_(
    dtype: int,
    numel: Sizes,
    theta: Pointers,
    g_t: Pointers,
    master: Pointers,
    held: Pointers,
    partials: int,
    partial_count: int,
    rho: float,
    adaptive: bool,
    device: int,
    stream: int,
) -> None: ...
def cuda_update_(
    op: str,
    dtype: int,
    numel: Sizes,
    theta: Pointers,
    saved: Pointers,
    g_h: Pointers,
    g_p: Pointers,
    state: Sequence[Pointers],
    master: Pointers,
    step: Pointers,
    lr: float,
    settings: Sequence[float],
    maximize: bool,
    grad_scale: float,
    skip: bool,
    lr_at: int,
    grad_scale_at: int,
    found_inf_at: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_merge_(
    dtype: int,
    numel: Sizes,
    theta: Pointers,
    saved: Pointers,
    g_h: Pointers,
    g_p: Pointers,
    device: int,
    stream: int,
) -> None: ...
def cuda_grad_check(
    dtype: int,
    numel: Sizes,
    g_h: Pointers,
    g_p: Pointers,
    partials: int,
    found_inf: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_split_cross_entropy(
    dtype: int,
    rows: int,
    classes: int,
    row_stride: int,
    logits: int,
    targets: int,
    plain: int,
    sharp: int,
    class_weight: int,
    label_smoothing: float,
    ignore_index: int,
    batch_size: float | None,
    losses: int,
    head: int,
    tail: int,
    b: int,
    lse: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_split_cross_entropy_backward(
    dtype: int,
    rows: int,
    classes: int,
    row_stride: int,
    grad_head: int,
    grad_tail: int,
    logits: int,
    targets: int,
    lse: int,
    b: int,
    plain: int,
    sharp: int,
    class_weight: int,
    weight_sum: int,
    label_smoothing: float,
    ignore_index: int,
    grad_logits: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_split_soft_cross_entropy(
    dtype: int,
    rows: int,
    classes: int,
    row_stride: int,
    logits: int,
    q: int,
    q_stride: int,
    plain: int,
    sharp: int,
    class_weight: int,
    label_smoothing: float,
    batch_size: float | None,
    losses: int,
    head: int,
    tail: int,
    b: int,
    row_numbers: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_split_soft_cross_entropy_backward(
    dtype: int,
    rows: int,
    classes: int,
    row_stride: int,
    grad_head: int,
    grad_tail: int,
    logits: int,
    q: int,
    q_stride: int,
    row_numbers: int,
    b: int,
    plain: int,
    sharp: int,
    class_weight: int,
    weight_sum: int,
    label_smoothing: float,
    grad_logits: int,
    device: int,
    stream: int,
) -> None: ...
