"""ImbSAM with a closure, for losses that TrainStep does not know: here one with a penalty.

    python examples/closure_loop.py

The closure runs the forward pass and returns a SplitLoss; the optimizer calls it at the weights
and at the perturbed weights. Needs the extra `examples`.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import (
    ClassSplit,
    ImbSAM,
    SplitCrossEntropy,
    SplitLoss,
    frozen_batch_norm_statistics,
)
from imbsam_fast.recipes.data import digits
from imbsam_fast.recipes.models.convnet import ConvNet

PENALTY = 1e-3  # on large logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = digits.load(imbalance_factor=50, seed=0)
    loader = DataLoader(TensorDataset(data.train_images, data.train_targets), 64, shuffle=True)
    model = ConvNet("batch")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = ImbSAM(sgd, rho=0.05)
    criterion = SplitCrossEntropy(ClassSplit.from_counts(data.counts, eta=20))

    for epoch in range(args.epochs):
        losses = []
        for images, targets in loader:

            def closure(images=images, targets=targets) -> SplitLoss:
                # Running statistics are those of the unperturbed passes.
                frozen = frozen_batch_norm_statistics(model) if optimizer.is_perturbed else None
                with frozen or nullcontext():
                    logits = model(images)
                loss = criterion(logits, targets)
                # What is added to the head part counts at the weights alone, what is added to
                # the tail part decides the perturbation too.
                return SplitLoss(loss.head + PENALTY * logits.square().mean(), loss.tail)

            losses.append(optimizer.step(closure).total)
        print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.4f}")

    model.eval()
    with torch.no_grad():
        right = model(data.test_images).argmax(1) == data.test_targets
    print(f"accuracy {right.float().mean():.4f}")


if __name__ == "__main__":
    main()
