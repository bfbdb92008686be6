"""ImbSAM with the pieces of timm's train.py: its optimizers, schedules, mixup and ModelEma.

    python examples/timm_train.py --opt sgd --lr 0.05
    python examples/timm_train.py --epochs 5 --checkpoint run.pt
    python examples/timm_train.py --epochs 10 --checkpoint run.pt     # the other five

In train.py itself three places change: ImbSAM goes around what `create_optimizer_v2` returns, the
criterion becomes a SplitCrossEntropy (of soft targets where mixup makes them), and a TrainStep
takes the place of forward, backward, clipping and step. Needs the extra `examples`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.recipes.data import digits


def save(path: Path, epoch: int, parts: dict) -> None:
    """Written beside the old checkpoint, which stays whole until the new one is."""
    states = {name: part.state_dict() for name, part in parts.items()}
    numpys = np.random.get_state(legacy=False)  # which mixup draws from
    numpys["state"]["key"] = numpys["state"]["key"].tolist()  # no array, for weights_only
    random = torch.get_rng_state(), numpys
    new = path.with_suffix(".new")
    torch.save({"epoch": epoch, "random": random, **states}, new)
    os.replace(new, path)


def load(path: Path, parts: dict) -> int:
    checkpoint = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random"][0])
    np.random.set_state(checkpoint["random"][1])
    return checkpoint["epoch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--model", default="test_resnet", help="one of timm.list_models()")
    parser.add_argument("--opt", default="adamw", help="one of timm.optim.list_optimizers()")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--mixup", type=float, default=0.2, help="alpha, 0 for none")
    parser.add_argument("--checkpoint", type=Path, help="read before, written after each epoch")
    args = parser.parse_args()

    timm.utils.random_seed(0)
    data = digits.load(imbalance_factor=50, seed=0)
    images, targets = data.train_images, data.train_targets
    loader = DataLoader(TensorDataset(images, targets), 64, shuffle=True, drop_last=True)
    model = timm.create_model(args.model, in_chans=1, num_classes=10)
    base = create_optimizer_v2(
        model, opt=args.opt, lr=args.lr, momentum=0.9, weight_decay=5e-4, filter_bias_and_bn=True
    )
    optimizer = ImbSAM(base, rho=0.05)
    schedule, _ = create_scheduler_v2(  # by updates, with a warmup
        optimizer, "cosine", num_epochs=20, warmup_epochs=1, warmup_lr=1e-3,
        step_on_epochs=False, updates_per_epoch=len(loader),
    )  # fmt: skip
    ema = ModelEmaV3(model, decay=0.8)
    mixup = Mixup(args.mixup, num_classes=10, label_smoothing=0.1) if args.mixup else None
    criterion = SplitCrossEntropy(ClassSplit.from_counts(data.counts, eta=20))
    step = TrainStep(model, criterion, optimizer, max_norm=5.0)  # train.py's --clip-grad

    parts = {"model": model, "optimizer": optimizer, "ema": ema}
    resumed = args.checkpoint is not None and args.checkpoint.exists()
    first = load(args.checkpoint, parts) if resumed else 0
    updates = first * len(loader)
    schedule.step_update(updates)
    for epoch in range(first, args.epochs):
        model.train()
        seen = []
        for images, targets in loader:
            if mixup is not None:
                images, targets = mixup(images, targets)  # targets (N, 10) from here on
            result = step(images, targets)
            updates += 1
            ema.update(model, step=updates)
            schedule.step_update(updates)
            seen.append(torch.stack([result.loss, result.grad_norm]))
        loss, norm = torch.stack(seen).mean(0)
        print(f"epoch {epoch + 1}: loss {loss:.4f}, grad norm {norm:.4f}")
        if args.checkpoint is not None:
            save(args.checkpoint, epoch + 1, parts)

    ema.eval()
    with torch.no_grad():
        right = ema(data.test_images).argmax(1) == data.test_targets
    print(f"accuracy {right.float().mean():.4f}")


if __name__ == "__main__":
    main()
