"""Loading of checkpoints: settings that the file lacks, and state that torch would round."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .groups import OWN_SETTINGS, check_state_dict
from .master_weights import MasterWeights


def has_own_checkpoints(base: Any) -> bool:
    """Whether `base` overrides state_dict, as wrappers with state of their own do."""
    methods = ("state_dict", "load_state_dict")
    return all(hasattr(base, m) for m in methods) and any(
        getattr(type(base), m, None) is not getattr(Optimizer, m) for m in methods
    )


class Loading:
    """Hooks around load_state_dict of ImbSAM and of its base, both of which users may call.

    Groups keep their settings if the checkpoint has none (one of plain SGD, for example), and the
    state that belongs to master weights stays in float32.
    """

    def __init__(self, base: Optimizer, masters: MasterWeights) -> None:
        self.base, self.masters = base, masters
        self.state_dict: dict[str, Any] = {}
        self.settings: list[dict[str, Any]] = []

    def hook_base(self) -> list[RemovableHandle]:
        """Register the hooks on a base that takes hooks; the owner of this object removes them."""
        if has_own_checkpoints(self.base) or not hasattr(
            self.base, "_optimizer_load_state_dict_pre_hooks"
        ):
            return []
        # The base holds its hooks: a cycle would keep the memory of a model that was let go.
        this = weakref.ref(self)

        def before(base: Optimizer, state_dict: dict[str, Any]) -> None:
            if (loading := this()) is not None:
                loading.before(base, state_dict)

        def after(base: Optimizer) -> None:
            if (loading := this()) is not None:
                loading.after(base)

        return [
            self.base.register_load_state_dict_pre_hook(before),
            self.base.register_load_state_dict_post_hook(after, prepend=True),
        ]

    def before(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Raise an error for a state_dict that no step could use."""
        check_state_dict(state_dict, self.base)
        self.state_dict = state_dict
        self.note_settings()

    def note_settings(self) -> None:
        """Remember rho and adaptive of every group."""
        self.settings = [
            {name: group[name] for name in OWN_SETTINGS if name in group}
            for group in self.base.param_groups
        ]

    def after(self, _: Optimizer) -> None:
        """After torch has loaded: fill in settings that the file lacks, load the master weights."""
        self.give_back_settings()
        self.masters.load(self.state_dict)
        self.state_dict = {}

    def give_back_settings(self) -> None:
        """Fill in the settings from `note_settings` that a group lacks."""
        for group, settings in zip(self.base.param_groups, self.settings):
            for name, value in settings.items():
                group.setdefault(name, value)
        self.settings = []


def remove(handles: list[RemovableHandle]) -> None:
    """Take hooks off."""
    for handle in handles:
        handle.remove()
