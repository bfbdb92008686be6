"""AccumulatedStep: one step for the batches of `accelerator.accumulate`."""

from __future__ import annotations

import pytest
import torch
from accelerators import no_state_left
from networks import COUNTS, batches, distance, imbsam, network
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep

accelerate = pytest.importorskip("accelerate")
from imbsam_fast.integrations.accelerate import AccumulatedStep  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CRITERION = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))


@pytest.fixture
def accelerator():
    def make(**settings):
        return accelerate.Accelerator(cpu=True, **settings)

    with no_state_left():
        yield make


class Run:
    """A usual loop over five batches of 16 rows, with a schedule."""

    def __init__(self, accelerator, **options) -> None:
        self.accelerator = accelerator
        x, y = (torch.cat(t) for t in zip(*batches(5, torch.float32)))
        model = network("group", torch.float32)
        optimizer = imbsam(model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        self.model, self.optimizer, self.loader, self.schedule = accelerator.prepare(
            model, optimizer, DataLoader(TensorDataset(x, y), 16), schedule
        )
        self.step = AccumulatedStep(accelerator, self.model, CRITERION, self.optimizer, **options)
        self.results: list = []

    def epoch(self) -> None:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                self.results.append(self.step(x, y))
                self.schedule.step()


def plain(epochs: int = 1):
    """Steps of two batches, the fifth being alone, by a TrainStep."""
    model = network("group", torch.float32)
    optimizer = imbsam(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    step = TrainStep(model, CRITERION, optimizer, max_norm=float("inf"))
    found = list(batches(5, torch.float32))
    pairs = [found[:2], found[2:4], found[4:]]
    results = []
    for _ in range(epochs):
        for pair in pairs:
            x, y = (torch.cat(t) for t in zip(*pair))
            step.micro_batch_size = 16 if len(pair) > 1 else None
            results.append(step(x, y))
            schedule.step()
    return model, optimizer, results


def test_accumulated_batches_are_one_step(accelerator):
    run = Run(accelerator(gradient_accumulation_steps=2), max_norm=float("inf"))
    run.epoch()
    model, optimizer, expected = plain()
    assert [result is None for result in run.results] == [True, False, True, False, False]
    assert distance(run.model, model) == 0
    found = [result for result in run.results if result is not None]
    assert [float(r.grad_norm) for r in found] == [float(r.grad_norm) for r in expected]
    assert run.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.025
    assert all(p.grad is None for p in run.model.parameters())


def test_norms_are_gathered(accelerator):
    accelerator = accelerator()
    run = Run(accelerator, max_norm=float("inf"))
    run.epoch()
    norms = accelerator.gather(torch.stack([r.grad_norm for r in run.results]))
    assert norms.tolist() == [float(r.grad_norm) for r in run.results]


def test_a_loaded_state_goes_on_with_the_same_bits(accelerator, tmp_path):
    first = Run(accelerator(gradient_accumulation_steps=2), perturb_every=2)
    first.epoch()
    first.accelerator.save_state(tmp_path)
    first.epoch()
    second = Run(accelerator(gradient_accumulation_steps=2), perturb_every=2)
    second.accelerator.load_state(tmp_path)
    assert second.step.state_dict()["counted_steps"] > 0
    second.epoch()
    assert distance(first.model, second.model) == 0
    assert first.step.state_dict() == second.step.state_dict()


def test_a_state_without_its_batches_is_not_saved(accelerator, tmp_path):
    run = Run(accelerator(gradient_accumulation_steps=2))
    x, y = next(iter(run.loader))
    with run.accelerator.accumulate(run.model):
        run.step(x, y)
    with pytest.raises(RuntimeError, match=r"save_state while 1 batches wait for their step"):
        run.accelerator.save_state(tmp_path)


def test_bfloat16_from_the_accelerator(accelerator):
    run = Run(accelerator(mixed_precision="bf16"))
    dtypes = []
    run.model[-1].register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    run.epoch()
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert all(result.loss.isfinite() for result in run.results)


def test_batches_of_other_shapes_are_refused_together(accelerator):
    run = Run(accelerator(gradient_accumulation_steps=2))
    before = [p.detach().clone() for p in run.model.parameters()]
    (x, y), (x2, y2) = batches(2, torch.float32)
    run.step.gathered.add(x, y)
    with pytest.raises(ValueError, match=r"\(16, 3, 6, 6\), \(16, 3, 4, 4\), expected one shape"):
        run.step(x2[..., :4, :4], y2)
    assert all(map(torch.equal, run.model.parameters(), before))
    run.epoch()  # nothing of it is left


def test_graphs_are_not_accumulated(accelerator):
    run = Run(accelerator(gradient_accumulation_steps=2))
    run.step.train_step.graphs = {}  # as with cuda_graph=True, which needs a GPU
    with pytest.raises(ValueError, match="cuda_graph is True, expected False where batches"):
        run.epoch()
