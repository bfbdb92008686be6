"""`imbsam-fast train digits`: train, time, show and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ..batch_norm import has_batch_statistics
from . import digits
from .plots import per_class_figure
from .report import print_plan, print_results, progress
from .results import PICTURE_FILE, Run, results_dict, write_checkpoint, write_results
from .timing import Timings, time_steps
from .training import Settings, make_model, train

TIMED_REPETITIONS = 8


def run(settings: Settings, save: Path | None, console: Console) -> dict[str, Any]:
    """Train every method on every seed and return the content of results.json.

    With `save`, a directory that exists, results.json, the picture and the checkpoints of seed
    0 are written there.
    """
    data = digits.load(settings.imbalance_factor, seed=0)
    model = _describe_model(settings)
    print_plan(console, settings, data, model)
    runs, timings = _train_all(settings, save, console)
    print_results(console, settings, data.counts, runs, timings)
    results = results_dict(settings, data, model, runs, timings)
    if save is not None:
        write_results(save, results)
        per_class_figure(results).savefig(save / PICTURE_FILE, dpi=150)
        console.print(f"Saved in {save}: {', '.join(sorted(p.name for p in save.iterdir()))}")
    return results


def _describe_model(settings: Settings) -> dict[str, Any]:
    model = make_model(settings, seed=0)
    automatic = "joint" if has_batch_statistics(model) else "split"
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "plan": automatic if settings.plan == "auto" else settings.plan,
    }


def _train_all(
    settings: Settings, save: Path | None, console: Console
) -> tuple[list[Run], Timings]:
    methods = settings.methods()
    runs = []
    with progress(console) as bar:
        epochs = settings.seeds * len(methods) * settings.epochs
        task = bar.add_task("", total=epochs, loss="")
        for seed in range(settings.seeds):
            data = digits.load(settings.imbalance_factor, seed)
            for method in methods:
                where = f"{settings.label(method)}, seed {seed + 1} of {settings.seeds}"
                bar.update(task, description=where)
                trained = train(
                    method,
                    settings,
                    data,
                    seed,
                    lambda loss: bar.update(task, advance=1, loss=f"loss {loss:.4f}"),
                )
                runs.append(Run(method, seed, trained.train_loss, trained.per_class))
                if save is not None and seed == 0:
                    write_checkpoint(save, method, seed, trained, settings)
        bar.update(task, description="training", loss="done")
        task = bar.add_task("timing", total=TIMED_REPETITIONS + 1, loss="")
        data = digits.load(settings.imbalance_factor, seed=0)
        timings = time_steps(settings, data, TIMED_REPETITIONS, lambda: bar.advance(task))
    return runs, timings
