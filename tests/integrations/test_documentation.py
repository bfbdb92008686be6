"""docs/integrations.md: every section's code trains."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerators import no_state_left
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.S)
    for section in PAGE.split("\n## ")[1:]
}
COUNTS = [500, 300, 50, 5]

pytestmark = pytest.mark.usefixtures("one_thread")


class Sentences(nn.Module):
    """Called as models of Transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)

    def forward(self, input_ids, labels=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.words(input_ids).mean(1))


def test_every_section_has_one_program():
    assert [len(code) for code in SECTIONS.values()] == [1] * 5


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_the_code_of_a_section_trains(title, tmp_path, monkeypatch):
    (code,) = SECTIONS[title]
    # Transformers looks for a package of this name, and would find the checkout's folder.
    monkeypatch.setitem(sys.modules, "kernels", None)
    for library in re.findall(r"^(?:import|from) (\w+)", code, re.M):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    images, targets = torch.randn(24, 3), torch.arange(24) % 4
    dataset: object = TensorDataset(images, targets)
    model = nn.Linear(3, 4)
    if "transformers" in code:
        dataset = [{"input_ids": torch.randint(9, (5,)), "labels": int(y)} for y in targets]
        model = Sentences()
    weight = next(model.parameters())
    before = weight.detach().clone()
    names = {"model": model, "class_counts": COUNTS, "dataset": dataset}
    names["loader"] = DataLoader(TensorDataset(images, targets), 8)
    with no_state_left() if find_spec("accelerate") else nullcontext():
        exec(compile(code, title, "exec"), {**names, "__name__": "documentation"})
    assert weight.isfinite().all() and not torch.equal(weight, before)
    assert weight.grad is None
