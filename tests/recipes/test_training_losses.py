"""Logit adjustment and balanced softmax in the recipes: what they are, and every way through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from imbsam_fast import cli
from imbsam_fast.recipes.data.datasets import load
from imbsam_fast.recipes.models.registry import make_model
from imbsam_fast.recipes.run_directory import find_runs
from imbsam_fast.recipes.settings.config import RunConfig, resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from imbsam_fast.recipes.train.losses import LogitAdjusted
from imbsam_fast.recipes.train.methods import make_trainer
from tests import commands

COUNTS = [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]
LOSSES = {
    "balanced": {"loss": "balanced-softmax"},
    "adjusted": {"loss": "logit-adjust", "tau": 0.5},
}
WAYS = {
    "sgd": {"optimizer": "sgd"},
    "control": {"optimizer": "sgd-weighted"},
    "sam": {"optimizer": "sam"},
    "focal": {"optimizer": "focal-sam"},
    "joint": {"plan": "joint", "tail_weight": 2.0},
    "split": {"plan": "split", "norm": "group"},
    "sampled": {"plan": "sampled", "sample": 0.5},
    "every": {"perturb_every": 2},
}


def settings(**changes) -> RunConfig:
    quick = {"dataset": "digits", "optimizer": "imbsam", "epochs": 1, "batch_size": 64, "seed": 0}
    return resolve(DATASETS["digits"], {**quick, **changes})


class Adjusted(nn.Module):
    """A network whose own logits are the adjusted ones."""

    def __init__(self, network: nn.Module, tau: float) -> None:
        super().__init__()
        self.network = network
        self.shift = tau * torch.tensor(COUNTS).log()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 1, 8, 8) to logits (N, 10)."""
        return self.network(images) + self.shift


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_the_softmax_is_weighted_by_the_counts(rows, tau, dtype):
    """-log(n_y^tau exp(z_y) / sum_k n_k^tau exp(z_k)), in float64."""
    random = torch.Generator().manual_seed(rows)
    logits = (3 * torch.randn(rows, 10, generator=random)).to(dtype)
    targets = torch.randint(10, (rows,), generator=random)
    exponentials = torch.tensor(COUNTS).double() ** tau * logits.double().exp()
    expected = (
        -(exponentials / exponentials.sum(1, keepdim=True)).gather(1, targets[:, None])[:, 0].log()
    )
    found = LogitAdjusted(COUNTS, tau)(logits, targets)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_training_is_cross_entropy_training_of_the_adjusted_logits(loss, way):
    images = load(settings()).train
    batches = [torch.arange(7 * i, 304, 5) for i in range(3)]
    adjusted = settings(**WAYS[way], **LOSSES[loss])
    networks = [make_model("convnet", 10, adjusted.norm, seed=0).double()]
    networks.append(copy.deepcopy(networks[0]))
    trainers = [
        make_trainer(networks[0], adjusted, COUNTS),
        make_trainer(Adjusted(networks[1], adjusted.tau), settings(**WAYS[way]), COUNTS),
    ]
    for x, y in images.batches(batches):
        steps = [trainer.step(x.double(), y) for trainer in trainers]
        for part in ("loss", "head", "tail"):
            one, other = (getattr(step, part) for step in steps)
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        with pytest.raises(AssertionError):  # what a run counts and tests is not adjusted
            torch.testing.assert_close(steps[0].logits, steps[1].logits)
    for one, other in zip(*(network.state_dict().values() for network in networks)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- commands


def train(*words: str) -> int:
    return cli.main(["train", "digits", "--epochs", "2", "--batch-size", "64", *words])


@pytest.mark.slow  # trains
def test_balanced_softmax_is_logit_adjustment_with_tau_1_on_the_command_line(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "250")
    optimizers = ["--optimizer", "sgd", "imbsam"]
    for loss in ("balanced-softmax", "logit-adjust"):
        assert train(*optimizers, "--loss", loss, "--save", str(tmp_path / loss)) == 0
        assert f"CE with {loss.replace('-adj', ' adj')[:8]}" in capsys.readouterr().out
    one, other = (find_runs([tmp_path / loss]) for loss in ("balanced-softmax", "logit-adjust"))
    assert [run.path.name for run in one] == [
        "imbsam-paper-eta20-balanced-softmax-seed0",
        "sgd-balanced-softmax-seed0",
    ]
    for first, second in zip(one, other):
        assert first.result()["last"] == second.result()["last"]
        assert first.log()[-1]["loss"] == second.log()[-1]["loss"]
    # A run's own settings make it again.
    again = tmp_path / "again"
    assert train("--config", str(one[0].path / "config.yaml"), "--save", str(again)) == 0
    (repeated,) = find_runs([again])
    assert repeated.result()["last"] == one[0].result()["last"]
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert "SGD, balanced softmax" in shown and "ImbSAM, paper, eta 20, logit adjustment" in shown
    message = commands.refused(
        ["train", "digits", "--epochs", "2", "--batch-size", "64", "--optimizer", "sgd", "--loss",
         "logit-adjust", "--tau", "2", "--save", str(again), "--resume", "--config",
         str(one[1].path / "config.yaml"), "--seeds", "2", "--method", "wb"], capsys)  # fmt: skip
    assert "method is 'wb'" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "wb", "loss": "logit-adjust"}, "loss is 'logit-adjust', expected 'ce' with"),
        ({"method": "lws", "loss": "balanced-softmax"}, "loss is 'balanced-softmax', expected"),
        ({"loss": "balanced-softmax", "tau": 0.5}, "tau is 0.5, expected 1 with loss 'balanced"),
        ({"tau": 2.0}, "tau is 2, expected 1 with loss 'ce'"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_names_and_older_runs():
    chosen = settings(loss="logit-adjust", tau=0.5, preset="released")
    assert chosen.label() == "ImbSAM, released, eta 20, logit adjustment, tau 0.5"
    assert chosen.directory_name() == "imbsam-released-eta20-logit-adjust-tau0.5-seed0"
    older = {k: v for k, v in settings().to_dict().items() if k not in ("loss", "tau")}
    assert RunConfig.from_dict(older) == settings()


def test_runs_of_a_removed_method_are_named_and_others_of_their_time_go_on():
    older = {**settings().to_dict(), "lagged": False}
    assert RunConfig.from_dict(older) == settings()
    with pytest.raises(ValueError, match="lagged is True, expected False: it was removed"):
        RunConfig.from_dict({**older, "lagged": True})
