"""ImbSAMMixin: what Lightning does around steps of automatic optimisation, around those of ours."""

from __future__ import annotations

import functools

import pytest
import torch
from networks import COUNTS, batches, distance, imbsam, network
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,  # Lightning takes seconds to import
]

CRITERION = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
STEPS = 6  # an epoch


@pytest.fixture(scope="module")
def lightning():
    return pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def module_class(lightning):
    from imbsam_fast.integrations.lightning import ImbSAMMixin

    class Module(ImbSAMMixin, lightning.LightningModule):
        def __init__(self, schedule=None, **options) -> None:
            super().__init__()
            self.model = network("group", torch.float32)
            self.schedule = schedule
            self.options = options
            self.rates: list[float] = []

        def configure_optimizers(self):
            optimizer = imbsam(self.model)
            if self.schedule is None:
                return optimizer
            schedule, settings = self.schedule
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule(optimizer), **settings},
            }

        def configure_step(self) -> TrainStep:
            return TrainStep(self.model, CRITERION, self.optimizers(), **self.options)

        def training_step(self, batch, _) -> None:
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            self.imbsam_step(*batch)

        def validation_step(self, batch, _) -> None:
            x, y = batch
            self.log("val_loss", CRITERION(self.model(x), y).total, batch_size=len(y))

    return Module


def loader() -> DataLoader:
    x, y = (torch.cat(t) for t in zip(*batches(STEPS, torch.float32)))
    return DataLoader(TensorDataset(x, y), 16)


def trainer(tmp_path, **settings):
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        num_sanity_val_steps=0, enable_model_summary=False, default_root_dir=tmp_path,
        **{"enable_checkpointing": False, **settings},
    )  # fmt: skip


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


@pytest.mark.quick
def test_the_steps_are_those_of_a_train_step_and_are_logged(tmp_path, module_class):
    module, fit = module_class(max_norm=0.5), trainer(tmp_path, max_epochs=1)
    fit.fit(module, loader())
    model = network("group", torch.float32)
    step = TrainStep(model, CRITERION, imbsam(model), max_norm=0.5)
    results = [step(x, y) for x, y in batches(STEPS, torch.float32)]
    assert distance(module.model, model) == 0
    assert fit.global_step == STEPS
    for name in ("loss", "head", "tail", "grad_norm", "clip_factor", "tail_share", "perturbed"):
        assert float(fit.callback_metrics[name]) == pytest.approx(float(getattr(results[-1], name)))
    assert results[0].clip_factor < 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"interval": "step"}, [0.05 / 2**i for i in range(12)]),
        ({"interval": "step", "frequency": 4}, [0.05] * 4 + [0.025] * 6 + [0.0125] * 2),
        ({"interval": "epoch"}, [0.05] * 6 + [0.025] * 6),
    ],
)
def test_schedules_have_their_turn(tmp_path, settings, expected, module_class):
    module = module_class(schedule=(step_lr, settings))
    trainer(tmp_path, max_epochs=2).fit(module, loader())
    assert module.rates == pytest.approx(expected)


def automatic_rates(tmp_path, schedule, settings) -> list[float]:
    """The learning rates that Lightning's own optimisation has."""
    lightning = pytest.importorskip("lightning")

    class Automatic(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network("group", torch.float32)
            self.rates: list[float] = []

        def configure_optimizers(self):
            sgd = torch.optim.SGD(self.model.parameters(), 0.05)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule(sgd), **settings}}

        def training_step(self, batch, _):
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            x, y = batch
            return CRITERION(self.model(x), y).total

        def validation_step(self, batch, _) -> None:
            self.log("val_loss", torch.tensor(1.0))

    module = Automatic()
    trainer(tmp_path, max_epochs=4).fit(module, loader(), loader())
    return module.rates


def test_schedules_are_stepped_as_lightning_does(tmp_path, module_class):
    settings = {"interval": "epoch", "frequency": 2}
    module = module_class(schedule=(step_lr, settings))
    trainer(tmp_path, max_epochs=4).fit(module, loader(), loader())
    expected = automatic_rates(tmp_path, step_lr, settings)
    assert module.rates == expected and len(set(expected)) == 2


def test_a_schedule_that_monitors_is_left_to_the_module(tmp_path, module_class):
    class Plateau(module_class):
        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step(1.0)

    schedule = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0)
    module = Plateau(schedule=(schedule, {"interval": "epoch"}))
    trainer(tmp_path, max_epochs=3).fit(module, loader())
    assert module.rates == [0.05] * 12 + [0.025] * 6


def test_a_resumed_fit_is_the_fit_without_the_break_bit_for_bit(tmp_path, lightning, module_class):
    from lightning.pytorch.callbacks import ModelCheckpoint

    settings = {"schedule": (step_lr, {"interval": "epoch"}), "perturb_every": 4}
    whole = module_class(**settings)
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, monitor=None)
    fit = trainer(tmp_path, max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True)
    fit.fit(whole, loader(), loader())
    resumed = module_class(**settings)
    again = trainer(tmp_path, max_epochs=3)
    path = tmp_path / "epoch=0.ckpt"
    again.fit(resumed, loader(), loader(), ckpt_path=path, weights_only=False)
    assert again.global_step == fit.global_step == 3 * STEPS
    assert resumed.rates == whole.rates[STEPS:]
    assert distance(whole.model, resumed.model) == 0
    assert resumed._around_steps.state_dict() == whole._around_steps.state_dict()
    second = trainer(tmp_path, max_epochs=1)  # with optimizers of its own
    second.fit(whole, loader())
    assert second.global_step == STEPS


def test_the_precision_is_the_trainers(tmp_path, module_class):
    module = module_class()
    dtypes = []
    module.model[-1].register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(module, loader())
    assert set(dtypes) == {torch.bfloat16}


def test_the_order_of_bases_is_checked(tmp_path, lightning, module_class):
    ImbSAMMixin, *_ = module_class.__bases__

    class Wrong(lightning.LightningModule, ImbSAMMixin):
        configure_optimizers = module_class.configure_optimizers
        training_step = module_class.training_step
        schedule = None

        def __init__(self) -> None:
            super().__init__()
            self.model = network("group", torch.float32)
            self.rates: list[float] = []

    with pytest.raises(RuntimeError, match="expected the mixin before LightningModule"):
        trainer(tmp_path, max_epochs=1).fit(Wrong(), loader())


def test_a_module_without_configure_step_is_told(tmp_path, module_class):
    class Without(module_class):
        def configure_step(self):
            return super(module_class, self).configure_step()

    with pytest.raises(NotImplementedError, match="Without has no configure_step"):
        trainer(tmp_path, max_epochs=1).fit(Without(), loader())


@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_what_lightning_refuses_stays_refused(tmp_path, setting, module_class):
    with pytest.raises(Exception, match="not supported for manual optimization"):
        trainer(tmp_path, max_epochs=1, **setting).fit(module_class(), loader())
