"""Calls in the form of other SAM packages: the error shows the equivalent lines for this one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch.optim import Optimizer

Options = ParamSpec("Options")
Made = TypeVar("Made")
# Arguments of SAM elsewhere that are no setting of the base.
_FOREIGN = ("optimizer", "model", "params", "base_optimizer", "use_gc", "perturb_eps")
_OWN = ("rho", "adaptive", "master_weights")

_CALLS = """\
    loss = criterion(model(inputs), targets)  # a SplitCrossEntropy; SAM: of ClassSplit.all_tail()
    loss.head.backward(retain_graph=True); optimizer.first_step()  # SAM: leave this line out
    loss.tail.backward(); optimizer.second_step()  # perturbs: first_step(zero_grad=True) elsewhere
    criterion(model(inputs), targets).tail.backward()
    optimizer.third_step()  # updates: second_step(zero_grad=True) elsewhere
or all of it at once: imbsam_fast.TrainStep(model, criterion, optimizer)(inputs, targets)"""


def own_signature(
    init: Callable[Concatenate[Made, Options], None],
) -> Callable[Concatenate[Made, Options], None]:
    """Give a constructor an error that says what to write, if it is called like another SAM's."""

    @functools.wraps(init)
    def checked(self: Made, *args: Options.args, **kwargs: Options.kwargs) -> None:
        _check_signature(type(self).__name__, args, kwargs)
        init(self, *args, **kwargs)

    return checked


def _check_signature(name: str, args: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Refuse `(optimizer, model, rho)` and `(params, base_optimizer, rho, **settings)`."""
    own = _arguments({"rho": 0.05, **{k: v for k, v in given.items() if k in _OWN}})
    base = given.get("base_optimizer", args[1] if len(args) > 1 else None)
    is_class = inspect.isclass(base) and issubclass(base, Optimizer)
    if is_class or "base_optimizer" in given:
        settings = {k: v for k, v in given.items() if k not in (*_FOREIGN, *_OWN, "base")}
        lines = [f"optimizer = {name}(base, {own})"]
        if callable(base):
            separator = ", " if settings else ""
            lines.insert(0, f"base = {_name(base)}(params{separator}{_arguments(settings)})")
        raise TypeError(
            f"{name} got {'the class' if is_class else 'base_optimizer'} {_name(base)}, expected "
            "an optimizer that is made already:" + "".join(f"\n    {line}" for line in lines)
        )
    if found := [k for k in ("optimizer", "model") if k in given]:
        raise TypeError(
            f"{name} got {' and '.join(found)}, expected the optimizer alone, as base; the model "
            f"is the training loop's:\n    optimizer = {name}(optimizer, {own})"
        )


def _arguments(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in given.items())


def _name(base: Any) -> str:
    """The class as it is written in code: torch.optim.SGD, or the name alone."""
    name = getattr(base, "__name__", type(base).__name__)
    of_torch = getattr(base, "__module__", "").startswith("torch.optim.")
    return f"torch.optim.{name}" if of_torch else name


def check_no_zero_grad(call: str, zero_grad: object) -> None:
    """Raise an error for other packages' argument `zero_grad`; None: it was not given."""
    if zero_grad is not None:
        raise TypeError(
            f"{call} got zero_grad={zero_grad!r}, expected none: every call takes the gradients "
            f"away. The calls are others than those of SAM elsewhere:\n{_CALLS}"
        )
