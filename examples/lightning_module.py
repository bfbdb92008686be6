"""ImbSAM in a LightningModule: ImbSAMMixin looks after the manual optimisation.

    python examples/lightning_module.py --precision bf16-mixed
    python examples/lightning_module.py --accelerator cpu --devices 2
    python examples/lightning_module.py --epochs 5 --checkpoint run.ckpt
    python examples/lightning_module.py --epochs 10 --checkpoint run.ckpt     # the other five

Lightning counts the steps, so that `max_steps`, checkpoints every so many steps and the profiler
work. Needs the extra `examples`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.integrations.lightning import ImbSAMMixin
from imbsam_fast.recipes.data import digits
from imbsam_fast.recipes.models.convnet import ConvNet


class LongTailed(ImbSAMMixin, lightning.LightningModule):
    """A classifier; `counts` are the training images of each class."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.model = ConvNet("group", num_classes=len(counts))
        self.criterion = SplitCrossEntropy(ClassSplit.from_counts(counts, eta=20))

    def configure_optimizers(self) -> dict:
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        optimizer = ImbSAM(sgd, rho=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def configure_step(self) -> TrainStep:
        # max_norm is the place of the Trainer's gradient_clip_val.
        return TrainStep(self.model, self.criterion, self.optimizers(), max_norm=5.0)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.imbsam_step(*batch, on_epoch=True, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        seen = self.trainer.callback_metrics
        loss, norm = seen["loss_epoch"], seen["grad_norm_epoch"]
        self.print(f"epoch {self.current_epoch + 1}: loss {loss:.4f}, grad norm {norm:.4f}")

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, targets = batch
        right = self.model(images).argmax(1) == targets
        self.log("accuracy", right.float().mean(), sync_dist=True, batch_size=len(targets))

    # The order of the images goes on too; Lightning itself keeps no random state.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["random"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--precision", default="32-true", help="as for lightning.Trainer")
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--devices", type=int, default=1, help="each with its share of a batch")
    parser.add_argument("--checkpoint", type=Path, help="read before, written after the training")
    args = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    data = digits.load(imbalance_factor=50, seed=0)
    train = DataLoader(
        TensorDataset(data.train_images, data.train_targets), 64 // args.devices, shuffle=True
    )
    test = DataLoader(TensorDataset(data.test_images, data.test_targets), 500)
    module = LongTailed(data.counts)
    trainer = lightning.Trainer(
        max_epochs=args.epochs, precision=args.precision, accelerator=args.accelerator,
        devices=args.devices, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    resumed = args.checkpoint is not None and args.checkpoint.exists()
    trainer.fit(module, train, ckpt_path=args.checkpoint if resumed else None)
    if args.checkpoint is not None:
        trainer.save_checkpoint(args.checkpoint)
    accuracy = trainer.test(module, test, verbose=False)[0]["accuracy"]
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
