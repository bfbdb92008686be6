"""ImbSAM in Hugging Face's Trainer: a small BERT learns rare kinds of sentences.

    python examples/transformers_trainer.py --accumulate 2
    python examples/transformers_trainer.py --epochs 5 --checkpoint run
    python examples/transformers_trainer.py --epochs 10 --checkpoint run     # the other five

The sentences are drawn here, the weights at random: nothing is loaded. Needs the extra `examples`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from imbsam_fast import ClassSplit, SplitCrossEntropy
from imbsam_fast.integrations.transformers import ImbSAMTrainer

COUNTS = [160, 80, 40, 20, 10]  # training sentences of each class
TEST_COUNTS = [20] * len(COUNTS)
WORDS, LENGTH = 40, 12


def sentences(counts: list[int], seed: int) -> list[dict]:
    """Of random words, every second one of the four that its class likes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    words = torch.randint(0, WORDS, (len(labels), LENGTH), generator=generator)
    liked = 4 * labels[:, None] + torch.randint(0, 4, words.shape, generator=generator)
    words = torch.where(torch.rand(words.shape, generator=generator) < 0.5, liked, words)
    mask = torch.ones(LENGTH, dtype=torch.int64)
    return [
        {"input_ids": w, "attention_mask": mask, "labels": int(y)} for w, y in zip(words, labels)
    ]


class PrintEpochs(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            loss, norm = logs["loss"], logs["grad_norm"]
            print(f"epoch {state.epoch:.0f}: loss {loss:.4f}, grad norm {norm:.4f}")


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--accumulate", type=int, default=1, help="batches that make one step")
    parser.add_argument("--checkpoint", type=Path, help="folder, read before, written each epoch")
    args = parser.parse_args()

    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=LENGTH, num_labels=len(COUNTS),
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            str(args.checkpoint or folder), num_train_epochs=args.epochs, learning_rate=5e-3,
            lr_scheduler_type="constant", per_device_train_batch_size=32 // args.accumulate,
            gradient_accumulation_steps=args.accumulate, max_grad_norm=5.0,
            logging_strategy="epoch", save_strategy="epoch" if args.checkpoint else "no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = ImbSAMTrainer(
            model, arguments, train_dataset=sentences(COUNTS, seed=0),
            eval_dataset=sentences(TEST_COUNTS, seed=1), compute_metrics=accuracy,
            callbacks=[PrintEpochs()],
            criterion=SplitCrossEntropy(ClassSplit.from_counts(COUNTS, eta=20)), rho=0.05,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        resumed = args.checkpoint is not None and args.checkpoint.exists()
        last = get_last_checkpoint(str(args.checkpoint)) if resumed else None
        trainer.train(resume_from_checkpoint=last)

    result = trainer.evaluate()
    print(f"{trainer.state.global_step} steps, accuracy {result['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
