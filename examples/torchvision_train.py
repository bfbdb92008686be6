"""ImbSAM in a loop like torchvision's references/classification: mixup, warmup, EMA, clipping.

    python examples/torchvision_train.py --epochs 5 --checkpoint run.pt
    python examples/torchvision_train.py --epochs 10 --checkpoint run.pt     # the other five
    python examples/torchvision_train.py --amp float16                       # on a GPU

Of `train_one_epoch` the lines from `criterion(output, target)` to `optimizer.step()` become one
call. Needs the extra `examples`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import v2

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.recipes.data import digits
from imbsam_fast.recipes.models.convnet import ConvNet


def train_one_epoch(
    step: TrainStep, ema: AveragedModel, loader: DataLoader, device: torch.device
) -> Tensor:
    """The mean loss and the mean norm of the gradient."""
    step.model.train()
    seen = []
    for images, targets in loader:
        result = step(images.to(device, non_blocking=True), targets)  # targets stay on the CPU
        ema.update_parameters(step.model)
        seen.append(torch.stack([result.loss, result.grad_norm]))
    return torch.stack(seen).mean(0)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor, device: torch.device) -> float:
    model.eval()
    return float((model(images.to(device)).argmax(1).cpu() == targets).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=["float16", "bfloat16"], help="mixed precision")
    parser.add_argument("--mixup-alpha", type=float, default=0.2, help="0 for none")
    parser.add_argument("--checkpoint", type=Path, help="read before, written after each epoch")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(args.device)
    data = digits.load(imbalance_factor=50, seed=0)
    mixup = v2.MixUp(alpha=args.mixup_alpha, num_classes=10) if args.mixup_alpha else None

    def collate(rows: list) -> tuple[Tensor, Tensor]:
        images, targets = default_collate(rows)
        return mixup(images, targets) if mixup else (images, targets)

    dataset = TensorDataset(data.train_images, data.train_targets)
    loader = DataLoader(dataset, 64, shuffle=True, collate_fn=collate)
    model = ConvNet("batch").to(device)
    criterion = SplitCrossEntropy(ClassSplit.from_counts(data.counts, eta=20), label_smoothing=0.1)
    norms = [p for p in model.parameters() if p.dim() == 1]  # BatchNorm's, and biases
    others = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = ImbSAM(sgd, rho=0.05)
    schedule = SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 18)], [2]
    )
    scaler = torch.amp.GradScaler(device.type) if args.amp == "float16" else None
    autocast = torch.autocast(device.type, getattr(torch, args.amp)) if args.amp else None
    step = TrainStep(
        model, criterion, optimizer, autocast=autocast, grad_scaler=scaler, max_norm=5.0
    )
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    if scaler is not None:
        parts["scaler"] = scaler
    first = 0
    if args.checkpoint is not None and args.checkpoint.exists():
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random"])
        first = checkpoint["epoch"]
    for epoch in range(first, args.epochs):
        loss, norm = train_one_epoch(step, ema, loader, device)
        schedule.step()
        print(f"epoch {epoch + 1}: loss {loss:.4f}, grad norm {norm:.4f}")
        if args.checkpoint is not None:
            states = {name: part.state_dict() for name, part in parts.items()}
            new = args.checkpoint.with_suffix(".new")
            torch.save({"epoch": epoch + 1, "random": torch.get_rng_state(), **states}, new)
            os.replace(new, args.checkpoint)
    print(f"accuracy {accuracy(ema, data.test_images, data.test_targets, device):.4f}")


if __name__ == "__main__":
    main()
