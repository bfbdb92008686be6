"""The accuracies of a section's configurations, what each costs, and the paper's beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..metrics import COLUMNS
from .comparison import Group, Section, Value
from .cost import Cost, cost
from .paper_results import PaperResult, paper_result

NOTES = {
    "last": "after the last epoch",
    "best": "of the epoch that was best on the validation set",
}
MEANING = (
    "All is the mean of the per-class accuracies; mean ± standard deviation over the seeds. time: "
    "of an epoch, the median, over that of SGD; memory: the peak on a GPU in GB."
)
FLIP_MEANING = "flip: the logits of an image and of its mirror image are averaged."


def meaning(sections: Sequence[Section]) -> str:
    """What the tables of `sections` show, in a few sentences."""
    flip = any("flip" in section.views for section in sections)
    return f"{MEANING} {FLIP_MEANING}" if flip else MEANING


class AccuracyRow(NamedTuple):
    """A group's test accuracies in %, by view and then by COLUMNS, the paper's, and the cost."""

    group: Group
    views: dict[str, dict[str, Value | None]]
    paper: PaperResult | None
    cost: Cost


def accuracy_rows(section: Section, checkpoint: str) -> list[AccuracyRow]:
    """One row a group that has such a checkpoint, one of CHECKPOINTS."""
    papers = _paper_results(section)
    rows = []
    for group in section.groups:
        views = {
            view: table for view in section.views if (table := group.accuracy(checkpoint, view))
        }
        if views:
            rows.append(
                AccuracyRow(group, views, papers.get(group.label), cost(group, section.groups))
            )
    return rows


def _paper_results(section: Section) -> dict[str, PaperResult]:
    """Label -> the paper's row, given to the group whose rho and eta are nearest to the paper's."""
    found: dict[PaperResult, tuple[int, str]] = {}
    for group in section.finished:
        config = group.config
        if config.get("loss", "ce") != "ce":
            continue
        result = paper_result(
            section.dataset,
            section.imbalance_factor,
            str(config.get("method")),
            str(config.get("optimizer")),
            config.get("tail_weight") or 1,
        )
        if result is None:
            continue
        distance = (config.get("rho") != 0.05) + (config.get("eta") != 100)
        if result not in found or distance < found[result][0]:
            found[result] = (distance, group.label)
    return {label: result for result, (_, label) in found.items()}


def titles(borders: tuple[int, int]) -> dict[str, str]:
    """Two lines for each of COLUMNS: its name and the training images of its classes."""
    low, high = borders
    images = {"many": f"> {high}", "medium": f"{low} - {high}", "few": f"< {low}", "all": "classes"}
    return {column: f"{column.capitalize()}\n{images[column]}" for column in COLUMNS}


def paper_text(result: PaperResult | None, column: str) -> str:
    """As `accuracy_cell`, for one of COLUMNS of the paper's row; None where it has none."""
    accuracy = getattr(result, column, None)
    return "-" if accuracy is None else f"{accuracy:.1f}"
