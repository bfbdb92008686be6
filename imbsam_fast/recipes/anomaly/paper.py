"""What others report, AUCROC in %, means over the sets of a family.

The paper (Zhou et al., ICCV 2023, Table 4) at anomaly ratio 25 %, and ADBench (Han et al., NeurIPS
2022, Tables D6 to D19), whose detectors and data those are, at four ratios.
"""

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

# detector -> ratio -> one value for each of FAMILIES; DeepSAD with Adam, DevNet with RMSprop
ADBENCH = {
    "deepsad": {
        0.25: (70.82, 92.31, 91.50, 83.54, 68.91),
        0.5: (77.08, 94.68, 94.30, 92.35, 74.64),
        0.75: (80.15, 96.00, 95.53, 96.60, 77.98),
        1.0: (82.71, 96.64, 96.11, 98.69, 80.02),
    },
    "devnet": {
        0.25: (82.32, 95.72, 95.31, 86.17, 79.40),
        0.5: (85.35, 96.57, 95.81, 91.73, 82.12),
        0.75: (86.60, 96.81, 95.86, 93.84, 83.44),
        1.0: (87.40, 96.92, 95.98, 94.52, 84.16),
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


def adbench_reported(detector: str, method: str, family: str, ratio: float) -> float | None:
    """ADBench's AUCROC of the detector, which nothing perturbs; None where it has none."""
    row = ADBENCH.get(detector, {}).get(ratio)
    if row is None or method != "sgd" or family not in FAMILIES:
        return None
    return row[FAMILIES.index(family)]
