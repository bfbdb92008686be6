"""What a checkpoint lacks, or torch would round, when it is loaded through either optimizer."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..validation import check_state_dict
from .master_weights import MasterWeights

# What a group carries besides the base's settings.
OWN_SETTINGS = ("rho", "adaptive")


class Loading:
    """Hooks around load_state_dict, for good on the base, where users may call it too.

    Groups keep their own settings where the checkpoint has none, as one of plain SGD, and the
    state beside master weights stays in float32.
    """

    def __init__(self, base: Optimizer, masters: MasterWeights) -> None:
        self.base, self.masters = base, masters
        self.state_dict: dict[str, Any] = {}
        self.settings: list[dict[str, Any]] = []
        base.register_load_state_dict_pre_hook(self.before)
        base.register_load_state_dict_post_hook(self.after, prepend=True)

    def before(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuses a state_dict that no step could use."""
        check_state_dict(state_dict, self.base)
        self.state_dict = state_dict
        self.settings = [
            {name: group[name] for name in OWN_SETTINGS if name in group}
            for group in self.base.param_groups
        ]

    def after(self, _: Optimizer) -> None:
        for group, settings in zip(self.base.param_groups, self.settings):
            for name, value in settings.items():
                group.setdefault(name, value)
        self.masters.load(self.state_dict)
        self.state_dict, self.settings = {}, []
