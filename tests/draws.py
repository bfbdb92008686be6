"""What the tests with random configurations have in common; they need hypothesis."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def examples(number: int) -> Any:
    """So many, the same in every run."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


group_settings = st.fixed_dictionaries(
    {"lr": st.sampled_from([0.01, 0.1])},
    optional={
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "rho": st.sampled_from([0.0, 0.05, 0.5]),
        "adaptive": st.booleans(),
    },
)
momenta = st.sampled_from(
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3},
        {"momentum": 0.9, "maximize": True},
        {"weight_decay": 0.02, "maximize": True},
    ]
)
