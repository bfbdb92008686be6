"""ImbSAM in a plain training loop, with a schedule and a checkpoint to go on from.

    python examples/plain_loop.py --epochs 5 --checkpoint run.pt
    python examples/plain_loop.py --epochs 10 --checkpoint run.pt     # the other five

Needs the extra `examples`. Twenty epochs take some seconds on a CPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.recipes.data import digits
from imbsam_fast.recipes.models.convnet import ConvNet


def save(path: Path, epoch: int, **parts: Any) -> None:
    """Written beside the old checkpoint, which stays whole until the new one is."""
    new = path.with_suffix(".new")
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"epoch": epoch, "random": torch.get_rng_state(), **states}, new)
    os.replace(new, path)


def load(path: Path, **parts: Any) -> int:
    checkpoint = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random"])
    return checkpoint["epoch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, help="read before, written after each epoch")
    args = parser.parse_args()

    torch.manual_seed(0)
    data = digits.load(imbalance_factor=50, seed=0)
    loader = DataLoader(TensorDataset(data.train_images, data.train_targets), 64, shuffle=True)
    model = ConvNet("batch")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = ImbSAM(sgd, rho=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1)
    criterion = SplitCrossEntropy(ClassSplit.from_counts(data.counts, eta=20))
    step = TrainStep(model, criterion, optimizer)

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    resumed = args.checkpoint is not None and args.checkpoint.exists()
    first = load(args.checkpoint, **parts) if resumed else 0
    for epoch in range(first, args.epochs):
        model.train()
        losses = [step(images, targets).loss for images, targets in loader]
        schedule.step()
        print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.4f}")
        if args.checkpoint is not None:
            save(args.checkpoint, epoch + 1, **parts)

    model.eval()
    with torch.no_grad():
        right = model(data.test_images).argmax(1) == data.test_targets
    print(f"accuracy {right.float().mean():.4f}")


if __name__ == "__main__":
    main()
