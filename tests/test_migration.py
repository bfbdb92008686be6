"""docs/migration.md: every new snippet trains, every old call is answered with new lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imbsam_fast import ImbSAM, LeanImbSAM

PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()
COUNTS = torch.tensor([500, 300, 200, 50, 10, 5])


def snippets() -> Iterator[tuple[str, bool, str]]:
    """The section, whether the code is new, and the code."""
    for section in PAGE.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        is_new = False
        for text, code in re.findall(r"(.*?)```python\n(.*?)```\n", section, re.S):
            is_new = "Before" not in text
            yield title, is_new, code


NEW = [(title, code) for title, is_new, code in snippets() if is_new]
OLD = [(title, code) for title, is_new, code in snippets() if not is_new]


def world() -> dict[str, Any]:
    """The names that the page says are the reader's."""
    torch.manual_seed(0)
    batches = [(torch.randn(12, 4, 3), torch.arange(12) % 6) for _ in range(2)]
    return {
        "torch": torch,
        "model": nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6)),
        "loader": torch.utils.data.DataLoader(batches, batch_size=None),
        "class_counts": COUNTS,
        "epochs": 2,
        "device": "cpu",
    }


def test_every_section_has_old_and_new_lines():
    titles = [line[3:] for line in PAGE.splitlines() if line.startswith("## ")]
    assert (
        list(dict.fromkeys(t for t, _ in NEW)) == list(dict.fromkeys(t for t, _ in OLD)) == titles
    )
    assert len(titles) == 5 and PAGE.count("```python") == len(NEW) + len(OLD)


@pytest.mark.parametrize(("title", "code"), NEW, ids=[title for title, _ in NEW])
def test_new_lines_train(monkeypatch, title, code):
    monkeypatch.setitem(
        sys.modules, "kernels", None
    )  # the checkout's, which a library takes for one
    for name in re.findall(r"^import (\w+)", code, re.M):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    names = world()
    weight = names["model"][1].weight
    before = weight.detach().clone()
    exec(code, names)
    if title == "Lightning":
        fit(names)
    assert weight.isfinite().all() and not torch.equal(weight, before)
    assert weight.grad is None


def fit(names: dict[str, Any]) -> None:
    module = names["Classifier"](names["model"], names["class_counts"])
    trainer = names["lightning"].Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, names["loader"])
    assert trainer.global_step == len(names["loader"])


@pytest.mark.parametrize(("title", "code"), OLD, ids=[title for title, _ in OLD])
def test_old_lines_are_python(title, code):
    compile(code, title, "exec")


# ---------------------------------------------------------------- old calls to our classes


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, 0.1)


# A call as another library has it, with p the parameters, and the lines of the answer.
CALLS: dict[str, tuple[Callable[[list], object], str]] = {
    "authors, keywords": (
        lambda p: ImbSAM(optimizer=sgd(p), model=nn.Linear(1, 1), rho=0.1),
        "got optimizer and model, .*:\n    optimizer = ImbSAM(optimizer, rho=0.1)",
    ),
    "authors, positions": (
        lambda p: ImbSAM(sgd(p), nn.Linear(1, 1), 0.1),
        "rho is Linear, .*no model:\n    optimizer = ImbSAM(optimizer, rho=0.05)",
    ),
    "authors, both": (
        lambda p: ImbSAM(sgd(p), model=nn.Linear(1, 1)),
        "got model, .*:\n    optimizer = ImbSAM(optimizer, rho=0.05)",
    ),
    "davda54": (
        lambda p: ImbSAM(p, torch.optim.SGD, rho=0.1, adaptive=True, lr=0.2, momentum=0.9),
        "got the class torch.optim.SGD, .*:\n"
        "    base = torch.optim.SGD(params, lr=0.2, momentum=0.9)\n"
        "    optimizer = ImbSAM(base, rho=0.1, adaptive=True)",
    ),
    "davda54, lean": (
        lambda p: LeanImbSAM(p, torch.optim.SGD),
        "got the class torch.optim.SGD, .*:\n    base = torch.optim.SGD(params)\n"
        "    optimizer = LeanImbSAM(base, rho=0.05)",
    ),
    "pytorch_optimizer": (
        lambda p: ImbSAM(p, base_optimizer=torch.optim.AdamW, use_gc=True, lr=0.2),
        "got the class torch.optim.AdamW, .*:\n    base = torch.optim.AdamW(params, lr=0.2)\n"
        "    optimizer = ImbSAM(base, rho=0.05)",
    ),
    "pytorch_optimizer, keywords": (
        lambda p: ImbSAM(params=p, base_optimizer=torch.optim.AdamW, lr=0.2),
        "base = torch.optim.AdamW(params, lr=0.2)\n",
    ),
    "an optimizer that is made": (
        lambda p: ImbSAM(p, base_optimizer=sgd(p)),
        "got base_optimizer torch.optim.SGD, .*:\n    optimizer = ImbSAM(base, rho=0.05)",
    ),
    "first_step": (
        lambda p: ImbSAM(sgd(p)).first_step(zero_grad=True),
        "first_step got zero_grad=True, expected none: .*optimizer.second_step()  # perturbs",
    ),
    "first_step, position": (
        lambda p: ImbSAM(sgd(p)).first_step(False),
        "first_step got zero_grad=False, expected none",
    ),
    "first_step, lean": (
        lambda p: LeanImbSAM(torch.optim.SGD(p, 0.1, 0.9)).first_step(zero_grad=True),
        "first_step got zero_grad=True",
    ),
    "second_step": (
        lambda p: ImbSAM(sgd(p)).second_step(zero_grad=True),
        "second_step got zero_grad=True, .*optimizer.third_step()  # updates",
    ),
    "third_step": (
        lambda p: ImbSAM(sgd(p)).third_step(zero_grad=True),
        "third_step got zero_grad=True",
    ),
    "closure": (
        lambda p: ImbSAM(sgd(p)).step(lambda: p[0].sum()),
        "closure returned Tensor, expected a SplitLoss, .*\n    closure = lambda: criterion",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_calls_from_elsewhere_are_answered_with_the_new_lines(call):
    make, answer = CALLS[call]
    params: list[Tensor] = [nn.Parameter(torch.ones(3))]
    params[0].grad = None if call == "closure" else torch.ones(3)
    pattern = "(?s)" + re.escape(answer).replace(r"\.\*", ".*")
    with pytest.raises((TypeError, ValueError), match=pattern):
        make(params)
    assert torch.equal(params[0].detach(), torch.ones(3))


@pytest.mark.parametrize("make", [ImbSAM, LeanImbSAM])
def test_the_base_is_named_where_it_is_looked_for_as_elsewhere(make):
    optimizer = make(torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1, 0.9))
    with pytest.raises(AttributeError, match=f"{make.__name__} has no base_optimizer, .* is base"):
        optimizer.base_optimizer  # noqa: B018
    assert not hasattr(optimizer, "base_optimizer")


@pytest.mark.parametrize("call", ["authors, keywords", "davda54"])
def test_the_answers_lines_are_those_of_the_page(call):
    with pytest.raises(TypeError) as refused:
        ImbSAM(
            *([] if "authors" in call else [[], torch.optim.SGD]),
            rho=0.05,
            **({"optimizer": 1, "model": 2} if "authors" in call else {"lr": 0.1, "momentum": 0.9}),
        )
    lines = [line.strip() for line in str(refused.value).splitlines()[1:]]
    page = PAGE.replace("model.parameters()", "params")
    assert lines and all(f"\n{line}\n" in page for line in lines)
