"""What `imbsam-fast train` says in the terminal, before and after the live display."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ...ops import dispatch
from ...training.batch_norm import has_batch_statistics
from ..data.images import LongTailImages
from ..metrics import COLUMNS, accuracy_cell, mean_and_std
from ..models.registry import make_model
from ..settings.config import LOSSES, PERTURBING, RunConfig

FEW = 12  # counts and classes are listed up to so many


def plan_table(configs: Sequence[RunConfig], data: LongTailImages) -> Table:
    """What is about to be trained, in runs that differ in the optimizer and the seed alone."""
    config = configs[0]
    with torch.device("meta"):
        model = make_model(config.model, len(data.counts), config.norm, config.seed)
    facts = {
        "data": _data(config, data),
        "tail classes": _tail_classes(config, data.counts),
        "model": f"{config.model}, {sum(p.numel() for p in model.parameters()):,} parameters",
    }
    if any(c.optimizer in PERTURBING for c in configs):
        facts["plan"] = f"{config.plan} ({_why_plan(config, has_batch_statistics(model))})"
        if config.perturb_every > 1:
            facts["plan"] += f", every {config.perturb_every} steps"
        facts["backend"] = _backend(config.device)
    seeds = len({c.seed for c in configs})
    method = config.method.upper()
    if config.loss != "ce":
        method += f" with {LOSSES[config.loss]}, tau {config.tau:g}"
    facts["training"] = (
        f"{method}, {_plural(seeds, 'seed')} of {_plural(config.epochs, 'epoch')}, "
        f"batch {config.batch_size}, lr {config.lr:g} cosine, rho {config.rho:g}, "
        f"preset {config.preset}"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _data(config: RunConfig, data: LongTailImages) -> str:
    counts = data.counts
    listed = " ".join(map(str, counts)) if len(counts) <= FEW else f"{max(counts)} to {min(counts)}"
    return (
        f"{config.dataset}: {len(data.train):,} training images in {len(counts)} classes "
        f"({listed}), {len(data.test):,} test images"
    )


def _tail_classes(config: RunConfig, counts: Sequence[int]) -> str:
    split = config.split(counts)
    tail = (split.sharp > 0).nonzero().flatten().tolist()
    if not tail:
        which = "none, ImbSAM is SGD"
    elif len(tail) == len(counts):
        which = "all, ImbSAM is SAM"
    elif len(tail) <= FEW:
        which = ", ".join(map(str, tail))
    else:
        which = f"{len(tail)} of {len(counts)}"
    border = "at most" if config.inclusive else "fewer than"
    return (
        f"{which} ({border} {config.eta:g} images): {100 * split.tail_fraction:.1f} % of the "
        "training images"
    )


def _why_plan(config: RunConfig, batch_statistics: bool) -> str:
    if config.plan == "auto":
        if batch_statistics:
            return "joint: rows of a batch share BatchNorm statistics"
        return "the cheaper one for each batch: its rows do not influence each other"
    if config.plan == "split" and batch_statistics:
        return "asked for; under BatchNorm each part is normalised by its own statistics"
    if config.plan == "sampled" and not batch_statistics:
        return "asked for; without batch statistics the sample is the tail rows"
    return "asked for"


def _backend(device: str) -> str:
    """The backend in use and, where a better one could not be taken, why."""
    used = dispatch.backend_name(device)
    if dispatch.forced_backend():
        return f"{used} on {device} (forced)"
    reasons = dispatch.available(device)
    passed_over = dispatch.BACKENDS[: dispatch.BACKENDS.index(used)]
    why = "; ".join(f"no {backend}: {reasons[backend]}" for backend in passed_over)
    return f"{used} on {device} ({why or 'chosen automatically'})"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(config: RunConfig, result: dict[str, Any]) -> str:
    """The outcome of one run."""
    tested = result["last"]["plain"]
    groups = " / ".join(_over([tested[column]]) for column in COLUMNS)
    return (
        f"{config.label()}, seed {config.seed}: {groups} (Many / Medium / Few / All), training "
        f"{result['train_accuracy']:.1f}, {result['seconds']:.0f} s"
    )


def results_table(results: dict[str, list[dict[str, Any]]], flip: bool) -> Table:
    """Test accuracy after the last epoch: mean and standard deviation over the runs of a label.

    With `flip` also that of the logits averaged with those of the mirror image.
    """
    table = Table(
        title="Test accuracy in % after the last epoch",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("", min_width=18)  # what 80 columns leave
    for title in ("Many", "Medium", "Few", "All", *(["All, flip"] if flip else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for label, runs in results.items():
        cells = [_over([run["last"]["plain"][column] for run in runs]) for column in COLUMNS]
        if flip:
            cells.append(_over([run["last"]["flip"]["all"] for run in runs]))
        table.add_row(label, *cells)
    return table


def _over(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return accuracy_cell(mean_and_std(known) if known else None)
