"""What a wrapping optimizer shares with its base: groups, state, checkpoints, copies."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ops.arguments import DTYPES, check_dense
from . import shards
from .buckets import local_params_of, params_of
from .groups import OWN_SETTINGS, check_group, check_memory, check_state_dict
from .loading import Loading, has_own_checkpoints, remove
from .master_weights import MasterWeights
from .pending import Pending

_TO_SAVE = "; what can be saved now is unperturbed_state_dict() and unperturbed_weights(model)"

_BASE_HAS = ("param_groups", "state", "step", "zero_grad")


class AroundBase(torch.optim.Optimizer):
    """The part of `ImbSAM` between steps: its groups, state and checkpoints are the base's."""

    base: torch.optim.Optimizer
    master_weights: bool

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at theta + epsilon, between second_step and third_step."""
        return self._pending.saved is not None

    @property
    def base_optimizer(self) -> NoReturn:
        """Raise AttributeError, which says what it is called here; SAM has it elsewhere."""
        raise AttributeError(
            f"{type(self).__name__} has no base_optimizer, as SAM elsewhere; here it is base"
        )

    def require_idle(self, action: str, instead: str = "") -> None:
        """Raise RuntimeError, which names `action`, if a step has begun and not ended."""
        if self._pending.held is not None or self._pending.saved is not None:
            where = "the weights are perturbed" if self.is_perturbed else "a gradient is held"
            raise RuntimeError(
                f"{action} in the middle of a step, where {where}; "
                f"finish it with third_step() or abandon it with restore(){instead}"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's own list."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = param_groups
        self._fill_groups()

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's own state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim.Optimizer; the base gets the group too."""
        self.require_idle("add_param_group")
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group is {param_group!r}, expected a dict with 'params'")
        check_group("param_group", param_group, self.base)
        if not hasattr(self.base, "add_param_group"):
            raise TypeError(f"base is {type(self.base).__name__}, which takes no further group")
        self.base.add_param_group(param_group)
        try:
            self._check_params(self.param_groups[-1]["params"])
        except BaseException:
            del self.param_groups[-1]
            raise
        self._fill_groups()
        self._warn_of_rounding(self.param_groups[-1]["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim.Optimizer."""
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for p in self._params():  # torch's own opens a profiler record, longer than a small step's
            p.grad = None

    def train(self) -> None:
        """The base's `train`, if it has one: schedule-free optimizers move weights there."""
        self._switch_base("train")

    def eval(self) -> None:
        """See `train`."""
        self._switch_base("eval")

    def _switch_base(self, mode: str) -> None:
        self.require_idle(f"{mode}()")
        if hasattr(self.base, mode):
            getattr(self.base, mode)()

    def state_dict(self) -> dict[str, Any]:
        """The base's, which training without ImbSAM can load. RuntimeError inside a step."""
        self.require_idle("state_dict", _TO_SAVE)
        return self.unperturbed_state_dict()

    def unperturbed_state_dict(self) -> dict[str, Any]:
        """`state_dict` that also works in the middle of a step, for example in a signal handler.

        The weights are not part of it; see `unperturbed_weights`. It is the state before the step;
        for a LeanImbSAM, the state after a step that failed at this point.
        """
        if not has_own_checkpoints(self.base):
            return super().state_dict()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.base.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def unperturbed_weights(self, model: torch.nn.Module) -> dict[str, Any]:
        """`model.state_dict()` with the weights at theta, also while they are perturbed.

        Nothing is copied: write the tensors out before the next step.
        """
        saved = dict(zip(map(id, self._params()), self._pending.saved or ()))
        weights = model.state_dict(keep_vars=True)
        for name, value in weights.items():
            if not isinstance(value, Tensor):
                continue
            start = saved.get(id(value))
            # Master weights are kept in float32; the parameter is their rounding.
            weights[name] = (
                value.detach()
                if start is None
                else shards.as_part_of(value, start.to(value.dtype)).detach()
            )
        return weights

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this optimizer or of its base. RuntimeError inside a step."""
        self.require_idle("load_state_dict")
        if has_own_checkpoints(self.base):
            self._load_into_base(state_dict)
            return
        if not isinstance(state_dict, dict):
            check_state_dict(state_dict, self.base)
        handles = [  # around the user's own, whose changes count
            self.register_load_state_dict_pre_hook(self._loading.before),
            self.register_load_state_dict_post_hook(self._loading.after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _load_into_base(self, state_dict: dict[str, Any]) -> None:
        """Load into a base with its own load_state_dict; the user's hooks run around it."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._loading.note_settings()
        self.base.load_state_dict(state_dict)
        self._loading.give_back_settings()
        self._fill_groups()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        self.require_idle("pickling or copying the optimizer", _TO_SAVE)
        return {
            "base": self.base, "defaults": self.defaults, "master_weights": self.master_weights
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" not in state:  # from load_state_dict; the base knows what its state needs
            if hasattr(self.base, "__setstate__"):
                self.base.__setstate__(state)
            else:
                self.base.state.clear()
                self.base.state.update(state["state"])
                self.base.param_groups[:] = state["param_groups"]
            return
        super().__setstate__(state)
        self._pending = Pending()
        self._masters = MasterWeights(self.base, self.master_weights)
        self._loading = Loading(self.base, self._masters)
        weakref.finalize(self, remove, self._loading.hook_base()).atexit = False
        self._fill_groups()

    def _fill_groups(self) -> None:
        for group in self.param_groups:
            for name in OWN_SETTINGS:
                group.setdefault(name, self.defaults[name])

    # ------------------------------------------------------------ parameters

    def _params(self) -> list[Tensor]:
        return params_of(self.param_groups)

    def _check_params(self, params: Sequence[Tensor]) -> None:
        shards.check_placements(self._params())
        for i, p in enumerate(shards.locals_of([*params])):
            if not p.requires_grad:  # of whatever kind: nothing happens to it
                continue
            if p.dtype not in DTYPES or p.layout != torch.strided:
                raise TypeError(
                    f"parameter {i} is {p.dtype} {p.layout}, expected a strided tensor in one "
                    f"of {', '.join(map(str, DTYPES))}"
                )
            check_dense(f"parameter {i}", p)
        check_memory(local_params_of(self.param_groups))

    def _warn_of_rounding(self, params: Sequence[Tensor]) -> None:
        if not self.master_weights and any(p.dtype == torch.bfloat16 for p in params):
            warnings.warn(
                "bfloat16 parameters round away most of a perturbation of rho = 0.05: use "
                "master_weights=True, or keep the weights in float32 and run the model under "
                "torch.autocast",
                stacklevel=3,
            )


def wraps_imbsam(optimizer: object) -> bool:
    """Whether an attribute of `optimizer` is an ImbSAM."""
    attributes = getattr(optimizer, "__dict__", {})
    return any(isinstance(value, AroundBase) for value in attributes.values())


def check_base(base: object) -> None:
    """Raise an error for a base that cannot be used."""
    if isinstance(base, AroundBase) or not all(hasattr(base, name) for name in _BASE_HAS):
        raise TypeError(
            f"base is {type(base).__name__}, expected a plain torch optimizer, as in "
            "ImbSAM(torch.optim.SGD(params, lr=0.1), rho=0.05), or a wrapper of one with "
            f"{', '.join(_BASE_HAS)}"
        )
    if wraps_imbsam(base):
        name = type(base).__name__
        raise TypeError(
            f"base is {name} around an ImbSAM, expected it the other way round: ImbSAM({name}(sgd))"
        )
    for name in OWN_SETTINGS:
        if name in getattr(base, "defaults", ()):
            raise ValueError(
                f"base is {type(base).__name__}, which has a setting {name!r} of its own, expected "
                "one without: it would be taken for ImbSAM's"
            )
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("base is LBFGS, expected an optimizer whose step() needs no closure")
