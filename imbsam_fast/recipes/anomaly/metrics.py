"""Detection quality of scores, in %."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

METRICS = ("aucroc", "aucpr_anomaly", "aucpr_normal")


def detection_metrics(y: Sequence[int] | Any, scores: Sequence[float] | Any) -> dict[str, float]:
    """Keys are METRICS: areas under the ROC curve and under the precision-recall curves.

    y (n,): 1 for an anomaly, 0 for a normal row, both present; scores (n,): higher is more
    anomalous. The area under a precision-recall curve is the average precision; for normal rows
    labels and scores change sides.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    normal = [1 - label for label in y]
    falling = [-score for score in scores]
    values = (
        roc_auc_score(y, scores),
        average_precision_score(y, scores),
        average_precision_score(normal, falling),
    )
    return {name: round(100 * float(value), 4) for name, value in zip(METRICS, values)}
