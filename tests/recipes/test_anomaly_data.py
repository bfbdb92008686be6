"""Anomaly detection: reading data sets, and the protocols that part them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from imbsam_fast.recipes.anomaly import data
from imbsam_fast.recipes.anomaly.settings import PROTOCOLS
from tests.recipe_data import features

# ---------------------------------------------------------------- data


def write(path, **arrays) -> data.DataSet | None:
    np.savez(path, **arrays)
    return data.read(path)


def test_reads_what_adbench_writes(tmp_path):
    X, y = features(20)
    found = write(tmp_path / "a_set.npz", X=X.astype(np.float64), y=y.astype(np.uint8))
    assert (found.name, found.X.dtype, found.y.dtype) == ("a_set", np.float32, np.int64)
    assert np.array_equal(found.X, X) and np.array_equal(found.y, y)


BAD_ARRAYS = {
    "expected X and y": lambda X, y: {"X": X},
    "without pickle": lambda X, y: {"X": X.astype(object), "y": y},
    "X is float32 \\(20,\\)": lambda X, y: {"X": X[:, 0], "y": y},
    "X is <U4": lambda X, y: {"X": np.full((20, 8), "text"), "y": y},
    "X is float32 \\(20, 0\\)": lambda X, y: {"X": X[:, :0], "y": y},
    "y is int64 \\(19,\\), expected a number for each of 20": lambda X, y: {"X": X, "y": y[:-1]},
    "not finite": lambda X, y: {"X": np.where(X[3, 3] == X, np.nan, X), "y": y},
    "y does not hold": lambda X, y: {"X": X, "y": y + 1},
    "y does not hold at least two": lambda X, y: {"X": X, "y": np.arange(20) == 3},
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_a_file_with_other_arrays_is_named_and_refused(message, tmp_path):
    with pytest.raises(data.DataError, match=rf"bad\.npz: .*{message}"):
        write(tmp_path / "bad.npz", **BAD_ARRAYS[message](*features(20)))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_archive_is_named_and_refused(content, tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=r"bad\.npz: cannot be read"):
        data.read(path)


def test_find_names_what_is_missing(tmp_path):
    with pytest.raises(data.DataError, match=r"expected one with \.npz files"):
        data.find(tmp_path)
    with pytest.raises(data.DataError, match="expected a directory"):
        data.find(tmp_path / "nowhere")
    for name in ("b", "a"):
        (tmp_path / f"{name}.npz").touch()
    assert [p.stem for p in data.find(tmp_path)] == ["a", "b"]
    assert [p.stem for p in data.find(tmp_path, ["b"])] == ["b"]
    with pytest.raises(data.DataError, match="--sets holds c, expected a, b"):
        data.find(tmp_path, ["a", "c"])


# ---------------------------------------------------------------- protocols


@pytest.fixture
def small_set() -> data.DataSet:
    return data.DataSet("small", *features(200))


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 1.0])
def test_the_clean_protocol_uses_every_row_once(small_set, ratio):
    parts = data.part(small_set, "clean", ratio, seed=3)
    assert sorted([*parts.train_rows, *parts.test_rows]) == list(range(200))
    assert len(parts.test_rows) == 60 and parts.leaked == 0
    train_y, test_y = small_set.y[parts.train_rows], small_set.y[parts.test_rows]
    assert (train_y.sum(), test_y.sum()) == (28, 12)  # a fifth of each
    assert parts.train_labels.sum() == np.ceil(28 * ratio)
    assert (parts.train_labels <= train_y).all()


def test_adbench_draws_a_small_set_with_replacement_before_the_split(small_set):
    parts = data.part(small_set, "adbench", 0.25, seed=3)
    assert (len(parts.train_rows), len(parts.test_rows)) == (700, 300)
    assert parts.leaked == np.mean([r in set(parts.train_rows) for r in parts.test_rows]) > 0.9
    anomalies = small_set.y[parts.train_rows].sum()
    assert parts.train_labels.sum() == np.ceil(0.25 * anomalies)


def test_adbench_leaves_middling_sets_alone_and_thins_large_ones():
    for rows, kept in ((1_500, 1_500), (11_000, 10_000)):
        parts = data.part(data.DataSet("x", *features(rows)), "adbench", 0.25, seed=0)
        found = np.concatenate([parts.train_rows, parts.test_rows])
        assert len(found) == len(set(found)) == kept and parts.leaked == 0
    middling = data.DataSet("x", *features(1_500))
    parts = [data.part(middling, protocol, 0.25, seed=0) for protocol in PROTOCOLS]
    assert all(map(np.array_equal, *parts))  # the protocols are one


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_seed_decides_the_rows_and_the_ratio_only_the_labels(small_set, protocol):
    first, again, more, other = (
        data.part(small_set, protocol, ratio, seed)
        for ratio, seed in ((0.1, 0), (0.1, 0), (0.5, 0), (0.1, 1))
    )
    assert all(map(np.array_equal, first, again))
    assert np.array_equal(first.train_rows, more.train_rows)
    assert (first.train_labels <= more.train_labels).all()
    assert not np.array_equal(first.test_rows, other.test_rows)


def test_a_set_too_small_to_split_is_named():
    X, _ = features(8)
    tiny = data.DataSet("tiny", X, (np.arange(8) < 2).astype(np.int64))
    assert data.part(tiny, "clean", 0.25, 0).train_labels.sum() == 1
    with pytest.raises(data.DataError, match="tiny: cannot be split"):
        data.part(tiny._replace(y=(np.arange(8) < 1).astype(np.int64)), "clean", 0.25, 0)
