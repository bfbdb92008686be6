"""What DeepSAD and DevNet share: a scikit-learn estimator with PyOD's conventions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_array
from torch import Tensor, nn

from ...training.choices import EXACT_PLANS
from .losses import PerSampleLoss
from .settings import OPTIMIZERS
from .training import BASES, Method, make_base, make_step

FORMAT = 1  # of saved detectors

T = TypeVar("T")
V = TypeVar("V", float, np.ndarray)

# The ends of the range of positive finite numbers.
SMALL = float(np.finfo(np.float64).tiny)
LARGE = float(np.finfo(np.float64).max)


class TrainingDivergedError(ValueError):
    """Losses or scores are no longer finite numbers."""


@dataclass(kw_only=True, repr=False, eq=False)
class Detector(BaseEstimator, ABC):
    """What DeepSAD and DevNet share; see there.

    Args:
        optimizer: "sgd" (the base alone), "sam" or "imbsam", with labelled anomalies as the
            tail class.
        base: "sgd" (with momentum), "adam" or "rmsprop".
        lr: learning rate, constant; None takes the detector's own for this base.
        momentum: of the base "sgd".
        rho: radius of the perturbation.
        tail_weight: factor on the loss of labelled anomalies, for "sgd" and "imbsam".
        plan: of `TrainStep`.
        epochs, batch_size: length of training.
        contamination: the share of the training rows that `predict` would call anomalies,
            0 < contamination <= 0.5.
        random_state: seed of the initial weights and the order of batches.

    Attributes, after `fit`: decision_scores_ and labels_ of the training rows (n,), threshold_,
    n_features_in_, network_ in eval mode, train_loss_ (the mean over the last epoch).
    """

    optimizer: str = "imbsam"
    base: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    rho: float = 0.05
    tail_weight: float = 1.0
    plan: str = "auto"
    epochs: int = 50
    batch_size: int = 128
    contamination: float = 0.1
    random_state: int = 0

    # ------------------------------------------------------------ the estimator

    def fit(self, X: Any, y: Any) -> Detector:
        """Train on features X (n, F), finite, and labels y (n,): 1 for a labelled anomaly, 0 for
        any other row, normal or not. Features are scaled to 0 .. 1 by their range in X.

        Raises ValueError for unusable arguments, TrainingDivergedError (a ValueError) where the
        loss does not stay finite.
        """
        return self._fit(X, y, self._initial_network)

    def decision_function(self, X: Any) -> np.ndarray:
        """Anomaly scores (n,) float64 of features X (n, F): higher is more anomalous."""
        self._require_fitted()
        return self._scores(self._scaled(self._checked_features(X)))

    def predict(self, X: Any) -> np.ndarray:
        """1 for rows of X (n, F) whose score is above threshold_, 0 for the others: int64 (n,)."""
        return (self.decision_function(X) > self.threshold_).astype(np.int64)

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write the fitted detector; `load` reads it back."""
        self._require_fitted()
        content = {
            "format": FORMAT,
            "detector": type(self).__name__,
            "params": {name: _plain(value) for name, value in self.get_params().items()},
            "low": torch.from_numpy(self.low_),
            "span": torch.from_numpy(self.span_),
            "decision_scores": torch.from_numpy(self.decision_scores_),
            "train_loss": self.train_loss_,
            "network": self.network_.state_dict(),
            "loss": self._loss_state(),
        }
        torch.save(content, path)

    def restore_state(self, content: dict[str, Any]) -> None:
        """Make this detector the fitted one whose state `content` is."""
        self.low_, self.span_ = content["low"].numpy(), content["span"].numpy()
        self.n_features_in_ = len(self.low_)
        self.network_ = self._make_network(self.n_features_in_).eval()
        self.network_.load_state_dict(content["network"])
        self._load_loss_state(content["loss"])
        self.train_loss_ = content["train_loss"]
        self._set_threshold(content["decision_scores"].numpy())

    # ------------------------------------------------------------ what a detector is made of

    @property
    @abstractmethod
    def _default_lr(self) -> dict[str, float]:
        """The learning rate for each of BASES."""

    @abstractmethod
    def _make_network(self, features: int) -> nn.Module:
        """The network with new weights."""

    @abstractmethod
    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The network's parameters with their weight decay."""

    @abstractmethod
    def _initial_network(self, rows: Tensor) -> nn.Module:
        """The network that training starts from."""

    @abstractmethod
    def _make_loss(self, rows: Tensor) -> PerSampleLoss:
        """The loss, for the initial network; sets what `_loss_state` returns."""

    @abstractmethod
    def _loss_state(self) -> dict[str, Any]:
        """What the loss holds besides parameters, ready for a file."""

    @abstractmethod
    def _load_loss_state(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def _epoch(self, labels: Tensor, generator: torch.Generator) -> list[Tensor]:
        """The row numbers of one epoch's batches."""

    @abstractmethod
    def _to_scores(self, outputs: Tensor) -> Tensor:
        """Anomaly scores (n,) from the network's outputs."""

    # ------------------------------------------------------------ fitting

    def _fit(self, X: Any, y: Any, start: Callable[[Tensor], nn.Module]) -> Detector:
        self._check_params()
        features = self._checked_features(X, fitting=True)
        labels = self._checked_labels(y, len(features))
        before = dict(vars(self))
        try:
            self.n_features_in_ = features.shape[1]
            self._set_scale(features)
            rows = self._scaled(features)
            self.network_ = start(rows)
            self.train_loss_ = self._train(rows, labels)
            self._set_threshold(self._finite(self._scores(rows)))
        except BaseException:  # what was fitted before stays usable
            self.__dict__ = before
            raise
        return self

    def _train(self, rows: Tensor, labels: Tensor) -> float:
        """Train `network_` and return the mean loss over the last epoch's batches."""
        method = self._method()
        loss = self._make_loss(rows)
        step = make_step(method, self.network_, loss, make_base(method, self._parameter_groups()))
        order = torch.Generator().manual_seed(int(self.random_state))
        self.network_.train()
        mean = float("nan")
        for _ in range(self.epochs):
            losses = [step(rows[b], labels[b]) for b in self._epoch(labels, order)]
            mean = self._finite(torch.stack(losses).mean().item())
        self.network_.eval()
        return mean

    def _finite(self, values: V) -> V:
        """`values`, losses or scores, if they are finite."""
        if not np.isfinite(values).all():
            lr = self._method().lr
            raise TrainingDivergedError(
                f"{type(self).__name__}'s losses and scores are no longer finite numbers; try an "
                f"lr below {lr:g}"
            )
        return values

    def _method(self) -> Method:
        lr = self._default_lr[self.base] if self.lr is None else self.lr
        return Method(
            self.optimizer, self.base, lr, self.momentum, self.rho, self.tail_weight, self.plan
        )

    def _seeded(self, make: Callable[[], T]) -> T:
        """What `make` returns, with weights in it that depend on random_state alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.random_state))
            return make()

    @torch.no_grad()
    def _scores(self, rows: Tensor) -> np.ndarray:
        return self._to_scores(self.network_(rows)).double().numpy()

    def _set_threshold(self, scores: np.ndarray) -> None:
        self.decision_scores_ = scores
        self.threshold_ = float(np.percentile(scores, 100 * (1 - self.contamination)))
        self.labels_ = (scores > self.threshold_).astype(np.int64)

    def _set_scale(self, features: np.ndarray) -> None:
        self.low_ = features.min(axis=0)
        span = features.max(axis=0) - self.low_
        self.span_ = np.where(span == 0, 1, span)  # as scikit-learn's MinMaxScaler

    def _scaled(self, features: np.ndarray) -> Tensor:
        return torch.from_numpy(((features - self.low_) / self.span_).astype(np.float32))

    # ------------------------------------------------------------ checks

    def _require_fitted(self) -> None:
        if not hasattr(self, "threshold_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted; call fit first")

    def _checked_features(self, X: Any, fitting: bool = False) -> np.ndarray:
        features = check_array(X, dtype=np.float64, input_name="X", ensure_min_samples=1 + fitting)
        if not fitting and features.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {features.shape[1]} features, expected {self.n_features_in_} as in fit"
            )
        return features

    def _checked_labels(self, y: Any, rows: int) -> Tensor:
        given = np.asarray(y)
        if given.shape != (rows,):
            raise ValueError(f"y has shape {given.shape}, expected ({rows},) as X has {rows} rows")
        if not np.isin(given, (0, 1)).all():
            other = given[~np.isin(given, (0, 1))][:3].tolist()
            raise ValueError(f"y holds {other}, expected 0 and 1 (1 is a labelled anomaly)")
        labels = torch.from_numpy(given.astype(np.int64))
        if labels.all():
            raise ValueError("y holds only 1, expected rows that are not labelled anomalies too")
        return labels

    def _check_params(self) -> None:
        for name, allowed in (("optimizer", OPTIMIZERS), ("base", BASES), ("plan", EXACT_PLANS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        for name, low, high, kind in self._ranges():
            value = getattr(self, name)
            if name == "lr" and value is None:
                continue
            number = isinstance(value, (int, np.integer) if kind is int else (int, float))
            if not number or isinstance(value, bool) or not low <= value <= high:
                noun = "a whole number" if kind is int else "a number"
                limits = f"from {low:g}" if high >= LARGE else f"from {low:g} to {high:g}"
                raise ValueError(f"{name} is {value!r}, expected {noun} {limits}")

    def _ranges(self) -> Iterator[tuple[str, float, float, type]]:
        """(parameter, least, greatest, kind)"""
        yield from (
            ("lr", SMALL, LARGE, float),
            ("momentum", 0, 1, float),
            ("rho", 0, LARGE, float),
            ("tail_weight", SMALL, LARGE, float),
            ("epochs", 1, LARGE, int),
            ("batch_size", 2, LARGE, int),
            ("contamination", SMALL, 0.5, float),
            ("random_state", 0, 2**63 - 1, int),
        )


def _plain(value: Any) -> Any:
    """A number of numpy as Python's: torch.load takes no other with weights_only."""
    return value.item() if isinstance(value, np.generic) else value
