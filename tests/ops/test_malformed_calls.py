"""Calls that cannot be carried out: each is refused by name and value, and changes not one bit.

The lists of the operators have tests/test_refusals.py; here is what users call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import COUNTS
from torch import Tensor, nn

import imbsam_fast
from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, SplitLoss, TrainStep, split_loss

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = float("inf"), float("nan")
X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10)


class World:
    """A model and its optimizer after two steps, which no malformed call may change."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 10))
        self.split = ClassSplit.from_counts(COUNTS)
        self.criterion = SplitCrossEntropy(self.split)
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[1:].parameters()}]
        self.sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.optimizer = ImbSAM(self.sgd)
        for _ in range(2):
            self.train_step()(X, Y)

    def train_step(self, **changes: Any) -> TrainStep:
        arguments = {"model": self.model, "criterion": self.criterion, "optimizer": self.optimizer}
        return TrainStep(**{**arguments, **changes})

    def gradients(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)

    def bits(self) -> bytes:
        """Weights, statistics, momentum and settings, as they are in memory."""
        state = self.sgd.state_dict()
        tensors = [*self.model.state_dict().values()]
        tensors += [t for of_p in state["state"].values() for t in of_p.values() if t is not None]
        raw = [t.detach().clone().contiguous().view(-1).view(torch.uint8) for t in tensors]
        return pickle.dumps(([r.tolist() for r in raw], state["param_groups"]))


Call = Callable[[World], Any]
CASES: dict[str, tuple[Call, str]] = {}  # a call by its name, and what its message says


def refuse(name: str, message: str, call: Call) -> None:
    assert name not in CASES, name
    CASES[name] = (call, message)


def each(template: str, values: dict[str, Any], message: str, call: Callable[[World, Any], Any]):
    """One case a value; "{}" in the message stands for its repr, with ".*" for long ones."""
    for label, value in values.items():
        shown = repr(value) if isinstance(value, (int, float, str, type(None))) else ".*"
        pattern = message.replace("{}", shown if shown == ".*" else _literal(shown))
        refuse(f"{template}={label}", pattern, functools.partial(_with, call, value))


def _with(call: Callable[[World, Any], Any], value: Any, world: World) -> Any:
    return call(world, value)


def _literal(text: str) -> str:
    return "".join(rf"\{c}" if c in "()[]{}.+*?^$|\\" else c for c in text)


# What no number may be.
NO_NUMBER = {"text": "0.1", "None": None, "True": True, "list": [0.1], "tensor": torch.ones(2)}
NEGATIVE = {"-1": -1, "nan": NAN, "-inf": -INF}
TOO_LARGE = {"inf": INF}

# ---------------------------------------------------------------- ImbSAM

params = [nn.Parameter(torch.ones(3))]
each(
    "ImbSAM(base)",
    {"None": None, "text": "sgd", "list": params, "class": torch.optim.SGD, "model": nn.ReLU()},
    "base is .*, expected a plain torch optimizer",
    lambda w, v: ImbSAM(v),
)
refuse("ImbSAM(ImbSAM)", "base is ImbSAM, expected a plain", lambda w: ImbSAM(w.optimizer))
refuse("ImbSAM(LBFGS)", "base is LBFGS", lambda w: ImbSAM(torch.optim.LBFGS(params)))
each(
    "ImbSAM(rho)",
    {**NO_NUMBER, **NEGATIVE, **TOO_LARGE, "1j": 1j},
    "rho is {}, expected a finite number >= 0",
    lambda w, v: ImbSAM(torch.optim.SGD(params, 0.1), rho=v),
)
refuse("ImbSAM(model)", "rho is .*takes no model", lambda w: ImbSAM(w.sgd, w.model))
NO_BOOL = {"text": "no", "None": None, "1": 1, "0.0": 0.0}
each(
    "ImbSAM(adaptive)",
    NO_BOOL,
    "adaptive is {}, expected True or False",
    lambda w, v: ImbSAM(torch.optim.SGD(params, 0.1), adaptive=v),
)
shared = torch.zeros(8)
each(
    "ImbSAM(parameters)",
    {
        "complex": [nn.Parameter(torch.ones(2) * 1j)],
        "sparse": [nn.Parameter(torch.ones(2, 2).to_sparse())],
        "gaps": [nn.Parameter(torch.ones(4, 4)[:, ::2])],
        "expanded": [nn.Parameter(torch.ones(1, 3).expand(2, 3))],
    },
    "parameter 0 is .*expected",
    lambda w, v: ImbSAM(torch.optim.SGD(v, lr=0.1)),
)
refuse(
    "ImbSAM(overlap)",
    "parameters 0 and 1 share memory, expected each in its own",
    lambda w: ImbSAM(torch.optim.SGD([nn.Parameter(shared[:5]), nn.Parameter(shared[4:])], lr=0.1)),
)
for key, values, expected in (
    ("rho", {**NO_NUMBER, **NEGATIVE}, "a finite number >= 0"),
    ("adaptive", NO_BOOL, "True or False"),
):
    each(
        f"ImbSAM(group[{key}])",
        values,
        rf"param_groups\[0\]\['{key}'\] is {{}}, expected {expected}",
        lambda w, v, k=key: ImbSAM(torch.optim.SGD([{"params": params, k: v}], lr=0.1)),
    )
    each(
        f"add_param_group({key})",
        values,
        rf"param_group\['{key}'\] is {{}}, expected {expected}",
        lambda w, v, k=key: w.optimizer.add_param_group({"params": [torch.ones(1)], k: v}),
    )
for key in ("lr", "momentum", "weight_decay"):
    each(
        f"add_param_group({key})",
        {"text": "0.1", "None": None, "-1": -1.0, "nan": NAN, "inf": INF},
        rf"param_group\['{key}'\] is {{}}, expected a finite number >= 0",
        lambda w, v, k=key: w.optimizer.add_param_group({"params": [torch.ones(1)], k: v}),
    )
each(
    "add_param_group",
    {"None": None, "list": params, "text": "params", "empty": {}, "no params": {"lr": 0.1}},
    "(?s)param_group is .*, expected a dict with 'params'",
    lambda w, v: w.optimizer.add_param_group(v),
)
refuse(
    "add_param_group(twice)",
    "some parameters appear in more than one parameter group",
    lambda w: w.optimizer.add_param_group({"params": [w.model[0].weight]}),
)
refuse(
    "add_param_group(overlap)",
    "parameters .* share memory",
    lambda w: w.optimizer.add_param_group({"params": [nn.Parameter(w.model[0].weight.data[1:])]}),
)
refuse(
    "add_param_group(complex)",
    "parameter 0 is torch.complex64",
    lambda w: w.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1) * 1j)]}),
)

# ---------------------------------------------------------------- checkpoints


def load(world: World, change: Callable[[dict[str, Any]], Any]) -> None:
    state = copy.deepcopy(world.optimizer.state_dict())
    changed = change(state)
    world.optimizer.load_state_dict(state if changed is None else changed)


each(
    "load_state_dict",
    {"None": None, "list": [], "text": "checkpoint", "empty": {}, "no groups": {"state": {}}},
    "state_dict is .*, expected a dict with 'state' and 'param_groups'",
    lambda w, v: w.optimizer.load_state_dict(v),
)
refuse(
    "load_state_dict(no state)",
    "expected a dict with 'state' and 'param_groups'",
    lambda w: load(w, lambda s: {"param_groups": s["param_groups"]}),
)
refuse(
    "load_state_dict(fewer groups)",
    "different number of parameter groups",
    lambda w: load(w, lambda s: s["param_groups"].pop() and None),
)
refuse(
    "load_state_dict(fewer parameters)",
    "size of optimizer's group",
    lambda w: load(w, lambda s: s["param_groups"][1]["params"].pop() and None),
)
for key, values, expected in (
    ("rho", {"-1": -1, "nan": NAN, "text": "big", "None": None}, "a finite number >= 0"),
    ("adaptive", NO_BOOL, "True or False"),
    ("lr", {"-1": -1, "nan": NAN, "text": "0.1", "None": None}, "a finite number >= 0"),
    ("dampening", {"nan": NAN, "inf": INF, "text": "0.1", "None": None}, "a finite number"),
):
    each(
        f"load_state_dict({key})",
        values,
        rf"state_dict\['param_groups'\]\[1\]\['{key}'\] is {{}}, expected {expected}",
        lambda w, v, k=key: load(w, lambda s: s["param_groups"][1].update({k: v})),
    )

# ---------------------------------------------------------------- the three calls and the closure


def in_order(world: World, calls: str, **options: Any) -> None:
    """Steps by number, gradients given before each; "r" restores, so that all ends where it was."""
    try:
        for call in calls:
            world.gradients()
            step = {"1": world.optimizer.first_step, "2": world.optimizer.second_step}.get(call)
            step() if step else world.optimizer.third_step(**options)
    except BaseException:
        world.optimizer.restore()
        raise


for calls, message in (
    ("11", "first_step was called twice in one step, expected after the head"),
    ("21", "first_step was called twice in one step, expected after the head"),
    ("121", "first_step was called twice"),
    ("22", "second_step was called twice"),
    ("122", "second_step was called twice"),
):
    refuse(f"calls {calls}", message, lambda w, c=calls: in_order(w, c))
each(
    "third_step(max_norm)",
    {**{k: v for k, v in NO_NUMBER.items() if v is not None}, **NEGATIVE, "0": 0.0},
    "max_norm is {}, expected a number > 0",
    lambda w, v: in_order(w, "123", max_norm=v),
)
NO_SCALER = {"text": "scaler", "True": True, "number": 2.0, "class": torch.amp.GradScaler}
each(
    "third_step(grad_scaler)",
    NO_SCALER,
    "grad_scaler is .*, expected a torch.amp.GradScaler",
    lambda w, v: in_order(w, "123", grad_scaler=v),
)
refuse(
    "third_step(unused scaler)",
    "grad_scaler has scaled no loss yet",
    lambda w: in_order(w, "123", grad_scaler=torch.amp.GradScaler("cpu")),
)
refuse("second_step()", "second_step found no gradient", lambda w: w.optimizer.second_step())


def held(action: Callable[[World], Any]) -> Call:
    """`action` in the middle of a step, which is then abandoned."""

    def call(world: World) -> None:
        world.gradients()
        world.optimizer.first_step()
        world.gradients()
        world.optimizer.second_step()
        try:
            action(world)
        finally:
            world.optimizer.restore()

    return call


for name, action in {
    "state_dict": lambda w: w.optimizer.state_dict(),
    "load_state_dict": lambda w: w.optimizer.load_state_dict({}),
    "add_param_group": lambda w: w.optimizer.add_param_group({"params": params}),
    "pickling or copying the optimizer": lambda w: pickle.dumps(w.optimizer),
    "a training step": lambda w: w.train_step()(X, Y),
    "a step": lambda w: w.optimizer.step(lambda: None),
}.items():
    refuse(
        f"{name} in the middle",
        f"{name} in the middle of a step, where the weights are perturbed",
        held(action),
    )
each(
    "step(closure)",
    {"None": None, "number": 5, "loss": torch.ones(())},
    "closure is .*step needs a closure that returns a SplitLoss",
    lambda w, v: w.optimizer.step(v),
)
NO_LOSS = {"None": None, "number": 1.0, "tensor": torch.ones(()), "pair": (torch.ones(()),) * 2}
each(
    "step(closure returns)",
    {**NO_LOSS, "numbers": SplitLoss(1.0, 2.0)},  # type: ignore[arg-type]
    "closure returned .*, expected a SplitLoss",
    lambda w, v: w.optimizer.step(lambda: v),
)
each(
    "step(closure shape)",
    {"head": SplitLoss(torch.ones(3), torch.ones(())), "tail": SplitLoss(torch.ones(()), X)},
    r"closure returned a (head|tail) of shape \(.*\), expected a scalar",
    lambda w, v: w.optimizer.step(lambda: v),
)

# ---------------------------------------------------------------- TrainStep

each(
    "TrainStep(model)",
    {"None": None, "text": "resnet", "function": lambda x: x, "class": nn.Linear},
    "model is .*, expected an nn.Module",
    lambda w, v: w.train_step(model=v),
)
each(
    "TrainStep(criterion)",
    {"None": None, "torch's": nn.CrossEntropyLoss(), "function": F.cross_entropy, "text": "ce"},
    r"criterion is .*, expected one with a ClassSplit as \.split",
    lambda w, v: w.train_step(criterion=v),
)
refuse(
    "TrainStep(criterion.split)",
    "criterion is .*, expected one with a ClassSplit",
    lambda w: w.train_step(criterion=functools.partial(F.cross_entropy)),
)
each(
    "TrainStep(optimizer)",
    {"None": None, "SGD": torch.optim.SGD(params, 0.1), "list": [1], "class": ImbSAM},
    "optimizer is .*, expected an ImbSAM",
    lambda w, v: w.train_step(optimizer=v),
)
refuse(
    "TrainStep(another optimizer)",
    "optimizer holds no parameter of model",
    lambda w: w.train_step(optimizer=ImbSAM(torch.optim.SGD(params, 0.1))),
)
for name, first in (("plan", "auto"), ("batch_norm", "once"), ("perturbation", "global")):
    each(
        f"TrainStep({name})",
        {"other": "both", "upper case": first.upper(), "None": None, "number": 1, "list": [first]},
        rf"{name} is .*, expected one of {first}",
        lambda w, v, n=name: w.train_step(**{n: v}),
    )
each(
    "TrainStep(autocast)",
    {"text": "cuda", "dtype": torch.bfloat16, "True": True, "class": torch.autocast},
    "autocast is .*, expected a context manager",
    lambda w, v: w.train_step(autocast=v),
)
each(
    "TrainStep(single use)",
    {"generator": contextlib.contextmanager(lambda: iter([None]))()},
    "autocast is .*, expected one that can be entered for every pass",
    lambda w, v: w.train_step(autocast=v),
)
each(
    "TrainStep(grad_scaler)",
    NO_SCALER,
    "grad_scaler is .*, expected a torch.amp.GradScaler",
    lambda w, v: w.train_step(grad_scaler=v),
)
each(
    "TrainStep(max_norm)",
    {"text": "1", "True": True, "0": 0.0, **NEGATIVE},
    "max_norm is {}, expected a number > 0",
    lambda w, v: w.train_step(max_norm=v),
)
each(
    "TrainStep(micro_batch_size)",
    {"0": 0, "-1": -1, "2.5": 2.5, "text": "8", "True": True, "nan": NAN, "tensor": torch.ones(2)},
    "micro_batch_size is {}, expected an integer >= 1",
    lambda w, v: w.train_step(micro_batch_size=v),
)
for name in ("cuda_graph", "same_dropout"):
    each(
        f"TrainStep({name})",
        NO_BOOL,
        f"{name} is {{}}, expected True or False",
        lambda w, v, n=name: w.train_step(**{n: v}),
    )
refuse(
    "TrainStep(cuda_graph on the CPU)",
    r"param_groups\[0\]\['lr'\] is 0.1 and the parameters are on cpu",
    lambda w: w.train_step(cuda_graph=True),
)
each(
    "step(targets type)",
    {"list": [0, 1], "None": None, "number": 3, "numpy": Y.numpy()},
    r"targets is .*, expected int64 labels \(N,\)",
    lambda w, v: w.train_step()(X, v),
)
each(
    "step(targets)",
    {
        "float": Y.float(), "int32": Y.int(), "bool": Y > 3, "bools": F.one_hot(Y, 10) > 0,
        "scalar": Y[0], "empty": Y[:0],
    },
    "targets is .*, expected",
    lambda w, v: w.train_step()(X, v),
)  # fmt: skip
# Integers (N, d1) may be dense labels: what the model returns says first that they are not.
refuse(
    "criterion(one-hot labels)",
    r"split_cross_entropy: targets is torch.int64 \(10, 10\), expected torch.int64 \(10,\)",
    lambda w: w.criterion(LOGITS, F.one_hot(Y, 10)),
)
each(
    "step(label)",
    {"10": torch.full((10,), 10), "-1": torch.full((10,), -1), "-101": torch.full((10,), -101)},
    r"targets\[0\] is -?\d+, expected 0 to 9 or ignore_index -100",
    lambda w, v: w.train_step(model=w.model.eval())(X, v),
)
each(
    "step(inputs type)",
    {"None": None, "text": "images", "list": [], "dict": {}, "number": 1.0},
    "inputs is .*, expected a tensor or a pytree of them",
    lambda w, v: w.train_step()(v, Y),
)
each(
    "step(inputs)",
    {"fewer": X[:3], "more": X.repeat(2, 1), "scalar": X[0, 0], "in a dict": {"a": X, "b": X[1:]}},
    "inputs holds a tensor of shape .*, expected 10 rows as in targets",
    lambda w, v: w.train_step()(v, Y),
)


class Returning(nn.Module):
    """The criterion of a world, but for what it returns."""

    def __init__(self, split: ClassSplit, value: Any) -> None:
        super().__init__()
        self.split, self.value = split, value

    def forward(self, outputs: Tensor, targets: Tensor, batch_size: float | None = None) -> Any:
        return self.value


each(
    "step(criterion returns)",
    NO_LOSS,
    "criterion returned .*, expected a SplitLoss",
    lambda w, v: w.train_step(criterion=Returning(w.split, v), model=w.model.eval())(X, Y),
)
each(
    "frozen_batch_norm_statistics",
    {"None": None, "text": "model", "list": [nn.BatchNorm1d(2)]},
    "model is .*, expected an nn.Module",
    lambda w, v: imbsam_fast.frozen_batch_norm_statistics(v).__enter__(),
)

# ---------------------------------------------------------------- criteria

NO_SPLIT = {"None": None, "counts": COUNTS, "class": ClassSplit, "text": "tail"}
each(
    "SplitCrossEntropy(split)",
    NO_SPLIT,
    "split is .*, expected a ClassSplit",
    lambda w, v: SplitCrossEntropy(v),
)
each(
    "SplitCrossEntropy(weight)",
    {
        "list": [1.0] * 10, "number": 2.0, "integers": torch.ones(10).long(),
        "matrix": torch.ones(10, 1), "empty": torch.ones(0), "nan": torch.full((10,), NAN),
        "negative": -torch.ones(10), "inf": torch.full((10,), INF),
        "five": torch.ones(5), "meta": torch.ones(10, device="meta"),
    },
    "weight (is|has) .*, expected",
    lambda w, v: SplitCrossEntropy(w.split, weight=v),
)  # fmt: skip
each(
    "SplitCrossEntropy(label_smoothing)",
    {**NO_NUMBER, "-0.1": -0.1, "1.1": 1.1, "nan": NAN},
    "label_smoothing is {}, expected 0 to 1",
    lambda w, v: SplitCrossEntropy(w.split, label_smoothing=v),
)
NO_INDEX = {"1.5": 1.5, "text": "3", "None": None, "True": True, "nan": NAN}
each(
    "SplitCrossEntropy(ignore_index)",
    NO_INDEX,
    "ignore_index is {}, expected an integer",
    lambda w, v: SplitCrossEntropy(w.split, ignore_index=v),
)
NO_TAIL_WEIGHT = {**NO_NUMBER, **NEGATIVE, **TOO_LARGE, "0": 0}
each(
    "SplitCrossEntropy(tail_weight)",
    NO_TAIL_WEIGHT,
    "tail_weight is {}, expected a finite number > 0",
    lambda w, v: SplitCrossEntropy(w.split, tail_weight=v),
)
LOGITS = torch.zeros(10, 10)
each(
    "criterion(logits)",
    {
        "None": None, "pair": (LOGITS, LOGITS), "list": LOGITS.tolist(), "vector": LOGITS[0],
        "cube": LOGITS[None], "scalar": LOGITS[0, 0], "integers": LOGITS.long(),
        "complex": LOGITS * 1j, "bool": LOGITS > 0, "five classes": LOGITS[:, :5],
        "no class": LOGITS[:, :0], "float8": LOGITS.to(torch.float8_e4m3fn),
    },
    r"((logits|targets) (is|has) .*, expected|the split has 10 classes, expected)",
    lambda w, v: w.criterion(v, Y),
)  # fmt: skip
each(
    "criterion(targets)",
    {"None": None, "list": Y.tolist(), "float": Y.float(), "int32": Y.int(), "short": Y[:3],
     "matrix": LOGITS.long()},
    "targets is .*, expected",
    lambda w, v: w.criterion(LOGITS, v),
)  # fmt: skip
each(
    "criterion(batch_size)",
    {"0": 0, "-1": -1, "nan": NAN, "inf": INF, "text": "8", "list": [8]},
    "batch_size is {}, expected a finite number >= 1",
    lambda w, v: w.criterion(LOGITS, Y, batch_size=v),
)
per_sample = functools.partial(F.cross_entropy, reduction="none")
each(
    "split_loss(per_sample_loss)",
    {"None": None, "text": "ce", "tensor": torch.ones(2)},
    "per_sample_loss is .*, expected a callable",
    lambda w, v: split_loss(v, w.split),
)
each(
    "split_loss(split)", NO_SPLIT, "split is .*, expected a ClassSplit",
    lambda w, v: split_loss(per_sample, v),
)  # fmt: skip
each(
    "split_loss(tail_weight)",
    NO_TAIL_WEIGHT,
    "tail_weight is {}, expected a finite number > 0",
    lambda w, v: split_loss(per_sample, w.split, v),
)
each(
    "split_loss(ignore_index)",
    NO_INDEX,
    "ignore_index is {}, expected an integer",
    lambda w, v: split_loss(per_sample, w.split, ignore_index=v),
)
each(
    "split_loss(batch_size)",
    {"0": 0, "-1": -1, "nan": NAN, "inf": INF, "text": "8", "list": [8]},
    "batch_size is {}, expected a finite number >= 1",
    lambda w, v: split_loss(per_sample, w.split)(LOGITS, Y, batch_size=v),
)
each(
    "split_loss(outputs)",
    {"None": None, "list": LOGITS.tolist(), "pair": (LOGITS, LOGITS)},
    "outputs is .*, expected a tensor",
    lambda w, v: split_loss(per_sample, w.split)(v, Y),
)
each(
    "split_loss(targets)",
    {"None": None, "list": Y.tolist()},
    "targets is .*, expected a tensor",
    lambda w, v: split_loss(per_sample, w.split)(LOGITS, v),
)
each(
    "split_loss(returns)",
    {"mean": torch.ones(()), "matrix": LOGITS, "None": None, "list": [0.0] * 10},
    "per_sample_loss returned .*, expected",
    lambda w, v: split_loss(lambda z, y: v, w.split)(LOGITS, Y),
)

# ---------------------------------------------------------------- ClassSplit

ONES = torch.ones(3)
NO_WEIGHTS = {
    "None": None, "list": [1.0] * 3, "number": 1.0, "integers": ONES.int(), "matrix": ONES[None],
    "empty": ONES[:0], "nan": ONES * NAN, "negative": -ONES, "inf": ONES * INF,
    "complex": ONES * 1j, "meta": torch.ones(3, device="meta"),
}  # fmt: skip
each("ClassSplit(plain)", NO_WEIGHTS, "plain is .*, expected", lambda w, v: ClassSplit(v, ONES))
each("ClassSplit(sharp)", NO_WEIGHTS, "sharp is .*, expected", lambda w, v: ClassSplit(ONES, v))
refuse(
    "ClassSplit(lengths)",
    "plain has 3 classes and sharp 2, expected the same number",
    lambda w: ClassSplit(ONES, ONES[:2]),
)
NO_COUNTS = {
    "text": "many", "empty": [], "floats": [1.5, 2], "negative": [3, -1], "number": 3,
    "float tensor": ONES, "matrix": torch.ones(2, 2).int(), "None inside": [1, None],
    "bools": torch.ones(3).bool(), "too large": [2**70, 1],
    "meta": torch.ones(3, device="meta").int(),
}  # fmt: skip
each(
    "ClassSplit(counts)",
    {**NO_COUNTS, "four": [1, 2, 3, 4]},
    "counts (is|has|holds) .*, expected",
    lambda w, v: ClassSplit(ONES, ONES, v),
)
for name, call in {
    "from_counts": lambda v: ClassSplit.from_counts(v),
    "focal": lambda v: ClassSplit.focal(v, 1.0, 0.5),
}.items():
    each(
        f"{name}(counts)",
        {**NO_COUNTS, "None": None},
        "counts (is|has|holds) .*, expected",
        lambda w, v, c=call: c(v),
    )
each(
    "from_counts(eta)",
    {**NO_NUMBER, **NEGATIVE},
    "eta is {}, expected a number >= 0",
    lambda w, v: ClassSplit.from_counts(COUNTS, v),
)
each(
    "from_counts(inclusive)",
    NO_BOOL,
    "inclusive is {}, expected True or False",
    lambda w, v: ClassSplit.from_counts(COUNTS, inclusive=v),
)
each(
    "from_targets(targets)",
    {**NO_COUNTS, "None": None},
    "targets (is|has|holds) .*, expected",
    lambda w, v: ClassSplit.from_targets(v),
)
each(
    "from_targets(num_classes)",
    {"0": 0, "-1": -1, "2.5": 2.5, "text": "3", "True": True},
    "num_classes is {}, expected an integer >= 1",
    lambda w, v: ClassSplit.from_targets([0, 1, 0], num_classes=v),
)
refuse(
    "from_targets(few classes)",
    "targets holds label 4, expected labels below num_classes, which is 3",
    lambda w: ClassSplit.from_targets([0, 4], num_classes=3),
)
each(
    "focal(gamma)",
    {**NO_NUMBER, **NEGATIVE, **TOO_LARGE},
    "gamma is {}, expected a finite number >= 0",
    lambda w, v: ClassSplit.focal(COUNTS, v, 0.5),
)
each(
    "focal(lam)",
    {**NO_NUMBER, "-0.1": -0.1, "1.1": 1.1, "nan": NAN},
    "lam is {}, expected a number between 0 and 1",
    lambda w, v: ClassSplit.focal(COUNTS, 1.0, v),
)
refuse(
    "focal(no image)", "counts holds no image, expected at least one",
    lambda w: ClassSplit.focal([0, 0], 1.0, 0.5),
)  # fmt: skip
for mask in ("tail_mask", "plain_mask"):
    each(
        mask,
        {"None": None, "list": [0], "float": Y.float(), "bool": Y > 1, "complex": Y * 1j},
        "targets is .*, expected integer labels",
        lambda w, v, m=mask: getattr(w.split, m)(v),
    )


# ---------------------------------------------------------------- all of them


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_changes_nothing(world, name):
    call, message = CASES[name]
    before = world.bits()
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
        call(world)
    world.model.train()
    assert world.bits() == before
    assert not world.optimizer.is_perturbed
    for p in world.model.parameters():
        p.grad = None


def test_there_are_many():
    assert len(CASES) >= 200


def test_the_world_still_trains():
    """So that what is refused is refused for its own sake."""
    world = World()
    before = world.bits()
    in_order(world, "123", max_norm=1.0)
    world.optimizer.step(lambda: world.criterion(world.model(X), Y))
    assert world.train_step(autocast=torch.autocast("cpu", torch.bfloat16))(X, Y).loss.isfinite()
    assert world.bits() != before
