"""Training runs whose steps are CUDA graphs, with a stand-in for the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_stand_in import Runtime, capturable, captured
from rich.console import Console
from tiny_runs import COUNTS, TINY, tiny_data_set, tiny_images
from torch import Tensor, nn

from imbsam_fast.recipes.run_directory import RunDirectory
from imbsam_fast.recipes.settings.arguments import UsageError
from imbsam_fast.recipes.settings.config import PERTURBING, RunConfig, resolve
from imbsam_fast.recipes.train import methods
from imbsam_fast.recipes.train.command import run_command, train_all
from imbsam_fast.recipes.train.dry_run import dry_run
from imbsam_fast.recipes.train.methods import make_trainer
from imbsam_fast.recipes.train.ranks import ALONE, Ranks
from imbsam_fast.recipes.train.run import InterruptedRun, run_to_the_end
from imbsam_fast.recipes.train.training import ImageTraining
from imbsam_fast.training import step_graphs, train_step
from imbsam_fast.training.cuda_graph import GraphedSteps

QUIET = Console(quiet=True)


def settings(**given: Any) -> RunConfig:
    """Of a run with graphs, that is made on the CPU all the same."""
    small = {"batch_size": 24, "epochs": 1, "optimizer": "imbsam", "seed": 0}
    if given.get("method", "ce") != "ce":
        small |= {"stage2_epochs": 1, "stage2_batch_size": 24}
    chosen = {"dataset": "tiny", "device": "cuda", "cuda_graph": True, **small, **given}
    return replace(resolve(TINY, chosen), device="cpu")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphedSteps]:
    """Those of the stand-in, in the order in which they are made: kinds_of each stage."""
    made: list[GraphedSteps] = []

    def in_stand_in(step: Callable, *rest: Any) -> GraphedSteps:
        made.append(GraphedSteps(capturable(step, len(COUNTS), torch.float32), *rest))
        return made[-1]

    def device_of_lr(optimizer: Any, grad_scaler: Any) -> torch.device:
        (lr,) = (group["lr"] for group in optimizer.param_groups)
        assert isinstance(lr, Tensor)
        return lr.device

    Runtime(monkeypatch)
    monkeypatch.setattr(step_graphs, "GraphedSteps", in_stand_in)
    monkeypatch.setattr(methods, "GraphedSteps", in_stand_in)
    monkeypatch.setattr(step_graphs, "check_capturable", device_of_lr)
    return made


def trained(config: RunConfig, path: Any, ranks: Ranks = ALONE) -> RunDirectory:
    run = RunDirectory.create(path, config.to_dict())
    run_to_the_end(ImageTraining(config, tiny_images(), ranks), run)
    return run


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "sgd in float16": {"optimizer": "sgd", "amp": "fp16"},
    "sgd with weights": {"optimizer": "sgd-weighted", "method": "wb"},
    "imbsam": {},
    "sam": {"optimizer": "sam", "plan": "joint", "warmup_epochs": 1, "tail_weight": 2.0},
    "focal": {"optimizer": "focal-sam", "norm": "group", "plan": "split"},
    "no batch statistics": {"norm": "group"},
    "sampled": {"plan": "sampled", "sample": 1.0},
    "logit adjustment": {"loss": "logit-adjust"},
    "wb": {"method": "wb"},
    "lws": {"method": "lws"},
}


def kinds_of(config: RunConfig) -> list[str]:
    """What a stage has graphs of, in their order."""
    perturbs = config.optimizer in PERTURBING
    return ["plain", "joint", "split", "sampled"] if perturbs else ["SGD"]


def kind_of(config: RunConfig) -> str:
    """Which of them a stage uses, beside "plain"."""
    if config.optimizer not in PERTURBING:
        return "SGD"
    return config.plan if config.plan in ("split", "sampled") else "joint"


@pytest.mark.parametrize("case", CASES)
def test_captured_runs_are_those_without_graphs(case, graphs, tmp_path):
    chosen = settings(**CASES[case])
    run = trained(chosen, tmp_path / "graphs")
    stages = 1 if chosen.method == "ce" else 2
    kinds = kinds_of(chosen) * stages
    found = [name for name, steps in zip(kinds, graphs, strict=True) if captured(steps)]
    assert [name for name in found if name != "plain"] == [kind_of(chosen)] * stages
    plain = trained(replace(chosen, cuda_graph=False), tmp_path / "plain")
    assert len(graphs) == len(kinds)
    for row, known in zip(run.log(), plain.log(), strict=True):
        assert isinstance(row["lr"], float)
        for name in ("lr", "loss", "head", "tail"):
            assert row[name] == pytest.approx(known[name], rel=1e-3, abs=1e-9), name
    states = (run.load_checkpoint(), plain.load_checkpoint())
    for name, weight in states[0]["model"].items():
        torch.testing.assert_close(weight, states[1]["model"][name], rtol=1e-2, atol=1e-4)


def learning_rate(training: ImageTraining) -> Any:
    return training.trainer.optimizer.param_groups[0]["lr"]


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("optimizer", "amp"), [("sgd", "off"), ("sgd", "fp16"), ("imbsam", "off")])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_stopped_run_goes_on_with_graphs_and_without(before, after, optimizer, amp, tmp_path):
    """Its learning rate is what its steps read then, and the same."""
    chosen = settings(epochs=2, optimizer=optimizer, amp=amp)
    whole = trained(replace(chosen, cuda_graph=False), tmp_path / "whole")
    run = RunDirectory.create(tmp_path / "run", chosen.to_dict())
    begun = ImageTraining(replace(chosen, cuda_graph=before), tiny_images())
    with pytest.raises(InterruptedRun):
        run_to_the_end(begun, run, should_stop=lambda: begun.position == 5)
    resumed = ImageTraining(replace(chosen, cuda_graph=after), tiny_images())
    resumed.load_state_dict(run.load_checkpoint())
    assert isinstance(learning_rate(resumed), Tensor if after else float)
    # torch's own step reads a rate on a GPU without a wait where it is fused.
    assert resumed.trainer.optimizer.param_groups[0]["fused"] is (True if after else None)
    assert float(learning_rate(resumed)) == pytest.approx(float(learning_rate(begun)), rel=1e-6)
    run_to_the_end(resumed, run)
    for row, known in zip(run.log(), whole.log(), strict=True):
        assert isinstance(row["lr"], float)
        for name in ("lr", "loss"):
            assert row[name] == pytest.approx(known[name], rel=1e-2, abs=1e-9), name


@pytest.mark.usefixtures("graphs")
def test_a_run_that_is_captured_is_resumed_bit_for_bit(tmp_path):
    chosen = settings()
    whole = trained(chosen, tmp_path / "whole")
    run = RunDirectory.create(tmp_path / "run", chosen.to_dict())
    begun = ImageTraining(chosen, tiny_images())
    with pytest.raises(InterruptedRun):
        run_to_the_end(begun, run, should_stop=lambda: begun.position == 5)
    run_to_the_end(ImageTraining(chosen, tiny_images()), run)
    states = (whole.load_checkpoint(), run.load_checkpoint())
    for name, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][name]), name


@pytest.mark.usefixtures("graphs")
def test_a_graph_finds_all_on_its_device():
    """The learning rate and WB's class weights, which a graph cannot copy from the host."""
    chosen = replace(settings(), device="meta")
    model = nn.Linear(3, len(COUNTS), device="meta")
    trainer = make_trainer(model, chosen, COUNTS, torch.ones(len(COUNTS)))
    assert isinstance(trainer.step, train_step.TrainStep)
    found = (trainer.optimizer.param_groups[0]["lr"], trainer.step.criterion.weight)  # type: ignore[attr-defined]
    assert [x.device.type for x in found] == ["meta"] * 2


@pytest.mark.usefixtures("graphs")
def test_what_is_not_captured_is_refused_before_anything_is_written(tmp_path):
    chosen = settings(plan="split")
    message = "plan is 'split', expected with cuda_graph=True"
    with tiny_data_set():
        with pytest.raises(UsageError, match=message):
            train_all([replace(chosen, optimizer="sgd"), chosen], tmp_path / "runs", False, QUIET)
        with pytest.raises(UsageError, match=message):
            run_command([chosen], None, resume=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("graphs")
def test_a_run_that_was_captured_is_resumed_without_graphs(tmp_path):
    chosen = settings(epochs=1)
    with tiny_data_set():
        train_all([chosen], tmp_path, False, QUIET)
        (label,) = train_all([replace(chosen, cuda_graph=False)], tmp_path, True, QUIET)
    assert label == chosen.label()


@pytest.mark.parametrize("every", [1, 3])
def test_a_dry_run_measures_replays(graphs, every):
    """Of every kind that the run has."""
    (measured,) = dry_run([settings(perturb_every=every)], tiny_images(), Console(quiet=True))
    plain, joint, *_ = graphs
    assert captured(joint) == 1 and captured(plain) == (every > 1) and measured.step > 0


def test_runs_of_earlier_versions_were_not_captured():
    known = settings().to_dict()
    assert RunConfig.from_dict(known).cuda_graph is True
    del known["cuda_graph"]
    assert RunConfig.from_dict(known).cuda_graph is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES)
def test_captured_runs_on_a_gpu(case, tmp_path):
    """Stopped and resumed among the replays, and never stopped nor captured."""
    chosen = replace(settings(**CASES[case]), device="cuda")
    ranks = Ranks(device=torch.device("cuda"))
    run = RunDirectory.create(tmp_path / "graphs", chosen.to_dict())
    begun = ImageTraining(chosen, tiny_images(), ranks)
    with pytest.raises(InterruptedRun):
        run_to_the_end(begun, run, should_stop=lambda: begun.position == 5)
    step = begun.trainer.step
    steps = step if isinstance(step, GraphedSteps) else step.graphs.kinds[kind_of(chosen)]  # type: ignore[attr-defined]
    assert captured(steps) == 1
    run_to_the_end(ImageTraining(chosen, tiny_images(), ranks), run)
    plain = trained(replace(chosen, cuda_graph=False), tmp_path / "plain", ranks)
    for row, known in zip(run.log(), plain.log(), strict=True):
        for name in ("lr", "loss"):
            assert row[name] == pytest.approx(known[name], rel=2e-2, abs=1e-9), name
