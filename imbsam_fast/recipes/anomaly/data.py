"""ADBench's data sets and the two protocols that part them into training and test rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

TEST_SHARE = 0.3
ADBENCH_LEAST_ROWS = 1_000
ADBENCH_MOST_ROWS = 10_000


class DataError(Exception):
    """A data set that cannot be used; the text names the file."""


class DataSet(NamedTuple):
    """A set of feature vectors, of which some are anomalies."""

    name: str
    X: np.ndarray  # float32 (n, F), finite
    y: np.ndarray  # int64 (n,): 1 for an anomaly, 0 for a normal row


class Parts(NamedTuple):
    """A data set parted by a protocol. Row numbers count the rows of the data set."""

    train_rows: np.ndarray  # int64 (n,)
    train_labels: np.ndarray  # int64 (n,): 1 for a labelled anomaly, 0 for every other row
    test_rows: np.ndarray  # int64 (m,)

    @property
    def leaked(self) -> float:
        """The share of test rows that are training rows too."""
        return float(np.isin(self.test_rows, self.train_rows).mean())


def find(directory: Path, names: list[str] | None = None) -> list[Path]:
    """The .npz files of `directory` by name, or those of the sets `names`. Raises DataError."""
    if not directory.is_dir():
        raise DataError(f"--data-dir is '{directory}', expected a directory")
    found = {path.stem: path for path in sorted(directory.glob("*.npz"))}
    if not found:
        raise DataError(f"--data-dir is '{directory}', expected one with .npz files")
    missing = [name for name in names or () if name not in found]
    if missing:
        raise DataError(f"--sets holds {', '.join(missing)}, expected {', '.join(found)}")
    return list(found.values()) if names is None else [found[name] for name in names]


def read(path: Path) -> DataSet:
    """The arrays X and y of a file as ADBench writes them. Raises DataError for any other."""

    def refused(why: str) -> DataError:
        return DataError(f"{path}: {why}")

    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {"X", "y"} <= set(arrays.files):
                raise refused(f"holds {arrays.files}, expected X and y")
            X, y = arrays["X"], arrays["y"]
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib, struct and numpy errors, all for a bad file
        raise refused(f"cannot be read as .npz without pickle: {error}") from error
    if X.ndim != 2 or X.dtype.kind not in "fiu" or 0 in X.shape:
        raise refused(f"X is {X.dtype} {X.shape}, expected numbers (rows, features)")
    if y.shape != (len(X),) or y.dtype.kind not in "fiub":
        raise refused(f"y is {y.dtype} {y.shape}, expected a number for each of {len(X)} rows")
    with np.errstate(over="ignore"):  # found by the next line
        X = X.astype(np.float32)
    if not np.isfinite(X).all():
        raise refused("X holds values that are not finite numbers")
    if not np.isin(y, (0, 1)).all() or min((y == 0).sum(), (y == 1).sum()) < 2:
        raise refused("y does not hold at least two of 0 (normal) and of 1 (anomaly) and no other")
    return DataSet(path.stem, X, y.astype(np.int64))


def part(data: DataSet, protocol: str, ratio: float, seed: int) -> Parts:
    """70 % of the rows for training, 30 % for the test, by class, and the labels that are shown.

    Of the a anomalies in training ceil(ratio a) are labelled; the others count as unlabelled,
    which is how ADBench contaminates the normal rows. What is drawn depends on the arguments
    alone, the split not on `ratio`.

    "clean" draws from the rows themselves: none is in both parts. "adbench" first draws 1,000
    rows with replacement from a smaller set, and 10,000 without from a larger one, as ADBench
    does: most test rows of a small set are then training rows too.
    """
    from sklearn.model_selection import train_test_split

    rng = np.random.default_rng(seed)
    rows = np.arange(len(data.y))
    if protocol == "adbench" and len(rows) < ADBENCH_LEAST_ROWS:
        rows = rng.choice(rows, ADBENCH_LEAST_ROWS, replace=True)
    if protocol == "adbench" and len(rows) > ADBENCH_MOST_ROWS:
        rows = rng.choice(rows, ADBENCH_MOST_ROWS, replace=False)
    try:
        train, test = train_test_split(
            rows, test_size=TEST_SHARE, stratify=data.y[rows], random_state=seed
        )
    except ValueError as error:
        raise DataError(f"{data.name}: cannot be split by class: {error}") from error
    anomalies = np.flatnonzero(data.y[train])
    labels = np.zeros(len(train), dtype=np.int64)
    # A permutation, so that a larger ratio labels the same anomalies and more.
    labels[rng.permutation(anomalies)[: math.ceil(ratio * len(anomalies))]] = 1
    return Parts(train, labels, test)
