"""What is not public in torch and used here: all of it is listed, and is there as it is used."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("imbsam_fast", "kernels") for p in (ROOT / folder).rglob("*.py")]
# Private names of others than torch: of the frameworks that wrap optimizers, and Python's own.
NOT_TORCH = {"wrappers.py", *(p.name for p in FILES if p.parent.name == "integrations")}
PYTHONS = {"_actions", "_asdict", "_exit", "_fields", "_GeneratorContextManager", "_replace"}
PYTHONS |= {"_SubParsersAction"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file defines or sets itself."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def used(tree: ast.AST) -> Iterator[str]:
    """Private attributes, private names that torch's modules are asked for, and such modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (part for part in node.module.split(".") if is_private(part))
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and is_private(name):
                yield name


@pytest.mark.slow  # reads every source
def test_the_list_is_complete():
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    own = {name for tree in trees.values() for name in defined(tree)}
    found = {
        name: path.name
        for path, tree in trees.items()
        if path.name not in NOT_TORCH
        for name in used(tree)
    }
    text = (ROOT / "docs" / "torch_contract.md").read_text()
    section = text.partition("## Names of torch")[2].partition("\n## ")[0]
    listed = set(re.findall(r"\b_\w+", section))
    known = own | PYTHONS | {"_C"}
    assert {n: where for n, where in found.items() if n not in known | listed} == {}


# ---------------------------------------------------------------- as they are used


def scaler() -> None:
    found = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert found._get_scale_async() is None
    found.scale(torch.ones(()))
    assert found._get_scale_async() == 8.0
    state = found._per_optimizer_states[1]
    assert state["stage"].name == "READY" and state["found_inf_per_device"] == {}


def donated_buffer() -> None:
    import torch._functorch.config as config

    assert config.donated_buffer in (True, False)


def transforms() -> None:
    from torch.autograd import forward_ad

    peek = torch._C._functorch.peek_interpreter_stack
    assert peek() is None and forward_ad._current_level < 0
    seen = []

    def function(x):
        seen.append(peek() is not None)
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    with forward_ad.dual_level():
        seen.append(forward_ad._current_level >= 0)
    assert seen == [True, True]


def asked_at_compile_time() -> None:
    def answer() -> bool:
        return True

    torch.compiler.assume_constant_result(answer)
    assert answer._dynamo_marked_constant is True  # type: ignore[attr-defined]


def profiler() -> None:
    assert not torch.autograd._profiler_enabled()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch.autograd._profiler_enabled()


def dispatch_modes() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

    assert not is_in_torch_dispatch_mode()
    with TorchDispatchMode():
        assert is_in_torch_dispatch_mode()


def storage_uses() -> None:
    t = torch.ones(3)
    alone = torch._C._storage_Use_Count(t.untyped_storage()._cdata)
    view = t[1:]
    assert torch._C._storage_Use_Count(t.untyped_storage()._cdata) > alone, view


def optimizer_hooks() -> None:
    sgd = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    hooks = {
        "_optimizer_step_pre_hooks": sgd.register_step_pre_hook,
        "_optimizer_step_post_hooks": sgd.register_step_post_hook,
        "_optimizer_state_dict_pre_hooks": sgd.register_state_dict_pre_hook,
        "_optimizer_state_dict_post_hooks": sgd.register_state_dict_post_hook,
        "_optimizer_load_state_dict_pre_hooks": sgd.register_load_state_dict_pre_hook,
        "_optimizer_load_state_dict_post_hooks": sgd.register_load_state_dict_post_hook,
    }
    for name, register in hooks.items():
        assert not getattr(sgd, name)
        register(lambda *_: None)
        assert len(getattr(sgd, name)) == 1
    from torch.optim import optimizer

    handle = optimizer.register_optimizer_step_pre_hook(lambda *_: None)
    assert len(optimizer._global_optimizer_pre_hooks) == 1
    handle.remove()
    assert not optimizer._global_optimizer_pre_hooks
    assert not optimizer._global_optimizer_post_hooks


def order_of_calls() -> None:
    sgd = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1)
    sgd.step()
    assert sgd._opt_called is True
    assert scheduler._last_lr == [sgd.param_groups[0]["lr"]]


def shards() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    from torch.distributed.fsdp import _fully_shard as module

    assert callable(fsdp.FSDPModule._get_fsdp_state)
    state = (Path(module.__file__).parent / "_fsdp_state.py").read_text()
    assert "_fsdp_param_group" in state


def batch_norm() -> None:
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
    from torch.nn.modules.instancenorm import _InstanceNorm

    for layer in (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm1d):
        assert issubclass(layer, _NormBase)
        assert issubclass(layer, _BatchNorm) != issubclass(layer, _InstanceNorm)


def compiled_modules() -> None:
    assert nn.Linear(1, 1)._compiled_call_impl is None


def trees() -> None:
    from torch.utils import _pytree

    leaves, spec = _pytree.tree_flatten({"a": [1, 2]})
    assert leaves == [1, 2] and _pytree.tree_unflatten([3, 4], spec) == {"a": [3, 4]}


def buffers() -> None:
    layer = nn.BatchNorm1d(2)
    before = layer.running_mean._version
    layer.running_mean.add_(1)
    assert layer._buffers["running_mean"]._version > before


def foreach() -> None:
    t = [torch.ones(2)]
    torch._foreach_add_(t, [torch.ones(2)], alpha=2.0)
    torch._foreach_mul_(t, 2.0)
    other = [torch.zeros(2)]
    torch._foreach_copy_(other, t)
    assert other[0].tolist() == [6.0, 6.0]


@pytest.mark.parametrize(
    "use",
    [
        scaler, donated_buffer, transforms, asked_at_compile_time, profiler, dispatch_modes,
        storage_uses, optimizer_hooks,
        order_of_calls, shards, batch_norm, compiled_modules, trees, buffers, foreach,
    ],
    ids=lambda use: use.__name__,
)  # fmt: skip
def test_what_is_private_is_as_it_is_used(use: Callable[[], None]):
    use()
