"""Sharpness and loss landscape of a trained model on chosen classes of its training set.

The results are plain values ready for JSON; None stands for a number that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import Images, generator
from ..metrics import BORDERS, GROUPS, group_of
from .hessian import (
    Hessian,
    Spectrum,
    hutchinson_trace,
    lanczos,
    largest_eigenvalue,
    quadratic_forms,
    quadrature,
)
from .landscape import (
    filter_normalised_direction,
    group_losses,
    losses_on_grid,
    symmetric_steps,
)
from .settings import HESSIAN, LANDSCAPE, AnalysisSettings

PARTS = ("head", "tail")
PROBES_AT_ONCE = 4  # share the graph of one gradient

# What random numbers are for, part of the key of each generator.
ROWS, START, TRACE, DENSITY, DIRECTIONS = range(5)

Tick = Callable[[], None]


class Sample(NamedTuple):
    """Training images of some classes, without augmentation, on the model's device."""

    classes: list[int]
    batches: list[tuple[Tensor, Tensor]]
    rows: int
    available: int  # images of these classes in the training set


# ---------------------------------------------------------------- classes and images


def choose_classes(
    which: str, counts: Sequence[int], tail: Iterable[int], borders: tuple[int, int] = BORDERS
) -> list[int]:
    """The classes that `which` names: few, medium, many, head, tail, or a list such as 0,3,7-9.

    `counts` are the training images of each class, `tail` the tail classes, `borders` those of
    few and many. Raises ValueError for another name, an unknown class, or where there is none.
    """
    every = range(len(counts))
    if which in GROUPS:
        chosen = [k for k in every if group_of(counts[k], borders) == which]
    elif which in PARTS:
        is_tail = set(tail)
        chosen = [k for k in every if (k in is_tail) == (which == "tail")]
    else:
        chosen = _listed(which, len(counts))
    if not chosen:
        raise ValueError(f"classes is {which!r}, but no class of this data set is {which}")
    return chosen


def _listed(which: str, number: int) -> list[int]:
    chosen: set[int] = set()
    for part in which.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(
                f"classes is {which!r}, expected {', '.join((*GROUPS, *PARTS))} or a list of "
                "class numbers such as 0,3,7-9"
            )
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] >= number:
            raise ValueError(f"classes holds {part!r}, expected classes from 0 to {number - 1}")
        chosen.update(numbers)
    return sorted(chosen)


def in_ranges(classes: Sequence[int]) -> str:
    """[0, 1, 2, 7] as 0-2, 7."""
    starts = [classes[0], *(b for a, b in pairwise(classes) if b != a + 1)]
    ends = [*(a for a, b in pairwise(classes) if b != a + 1), classes[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


def draw(images: Images, classes: Sequence[int], settings: AnalysisSettings, device: str) -> Sample:
    """At most settings.rows images of `classes`, the same for equal seeds, batched for a model."""
    available = torch.isin(images.targets, torch.tensor(classes)).nonzero().squeeze(1)
    rows = available
    if 0 < settings.rows < len(available):
        shuffle = generator(settings.seed, ROWS, *classes)
        rows = available[torch.randperm(len(available), generator=shuffle)[: settings.rows]]
    batches = [
        (x.to(device), y.to(device))
        for x, y in images.batches(rows.split(settings.batch_size))
        if len(y)  # corrupt images may be left out
    ]
    return Sample(list(classes), batches, sum(len(y) for _, y in batches), len(available))


# ---------------------------------------------------------------- analyses


def hessian_analysis(
    model: nn.Module,
    sample: Sample,
    settings: AnalysisSettings,
    on_product: Tick = lambda: None,
) -> dict[str, Any]:
    """lambda_max, trace and spectral density of the Hessian of the mean cross-entropy of `sample`.

    In all parameters of `model`, frozen or not; its device and dtype are kept. `on_product` is
    called settings.hessian_ticks times.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(True)
    try:
        loss_sum = partial(F.cross_entropy, reduction="sum")
        hessian = Hessian(model, loss_sum, sample.batches, settings.batch_norm)
        top = _top(hessian, settings, on_product)
        trace = _trace(hessian, settings, on_product)
        density = _density(hessian, settings, on_product)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {
        "analysis": HESSIAN,
        "parameters": hessian.size,
        "lambda_max": top,
        "trace": trace,
        "density": density._asdict(),
    }


def _top(hessian: Hessian, settings: AnalysisSettings, on_product: Tick) -> dict[str, Any]:
    start = torch.randn(hessian.size, generator=generator(settings.seed, START))
    like = hessian.parameters[0]
    top = largest_eigenvalue(
        hessian.products,
        start.to(like.device, like.dtype),
        settings.lanczos_steps,
        settings.tolerance,
        on_product,
    )
    for _ in range(top.steps, settings.lanczos_steps):
        on_product()
    converged = top.error <= settings.tolerance * abs(top.value)
    return {**top._asdict(), "converged": converged}


def _trace(hessian: Hessian, settings: AnalysisSettings, on_product: Tick) -> dict[str, Any]:
    random = generator(settings.seed, TRACE)
    forms: list[float] = []
    while len(forms) < settings.trace_probes:
        number = min(PROBES_AT_ONCE, settings.trace_probes - len(forms))
        forms += quadratic_forms(hessian.products, hessian.random_signs(number, random))
        for _ in range(number):
            on_product()
    trace = hutchinson_trace(forms)._asdict()
    return {**trace, "error": finite(trace["error"])}


def _density(hessian: Hessian, settings: AnalysisSettings, on_product: Tick) -> Spectrum:
    random = generator(settings.seed, DENSITY)
    pairs = []
    for _ in range(settings.density_probes):
        (start,) = hessian.random_signs(1, random)
        found = lanczos(hessian.products, start, settings.lanczos_steps, on_step=on_product)
        pairs.append(quadrature(found))
        for _ in range(len(found.diagonal), settings.lanczos_steps):
            on_product()
    values, weights = zip(*pairs)
    return Spectrum(list(values), list(weights))


def landscape_analysis(
    model: nn.Module,
    samples: dict[str, Sample],
    num_classes: int,
    settings: AnalysisSettings,
    on_point: Tick = lambda: None,
) -> dict[str, Any]:
    """The mean cross-entropy of each of `samples`, by name, along one and over two directions.

    The samples share no class. `on_point` is called settings.landscape_ticks times.
    """
    groups = torch.zeros(len(samples), num_classes, dtype=torch.bool)
    for i, sample in enumerate(samples.values()):
        groups[i, sample.classes] = True
    losses_at = partial(
        group_losses,
        model,
        row_losses=partial(F.cross_entropy, reduction="none"),
        batches=[batch for sample in samples.values() for batch in sample.batches],
        groups=groups,
        batch_norm=settings.batch_norm,
    )
    random = generator(settings.seed, DIRECTIONS)
    directions = [filter_normalised_direction(model, random) for _ in range(2)]
    result: dict[str, Any] = {"analysis": LANDSCAPE, "groups": list(samples)}
    for name, along, points in (
        ("line", directions[:1], settings.line_points),
        ("plane", directions, settings.plane_points),
    ):
        steps = symmetric_steps(settings.radius, points)
        grid = losses_on_grid(losses_at, model, along, steps, on_point)
        result[name] = {"steps": steps, **dict(zip(samples, finite(grid.tolist())))}
    return result


def finite(values: Any) -> Any:
    """A number, or lists of them, with None for what is not finite: JSON has no other word."""
    if isinstance(values, list):
        return [finite(value) for value in values]
    return values if math.isfinite(values) else None
