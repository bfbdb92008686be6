"""ImbSAM with Hugging Face Accelerate: accumulation, mixed precision, several processes.

    accelerate launch --mixed_precision bf16 examples/accelerate_loop.py --accumulate 2
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/accelerate_loop.py --cpu
    python examples/accelerate_loop.py --epochs 5 --checkpoint run
    python examples/accelerate_loop.py --epochs 10 --checkpoint run     # the other five

Inside `accelerator.accumulate` batches wait for the last of them, which makes the step with all
their rows. Needs the extra `examples`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy
from imbsam_fast.integrations.accelerate import AccumulatedStep
from imbsam_fast.recipes.data import digits
from imbsam_fast.recipes.models.convnet import ConvNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches that make one step")
    parser.add_argument("--checkpoint", type=Path, help="folder, read before, written each epoch")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()

    # Of the precision that `accelerate launch` was given.
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulate)
    set_seed(0)
    data = digits.load(imbalance_factor=50, seed=0)
    batch_size = 64 // accelerator.num_processes // args.accumulate
    model = ConvNet("group")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = ImbSAM(sgd, rho=0.05)
    loader = DataLoader(
        TensorDataset(data.train_images, data.train_targets), batch_size, shuffle=True
    )
    test = DataLoader(TensorDataset(data.test_images, data.test_targets), 100)
    model, optimizer, loader, test = accelerator.prepare(model, optimizer, loader, test)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1)  # by epochs
    accelerator.register_for_checkpointing(schedule)

    criterion = SplitCrossEntropy(ClassSplit.from_counts(data.counts, eta=20))
    # max_norm is the place of accelerator.clip_grad_norm_.
    step = AccumulatedStep(accelerator, model, criterion, optimizer, max_norm=5.0)
    if args.checkpoint is not None and args.checkpoint.exists():
        accelerator.load_state(args.checkpoint)
    for epoch in range(schedule.last_epoch, args.epochs):
        results = []
        for images, targets in loader:
            with accelerator.accumulate(model):
                results.append(step(images, targets))  # None, and at the last batch the step's
        schedule.step()
        seen = torch.stack([torch.stack([r.loss, r.grad_norm]) for r in results if r is not None])
        loss, norm = accelerator.gather(seen).reshape(-1, 2).mean(0)
        accelerator.print(f"epoch {epoch + 1}: loss {loss:.4f}, grad norm {norm:.4f}")
        if args.checkpoint is not None:
            accelerator.save_state(args.checkpoint)

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
