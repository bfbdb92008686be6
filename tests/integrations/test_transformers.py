"""ImbSAMTrainer: the steps of a plain TrainStep, which Trainer counts, logs, saves and resumes."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep

with pytest.MonkeyPatch.context() as patch:
    # Transformers looks for a package of this name, and would find the checkout's folder.
    patch.setitem(sys.modules, "kernels", None)
    pytest.importorskip("transformers.trainer")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,  # Trainer takes seconds to import
]

CLASSES, ROWS, WORDS = 5, 40, 6
LABELS = torch.arange(ROWS) % 8 % CLASSES  # classes 0 to 2 twice as often
CRITERION = SplitCrossEntropy(ClassSplit.from_targets(LABELS, eta=8))


def dataset() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 20, (ROWS, WORDS), generator=generator)
    mask = torch.ones(WORDS, dtype=torch.int64)
    return [
        {"input_ids": w, "attention_mask": mask, "labels": int(y)} for w, y in zip(words, LABELS)
    ]


def network(dropout: float = 0.1) -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=WORDS, num_labels=CLASSES,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def trainer(folder: Path, model=None, optimizers=(None, None), imbsam=None, **settings):
    from transformers import TrainingArguments

    from imbsam_fast.integrations.transformers import ImbSAMTrainer

    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2,
        logging_steps=1, **{"max_steps": 4, "save_strategy": "no", **settings},
    )  # fmt: skip
    return ImbSAMTrainer(
        network() if model is None else model, arguments, optimizers=optimizers,
        **{"criterion": CRITERION, "train_dataset": dataset(), **(imbsam or {})},
    )  # fmt: skip


def logged(run, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def OnStep(call):  # noqa: N802  # Transformers itself takes seconds to import
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            call()

    return Callback()


def different(a: dict, b: dict) -> bool:
    return not all(map(torch.equal, a.values(), b.values()))


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def in_order(model, rows: int):
    """Trainer's dataset without shuffling, as batches for a TrainStep."""
    data = dataset()
    for first in range(0, ROWS, rows):
        part = data[first : first + rows]
        inputs = {k: torch.stack([row[k] for row in part]) for k in ("input_ids", "attention_mask")}
        yield inputs, LABELS[first : first + rows]


@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.quick), 2])
def test_the_steps_are_those_of_a_train_step(tmp_path, accumulated):
    model = network(0)
    base = torch.optim.AdamW(model.parameters(), 1e-2)
    run = trainer(
        tmp_path, model, (base, None), per_device_train_batch_size=8 // accumulated,
        gradient_accumulation_steps=accumulated, train_sampling_strategy="sequential",
        lr_scheduler_type="constant", max_grad_norm=0.137,
    )  # fmt: skip
    run.train()
    model = network(0).train()
    base = torch.optim.AdamW(model.parameters(), 1e-2)
    step = TrainStep(
        model, CRITERION, ImbSAM(base), max_norm=0.137, unpack=True, logits="logits",
        micro_batch_size=None if accumulated == 1 else 4,
    )  # fmt: skip
    results = [step(x, y) for (x, y), _ in zip(in_order(model, 8), range(4))]
    assert equal(run.model, model)
    assert logged(run, "grad_norm") == [float(r.grad_norm) for r in results]
    assert logged(run, "loss") == pytest.approx([float(r.loss) for r in results], abs=5e-5)
    assert any(r.clip_factor < 1 for r in results)


def test_a_resumed_run_is_the_run_without_the_break_bit_for_bit(tmp_path):
    """In the middle of an epoch, with dropout, shuffling, accumulation, and steps that count."""
    settings = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    imbsam = {"step_options": {"perturb_every": 2}}
    whole = trainer(tmp_path / "whole", imbsam=imbsam, **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", imbsam=imbsam, **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert json.loads((checkpoint / "imbsam_step.json").read_text()) == {"counted_steps": 3}
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert equal(whole.model, resumed.model)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert logged(resumed, name)[-5:] == logged(whole, name)[-5:]
    assert resumed.train_step.state_dict() == whole.train_step.state_dict() == {"counted_steps": 8}


def tokenizer(side: str):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, **{f"w{i}": i for i in range(1, 20)}}
    made = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", padding_side=side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_accumulated_batches_of_other_lengths_are_padded(tmp_path, side):
    """As the collator would pad them together."""
    generator = torch.Generator().manual_seed(2)
    rows = [
        {"input_ids": torch.randint(1, 20, (2 + i // 4,), generator=generator).tolist()}
        for i in range(8)
    ]
    data = [{**row, "labels": int(y)} for row, y in zip(rows, LABELS)]
    run = trainer(
        tmp_path, network(0), per_device_train_batch_size=4, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential", max_steps=1, optim="sgd",
        imbsam={"processing_class": tokenizer(side), "train_dataset": data},
    )  # fmt: skip
    run.train()
    whole = trainer(
        tmp_path, network(0), per_device_train_batch_size=8, train_sampling_strategy="sequential",
        max_steps=1, optim="sgd",
        imbsam={
            "processing_class": tokenizer(side), "train_dataset": data,
            "step_options": {"plan": "joint"},
        },
    )  # fmt: skip
    whole.train()
    assert run.last_result.logits.shape == (8, CLASSES)
    assert torch.allclose(run.last_result.logits, whole.last_result.logits, atol=1e-6)
    assert logged(run, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4)


def test_the_norm_is_logged_without_clipping(tmp_path):
    run = trainer(tmp_path, max_grad_norm=0.0, max_steps=2)
    run.train()
    assert len(logged(run, "grad_norm")) == 2
    assert all(0 < norm < float("inf") for norm in logged(run, "grad_norm"))
    assert run.last_result.clip_factor == 1


def test_a_step_that_overflows_is_skipped_by_the_schedule_too(tmp_path):
    run = trainer(tmp_path, max_steps=3)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # fp16 needs a GPU
    run.model.classifier.register_forward_hook(
        lambda module, given, logits: logits * torch.inf if run.state.global_step == 0 else logits
    )
    before = copy.deepcopy(run.model.state_dict())
    changed = []
    run.add_callback(OnStep(lambda: changed.append(different(run.model.state_dict(), before))))
    run.train()
    assert changed == [False, True, True]
    assert logged(run, "learning_rate")[1:] == pytest.approx([1e-2, 1e-2 * 2 / 3])
    assert run.accelerator.scaler.get_scale() == 512


def test_an_optimizer_and_a_schedule_of_the_users(tmp_path):
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)
    run = trainer(tmp_path, model, (sgd, schedule), max_steps=3)
    run.train()
    assert run.optimizer.optimizer.base is sgd
    assert len(sgd.state) == len(list(model.parameters()))
    assert logged(run, "learning_rate") == [0.1, 0.05, 0.025]


def test_a_second_train_goes_on_with_the_same_optimizer(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train()
    optimizer = run.optimizer.optimizer
    before = copy.deepcopy(run.model.state_dict())
    run.train()
    assert run.optimizer.optimizer is optimizer and not isinstance(optimizer.base, ImbSAM)
    assert not all(map(torch.equal, before.values(), run.model.state_dict().values()))


def test_a_failed_step_leaves_nothing_for_the_next(tmp_path):
    run = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    handle = run.model.classifier.register_forward_hook(lambda *_: 1 / 0)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ZeroDivisionError):
        run.train()
    handle.remove()
    assert all(map(torch.equal, before.values(), run.model.state_dict().values()))
    run.train()
    assert run.state.global_step == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, expected 0"),
        (
            {"imbsam": {"step_options": {"max_norm": 1.0}}},
            "'max_norm', expected it in args",
        ),
        ({"imbsam": {"compute_loss_func": print}}, "compute_loss_func is .*, expected None"),
    ],
)
def test_what_trainer_decides_is_refused_elsewhere(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def test_a_batch_without_labels_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.train_dataset = [{k: v for k, v in row.items() if k != "labels"} for row in dataset()]
    with pytest.raises(ValueError, match=r"has input_ids, attention_mask, expected 'labels'"):
        run.train()
