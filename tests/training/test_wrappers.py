"""TrainStep with the optimizer as Lightning and Accelerate wrap it: counting, hooks, schedulers."""

from __future__ import annotations

import os
import tempfile
import warnings

import pytest
import ranks as processes
import torch
from accelerators import no_state_left
from networks import COUNTS, batches, distance, imbsam, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import ClassSplit, ImbSAM, LeanImbSAM, SplitCrossEntropy, TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")

CRITERION = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))


def loader(steps: int = 6) -> DataLoader:
    """The batches of `batches(steps)`, in order."""
    x, y = (torch.cat(t) for t in zip(*batches(steps, torch.float32)))
    return DataLoader(TensorDataset(x, y), 16)


def expected_after(steps: int) -> nn.Module:
    model = network("group", torch.float32)
    step = TrainStep(model, CRITERION, imbsam(model))
    for x, y in batches(steps, torch.float32):
        step(x, y)
    return model


# ---------------------------------------------------------------- Lightning


def lightning_module(make=ImbSAM, base=torch.optim.SGD):
    """The lines of the README in a module of manual optimisation."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = network("group", torch.float32)
            self.found: list[tuple[bool, bool]] = []

        def configure_optimizers(self):
            return make(base(self.model.parameters(), 0.05, momentum=0.9, weight_decay=5e-3))

        def on_fit_start(self) -> None:
            self.step = TrainStep(self.model, CRITERION, self.optimizers())

        def training_step(self, batch, _) -> None:
            self.log("loss", self.step(*batch).loss)

        def on_before_optimizer_step(self, optimizer) -> None:
            gradient = self.model[0].weight.grad
            self.found.append((optimizer.is_perturbed, gradient is not None))

    return Module()


def trainer(tmp_path, **settings):
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("make", [ImbSAM, LeanImbSAM])
def test_lightning_counts_checkpoints_and_profiles(tmp_path, make):
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.profilers import SimpleProfiler

    checkpoint = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, monitor=None
    )
    profiler = SimpleProfiler()
    module, fit = lightning_module(make), trainer(
        tmp_path, max_steps=5, callbacks=[checkpoint], profiler=profiler
    )  # fmt: skip
    fit.fit(module, loader())
    assert fit.global_step == 5
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=2.ckpt", "step=4.ckpt"}
    assert len(profiler.recorded_durations["optimizer_step"]) == 5
    # As step hooks of an ImbSAM: at the perturbed weights, where the batch has a tail row.
    perturbed = [bool((y >= 5).any()) for _, y in batches(5)]
    assert [p for p, _ in module.found] == perturbed
    if make is ImbSAM:
        assert all(has_gradient == p for p, has_gradient in module.found)
        assert distance(module.model, expected_after(5)) == 0


def test_lightning_resumes_where_its_count_was(tmp_path):
    pytest.importorskip("lightning")
    first = trainer(tmp_path, max_steps=3, enable_checkpointing=False)
    first.fit(lightning_module(), loader())
    first.save_checkpoint(tmp_path / "three.ckpt")
    second = trainer(tmp_path, max_steps=5, enable_checkpointing=False)
    module = lightning_module()
    second.fit(module, loader(), ckpt_path=tmp_path / "three.ckpt", weights_only=False)
    assert second.global_step == 5


def test_a_step_that_fails_leaves_no_hook_behind(tmp_path):
    pytest.importorskip("lightning")
    module = lightning_module()
    module.model[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, max_steps=5, enable_checkpointing=False).fit(module, loader())
    optimizer = module.step.optimizer
    assert not optimizer._optimizer_step_pre_hooks and not optimizer.is_perturbed


def test_lightnings_closure_form_counts_too(tmp_path):
    pytest.importorskip("lightning")
    module = lightning_module()
    seen = []

    def training_step(batch, batch_idx):
        x, y = batch
        seen.append(module.optimizers().step(lambda: CRITERION(module.model(x), y)))

    module.training_step = training_step
    fit = trainer(tmp_path, max_steps=4, enable_checkpointing=False)
    fit.fit(module, loader())
    assert fit.global_step == 4 == len(seen)


def lightning_averages_over_its_ranks(rank: int, ranks: int) -> None:
    """Whose DDP is around the module that trains, and the model inside."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank))
    with tempfile.TemporaryDirectory() as folder:
        module = lightning_module()
        import lightning

        fit = lightning.Trainer(
            accelerator="cpu", devices=ranks, strategy="ddp", max_epochs=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            use_distributed_sampler=False, default_root_dir=folder,
        )  # fmt: skip
        own = [processes.own(batch, rank, ranks) for batch in batches(6, torch.float32)]
        x, y = (torch.cat(t) for t in zip(*own))
        fit.fit(module, DataLoader(TensorDataset(x, y), 8))
        assert fit.global_step == 6
    assert distance(module.model, expected_after(6)) < 1e-6


def test_lightning_on_ranks(tmp_path):
    pytest.importorskip("lightning")
    (outcome,) = processes.outcomes({"": lightning_averages_over_its_ranks}, 2, tmp_path).values()
    assert not outcome, outcome


def test_fabric_runs_its_callbacks():
    lightning = pytest.importorskip("lightning")
    called = []

    class Callback:
        def on_after_optimizer_step(self, strategy, optimizer) -> None:
            called.append(optimizer)

    fabric = lightning.Fabric(accelerator="cpu", devices=1, callbacks=[Callback()])
    model = network("group", torch.float32)
    sam = imbsam(model)
    wrapped, optimizer = fabric.setup(model, sam)
    step = TrainStep(wrapped, CRITERION, optimizer)
    for x, y in batches(3, torch.float32):
        step(x, y)
    assert called == [sam] * 3
    assert distance(model, expected_after(3)) == 0


# ---------------------------------------------------------------- Accelerate


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    with no_state_left():
        yield lambda **settings: accelerate.Accelerator(cpu=True, **settings)


def prepared(accelerator):
    model = network("group", torch.float32)
    return accelerator.prepare(model, imbsam(model))


def test_a_schedule_of_accelerates_optimizer_warns_of_nothing(accelerator):
    accelerator = accelerator()
    model, optimizer = prepared(accelerator)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    schedule = accelerator.prepare(schedule)
    step = TrainStep(model, CRITERION, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in batches(3, torch.float32):
            step(x, y)
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 / 8
    assert not optimizer.step_was_skipped


def test_accumulation_is_refused_where_it_would_be_ignored(accelerator):
    accelerator = accelerator(gradient_accumulation_steps=2)
    model, optimizer = prepared(accelerator)
    step = TrainStep(model, CRITERION, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next(batches(1, torch.float32))
    with (
        pytest.raises(RuntimeError, match=r"inside accelerator.accumulate.*micro_batch_size"),
        accelerator.accumulate(model),
    ):
        step(x, y)
    assert all(map(torch.equal, model.parameters(), before)) and not optimizer.state
    step_outside = TrainStep(model, CRITERION, optimizer, micro_batch_size=8)
    accelerator.sync_gradients = True
    step_outside(x, y)
    assert not any(map(torch.equal, model.parameters(), before))


def test_accumulation_over_one_batch_is_nothing(accelerator):
    accelerator = accelerator()
    model, optimizer = prepared(accelerator)
    step = TrainStep(model, CRITERION, optimizer)
    for x, y in batches(3, torch.float32):
        with accelerator.accumulate(model):
            step(x, y)
    assert distance(model, expected_after(3)) == 0


def test_accelerates_scaler_is_used_and_told_of_skipped_steps(accelerator):
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator()
    model = network("group", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = AcceleratedOptimizer(imbsam(model), scaler=scaler)
    step = TrainStep(model, CRITERION, optimizer)
    assert step.grad_scaler is scaler
    data = list(batches(2, torch.float32))
    step(*data[0])
    assert not optimizer.step_was_skipped
    hook = model[-1].weight.register_hook(lambda g: g * torch.inf)
    step(*data[1])
    assert optimizer.step_was_skipped and scaler.get_scale() == 4
    hook.remove()
    step(*data[1])
    assert not optimizer.step_was_skipped
    other = torch.amp.GradScaler("cpu")
    assert TrainStep(model, CRITERION, optimizer, grad_scaler=other).grad_scaler is other
