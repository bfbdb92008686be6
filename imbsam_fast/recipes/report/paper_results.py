"""The paper's own accuracies: Zhou et al., "ImbSAM", ICCV 2023, Tables 1, 2 and 3."""

from __future__ import annotations

from typing import NamedTuple

SETTING = "rho 0.05, eta 100, 200 epochs; ResNet-32, ResNeXt-50, ResNet-50 by data set"


class PaperResult(NamedTuple):
    """Test accuracy in %; None where the paper gives only the overall accuracy."""

    many: float | None
    medium: float | None
    few: float | None
    all: float


def _all(accuracy: float) -> PaperResult:
    return PaperResult(None, None, None, accuracy)


# (data set, imbalance factor) -> (method, optimizer) -> accuracies
TABLES: dict[tuple[str, float | None], dict[tuple[str, str], PaperResult]] = {
    ("cifar100-lt", 100): {
        ("ce", "sgd"): PaperResult(77.8, 46.6, 13.5, 47.6),
        ("ce", "sam"): PaperResult(79.7, 49.3, 12.4, 48.9),
        ("ce", "imbsam"): PaperResult(75.9, 53.5, 19.4, 51.1),
        ("wb", "sgd"): PaperResult(68.5, 49.1, 35.9, 51.9),
        ("wb", "sam"): PaperResult(76.1, 54.6, 25.3, 53.3),
        ("wb", "imbsam"): PaperResult(64.1, 58.6, 39.4, 54.8),
    },
    ("cifar100-lt", 50): {
        ("ce", "sgd"): _all(52.8),
        ("ce", "imbsam"): _all(56.4),
        ("wb", "sgd"): _all(56.7),
        ("wb", "imbsam"): _all(59.3),
    },
    ("cifar100-lt", 10): {
        ("ce", "sgd"): _all(66.9),
        ("ce", "imbsam"): _all(69.2),
        ("wb", "sgd"): _all(68.9),
        ("wb", "imbsam"): _all(69.7),
    },
    ("imagenet-lt", None): {
        ("ce", "sgd"): PaperResult(69.3, 41.7, 10.3, 48.2),
        ("ce", "sam"): PaperResult(70.0, 41.1, 10.2, 48.2),
        ("ce", "imbsam"): PaperResult(68.5, 47.5, 21.6, 52.2),
        ("lws", "sgd"): PaperResult(64.1, 49.1, 31.2, 52.5),
        ("lws", "sam"): PaperResult(64.0, 48.8, 30.5, 52.3),
        ("lws", "imbsam"): PaperResult(63.2, 53.7, 38.3, 55.3),
    },
    ("inaturalist2018", None): {
        ("ce", "sgd"): PaperResult(75.4, 66.9, 61.7, 65.7),
        ("ce", "sam"): PaperResult(75.6, 66.7, 61.8, 65.7),
        ("ce", "imbsam"): PaperResult(73.5, 69.2, 67.9, 69.1),
        ("lws", "sgd"): PaperResult(71.7, 69.4, 68.7, 69.4),
        ("lws", "sam"): PaperResult(71.7, 69.6, 68.8, 69.5),
        ("lws", "imbsam"): PaperResult(68.2, 72.5, 72.9, 71.1),
    },
}

# Table 3, CIFAR100-LT with imbalance factor 100, CE + SAM: weight of the tail's losses -> row.
REWEIGHTED_SAM: dict[float, PaperResult] = {
    2: PaperResult(79.4, 49.1, 12.3, 48.7),
    3: PaperResult(79.9, 48.9, 13.4, 49.1),
    5: PaperResult(79.5, 49.2, 13.2, 49.0),
    10: PaperResult(79.7, 48.6, 13.1, 48.8),
    20: PaperResult(80.1, 48.7, 13.5, 49.1),
}


def paper_result(
    dataset: str,
    imbalance_factor: float | None,
    method: str,
    optimizer: str,
    tail_weight: float = 1.0,
) -> PaperResult | None:
    """The paper's row for a configuration; None where it has none.

    Its hyper-parameters are those of SETTING, whatever those of the run. A weight on the tail
    is SAM's (Table 3): the paper says that its ImbSAM has none.
    """
    if dataset in ("imagenet-lt", "inaturalist2018"):
        imbalance_factor = None
    if (method, optimizer) == ("ce", "sam") and tail_weight != 1:
        is_table_3 = (dataset, imbalance_factor) == ("cifar100-lt", 100)
        return REWEIGHTED_SAM.get(tail_weight) if is_table_3 else None
    return TABLES.get((dataset, imbalance_factor), {}).get((method, optimizer))
