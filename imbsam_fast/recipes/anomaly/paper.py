"""What the paper reports (Zhou et al., ICCV 2023, Table 4): AUCROC in % at anomaly ratio 25 %."""

from __future__ import annotations

FAMILIES = ("CIFAR10", "F-MNIST", "MNIST-C", "MVTec", "SVHN")
RATIO = 0.25

# detector -> method -> one value for each of FAMILIES
TABLE_4 = {
    "deepsad": {
        "sgd": (86.5, 96.3, 96.4, 93.1, 80.9),
        "sam": (86.9, 96.7, 96.1, 91.3, 81.0),
        "imbsam": (87.9, 97.0, 96.2, 95.3, 82.4),
    },
    "devnet": {
        "sgd": (88.4, 96.4, 95.6, 95.6, 82.1),
        "sam": (88.2, 96.2, 95.3, 94.2, 81.0),
        "imbsam": (88.7, 96.7, 96.0, 96.2, 83.7),
    },
}

_PREFIXES = {
    "CIFAR10": "CIFAR10",
    "FashionMNIST": "F-MNIST",
    "MNIST-C": "MNIST-C",
    "MVTec": "MVTec",
    "SVHN": "SVHN",
}


def family(data_set: str) -> str:
    """The data family of one of ADBench's sets, one of FAMILIES, or else the set's own name."""
    return next((f for prefix, f in _PREFIXES.items() if data_set.startswith(prefix)), data_set)


def reported(detector: str, method: str, family: str, ratio: float) -> float | None:
    """The paper's AUCROC, None where it has none."""
    row = TABLE_4.get(detector, {}).get(method)
    if row is None or ratio != RATIO or family not in FAMILIES:
        return None
    return row[FAMILIES.index(family)]
