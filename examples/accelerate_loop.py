"""ImbSAM with Hugging Face Accelerate: mixed precision and data parallelism from outside.

    accelerate launch --mixed_precision bf16 examples/accelerate_loop.py --micro-batch-size 16
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/accelerate_loop.py --cpu

TrainStep makes the passes, so there is neither `accelerator.backward` nor `accumulate`: what
accumulates is `micro_batch_size`, the perturbation being that of the whole batch. Needs the
extra `examples`.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.recipes.data import digits
from imbsam_fast.recipes.models.convnet import ConvNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()

    accelerator = Accelerator(cpu=args.cpu)  # of the precision that `accelerate launch` was given
    set_seed(0)
    data = digits.load(imbalance_factor=50, seed=0)
    batch_size = 64 // accelerator.num_processes
    model = ConvNet("group")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = ImbSAM(sgd, rho=0.05)
    loader = DataLoader(
        TensorDataset(data.train_images, data.train_targets), batch_size, shuffle=True
    )
    test = DataLoader(TensorDataset(data.test_images, data.test_targets), 100)
    model, optimizer, loader, test = accelerator.prepare(model, optimizer, loader, test)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=15, gamma=0.1)

    criterion = SplitCrossEntropy(ClassSplit.from_counts(data.counts, eta=20))
    step = TrainStep(
        model, criterion, optimizer,
        grad_scaler=accelerator.scaler, micro_batch_size=args.micro_batch_size,
    )  # fmt: skip
    for epoch in range(args.epochs):
        losses = torch.stack([step(images, targets).loss for images, targets in loader])
        schedule.step()
        accelerator.print(f"epoch {epoch + 1}: loss {accelerator.gather(losses).mean():.4f}")

    model.eval()
    right = []
    with torch.no_grad():
        for images, targets in test:
            right.append(accelerator.gather_for_metrics(model(images).argmax(1) == targets))
    accuracy = torch.cat(right).float().mean()
    accelerator.print(f"{accelerator.num_processes} processes, accuracy {accuracy:.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
