"""Training runs on images: stages, checkpoints, resuming, validation, evaluation."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from imbsam_fast.recipes import run_directory
from imbsam_fast.recipes.data.images import LongTailImages, MemoryImages
from imbsam_fast.recipes.models.names import MODELS
from imbsam_fast.recipes.models.registry import classifier, make_model
from imbsam_fast.recipes.run_directory import RunDirectory, RunDirectoryError, find_runs
from imbsam_fast.recipes.settings import config
from imbsam_fast.recipes.settings.config import RunConfig
from imbsam_fast.recipes.settings.datasets import DATASETS
from imbsam_fast.recipes.train import stages
from imbsam_fast.recipes.train.epoch_sums import EpochSums
from imbsam_fast.recipes.train.evaluation import evaluate
from imbsam_fast.recipes.train.methods import sharpness_split
from imbsam_fast.recipes.train.ranks import Ranks, RanksError
from imbsam_fast.recipes.train.run import InterruptedRun, load_model, run_to_the_end
from imbsam_fast.recipes.train.schedule import cosine_with_warmup
from imbsam_fast.recipes.train.stop_signals import StopSignals
from imbsam_fast.recipes.train.training import ImageTraining
from tests import recipe_data

COUNTS = [9, 5, 3, 2]
STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def settings(**changes) -> RunConfig:
    given = {"dataset": "cifar10-lt", "data_dir": "", "optimizer": "imbsam", "seed": 0}
    small = {"model": "resnet8", "epochs": 2, "batch_size": 8, "lr": 0.05, "eta": 4.0}
    second = {}
    if changes.get("method", "ce") != "ce":
        second = {"stage2_epochs": 2, "stage2_batch_size": 8}
    return config.resolve(DATASETS["cifar10-lt"], {**given, **small, **second, **changes})


@pytest.fixture(scope="module")
def data() -> LongTailImages:
    def images(counts: list[int], seed: int) -> MemoryImages:
        pixels = [recipe_data.pixels(n, k, seed, size=8) for k, n in enumerate(counts)]
        targets = [k for k, n in enumerate(counts) for _ in range(n)]
        return MemoryImages(torch.cat(pixels), torch.tensor(targets), STATISTICS)

    return LongTailImages(
        images(COUNTS, 0), images([3] * 4, 1), images([2] * 4, 2), COUNTS, list("abcd")
    )


def without_times(log: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in log]


class Stop:
    """True once, after step `at` of the run."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


# ---------------------------------------------------------------- resume

CASES = {
    "imbsam": {},
    "sgd": {"optimizer": "sgd"},
    "focal": {"optimizer": "focal-sam", "amp": "bf16"},
    "sampled": {"plan": "sampled", "sample": 0.5},
    "every": {"perturb_every": 2},
    "warm-up": {"warmup_epochs": 1, "norm": "group"},
    "wb": {"method": "wb"},
    "lws": {"method": "lws", "optimizer": "sam"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_anywhere_ends_bit_for_bit_the_same(case, data, tmp_path):
    chosen = settings(**CASES[case])
    whole = RunDirectory.create(tmp_path / "whole", chosen.to_dict())
    result = run_to_the_end(ImageTraining(chosen, data), whole)
    steps = 3 * (chosen.epochs + chosen.stage2_epochs)  # 19 images in batches of 8
    stopped = RunDirectory.create(tmp_path / "stopped", chosen.to_dict())
    for _ in range(steps):  # one step, then a new process
        with pytest.raises(InterruptedRun, match="stopped"):
            run_to_the_end(ImageTraining(chosen, data), stopped, should_stop=Stop(1))
    resumed = run_to_the_end(ImageTraining(chosen, data), stopped)
    assert without_times(stopped.log()) == without_times(whole.log())
    assert resumed["last"] == result["last"] and resumed["best"] == result["best"]
    for best in (False, True):
        one, other = (run.load_checkpoint(best) for run in (whole, stopped))
        assert one["epoch"] == other["epoch"]
        for name, weight in one["model"].items():
            assert torch.equal(weight, other["model"][name]), name


def test_a_run_that_lost_its_last_epoch_writes_that_line_of_the_log_again(data, tmp_path):
    chosen = settings(optimizer="sgd")
    run = RunDirectory.create(tmp_path / "run", chosen.to_dict())
    with pytest.raises(InterruptedRun):  # in the second epoch
        run_to_the_end(ImageTraining(chosen, data), run, should_stop=Stop(4))
    run.append_log({"epoch": 2, "loss": -1.0})  # written, and killed before the checkpoint
    run_to_the_end(ImageTraining(chosen, data), run)
    assert [row["epoch"] for row in run.log()] == [1, 2]
    assert run.log()[1]["loss"] > 0


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number, data, tmp_path):
    run = RunDirectory.create(tmp_path / "run", settings().to_dict())

    def kill(training: ImageTraining) -> None:
        if training.position == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with StopSignals() as signals, pytest.raises(InterruptedRun):
        run_to_the_end(ImageTraining(settings(), data), run, kill, signals.arrived)
    assert signal.getsignal(number) is before
    state = run.load_checkpoint()
    assert (state["epoch"], state["position"]) == (0, 2)
    assert state["config"]["optimizer"] == "imbsam"
    assert run.result() is None


@pytest.mark.slow  # compiles
def test_compiled_runs_follow_one_another(data, tmp_path, monkeypatch):
    compiled = nn.Module.compile
    # As torch.compile does it, without the minutes that Inductor would take.
    monkeypatch.setattr(nn.Module, "compile", lambda m: compiled(m, backend="aot_eager"))
    for optimizer in ("sgd", "imbsam"):
        chosen = settings(optimizer=optimizer, epochs=1, batch_size=19, compile=True)
        run, _ = trained(chosen, data, tmp_path / optimizer)
        plain, _ = trained(replace(chosen, compile=False), data, tmp_path / f"plain-{optimizer}")
        assert run.log()[0]["loss"] == pytest.approx(plain.log()[0]["loss"], rel=1e-4)
    torch._dynamo.reset()


# ---------------------------------------------------------------- files


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    run = RunDirectory.create(tmp_path / "run", {"seed": 0})
    run.save_checkpoint({"epoch": 1})

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_directory.os, "fsync", fail)
    with pytest.raises(RunDirectoryError, match=r"cannot write '.*last.pt': No space left"):
        run.save_checkpoint({"epoch": 2})
    assert run.load_checkpoint() == {"epoch": 1}
    assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml", "last.pt"]


FILE_LIMIT = """
import resource, signal, sys, torch
from pathlib import Path
from imbsam_fast.recipes.run_directory import RunDirectory

run = RunDirectory.create(Path(sys.argv[1]), {"seed": 0})
run.save_checkpoint({"epoch": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run.save_checkpoint({"epoch": 2, "model": torch.zeros(100_000)})
"""


def test_what_the_system_does_not_take_is_named(tmp_path):
    """A limit on the size of files: torch.save fails in words of its own."""
    path = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(path)], capture_output=True, text=True
    )
    last = ended.stderr.splitlines()[-1]
    assert last.endswith(f"RunDirectoryError: cannot write '{path / 'last.pt'}': File too large")
    assert RunDirectory.open(path).load_checkpoint() == {"epoch": 1}
    assert sorted(p.name for p in path.iterdir()) == ["config.yaml", "last.pt"]


def test_a_run_is_trained_by_one_process_at_a_time(data, tmp_path):
    run = RunDirectory.create(tmp_path / "run", settings().to_dict())
    with run.in_use():
        refused = pytest.raises(
            RunDirectoryError, match=f"run' is in use: process {os.getpid()} on "
        )
        with refused, RunDirectory.open(run.path).in_use():
            pass
    with RunDirectory.open(run.path).in_use():  # free again
        pass
    (run.path / "config.yaml").unlink()
    refused = pytest.raises(RunDirectoryError, match=r"cannot write '.*config.yaml': No such file")
    with refused, run.in_use():
        pass


def test_a_line_of_the_log_that_was_cut_off_is_not_read(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    run.append_log({"epoch": 1})
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')
    assert run.log() == [{"epoch": 1}]
    run.keep_log(1)
    assert (run.path / "log.jsonl").read_text() == '{"epoch": 1}\n'


def test_runs_are_found_at_any_depth_once(tmp_path):
    for name in ("b/y", "a", "b/x"):
        RunDirectory.create(tmp_path / name, {"seed": name})
    found = find_runs([tmp_path / "b", tmp_path])
    assert [run.config["seed"] for run in found] == ["b/x", "b/y", "a"]
    with pytest.raises(RunDirectoryError, match="holds no run"):
        find_runs([tmp_path / "c"])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"cannot read config.yaml \(No such file"):
        RunDirectory.open(tmp_path)
    (tmp_path / "config.yaml").write_text("format: 99\n")
    with pytest.raises(RunDirectoryError, match="has format 99, expected 1"):
        RunDirectory.open(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"is not empty.*--resume"):
        RunDirectory.create(tmp_path, {})
    run = RunDirectory.create(tmp_path / "new", {})
    with pytest.raises(RunDirectoryError, match=r"last\.pt' does not exist"):
        run.load_checkpoint()
    (run.path / "last.pt").write_bytes(b"junk")
    with pytest.raises(RunDirectoryError, match=r"last\.pt' is damaged"):
        run.load_checkpoint()


# ---------------------------------------------------------------- stages


def trained(chosen: RunConfig, data: LongTailImages, path) -> tuple[RunDirectory, dict]:
    run = RunDirectory.create(path, chosen.to_dict())
    return run, run_to_the_end(ImageTraining(chosen, data), run)


@pytest.mark.parametrize(("method", "changed"), [("wb", {"fc.weight", "fc.bias"}), ("lws", set())])
def test_stage_two_of_another_run_changes_the_classifier_only(method, changed, data, tmp_path):
    first, _ = trained(settings(epochs=1), data, tmp_path / "ce")
    chosen = settings(method=method, stage1=str(first.path))
    second, result = trained(chosen, data, tmp_path / method)
    stage = "classifier" if method == "wb" else "scales"
    assert [row["stage"] for row in second.log()] == [stage] * 2
    before, after = (run.load_checkpoint()["model"] for run in (first, second))
    names = {name.replace("fc.linear.", "fc."): name for name in after}
    assert {n for n in before if not torch.equal(before[n], after[names[n]])} == changed
    if method == "lws":
        assert (after["fc.scale"] != 1).any()
    else:
        norms = before["fc.weight"].norm(dim=1)
        cap = norms.min() + 0.1 * (norms.max() - norms.min())
        assert (after["fc.weight"].norm(dim=1) <= cap * 1.0001).all()
    model = load_model(second, 4)
    assert evaluate(model, data.test, COUNTS, (200, 1000), confusion=True) == {
        key: result["last"][key] for key in ("plain", "flip")
    }


def test_a_first_stage_of_another_network_is_refused(data, tmp_path):
    first, _ = trained(settings(epochs=1), data, tmp_path / "ce")
    chosen = settings(method="wb", stage1=str(first.path), model="resnet14")
    with pytest.raises(RunDirectoryError, match=r"--stage1 is .* expected a run .*resnet14"):
        ImageTraining(chosen, data)


@pytest.mark.parametrize("batch_size", [7, 20])
def test_ranks_share_a_batch_alike_or_not_at_all(batch_size, data):
    ranks = Ranks("ddp", rank=0, world=2)
    with pytest.raises(
        RanksError, match=f"--batch-size is {batch_size}, .* multiple of the 2 .*19"
    ):
        ImageTraining(settings(batch_size=batch_size), data, ranks)


def test_scales_multiply_the_logits_bias_included():
    linear = nn.Linear(3, 2)
    scaled = stages.ScaledClassifier(linear)
    x = torch.randn(4, 3)
    assert torch.equal(scaled(x), linear(x))
    scaled.scale.data = torch.tensor([2.0, 0.5])
    torch.testing.assert_close(scaled(x), linear(x) * torch.tensor([2.0, 0.5]))


# ---------------------------------------------------------------- validation and evaluation


def test_best_is_chosen_on_the_validation_set(data, tmp_path):
    run, result = trained(settings(epochs=4, lr=0.3), data, tmp_path / "run")
    accuracies = [row["validation"]["all"] for row in run.log()]
    first_best = accuracies.index(max(accuracies)) + 1
    assert result["best"]["epoch"] == run.load_checkpoint(best=True)["epoch"] == first_best
    assert result["last"]["epoch"] == 4
    tested = evaluate(load_model(run, 4, best=True), data.test, COUNTS, (200, 1000), confusion=True)
    assert tested["plain"] == result["best"]["plain"]


def test_without_a_validation_set_there_is_no_best(data, tmp_path):
    alone = LongTailImages(data.train, data.test, None, COUNTS, None)
    run, result = trained(settings(epochs=1), alone, tmp_path / "run")
    assert result["best"] is None and not run.has_checkpoint(best=True)
    assert result["train_accuracy"] == run.log()[-1]["train_accuracy"]


class LeftHalf(nn.Module):
    """Class 0 where the left half of an image is brighter, by the difference."""

    def forward(self, x):
        difference = x[..., :4].mean(dim=(1, 2, 3)) - x[..., 4:].mean(dim=(1, 2, 3)) + 0.1
        return torch.stack([difference, torch.zeros_like(difference)], dim=1)


def test_the_flip_average_sees_both_images():
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    pixels[2:, :, :, 4:] = 200  # two bright on the right: 1 alone, with their mirror images 0
    images = MemoryImages(pixels, torch.tensor([0, 1, 0, 1]), ((0, 0, 0), (1, 1, 1)))
    model = LeftHalf().train()
    found = evaluate(model, images, [150, 10])
    common = {"medium": None, "all": 50}
    assert found["plain"] == {"per_class": [50, 50], "many": 50, "few": 50, **common}
    assert found["flip"] == {"per_class": [100, 0], "many": 100, "few": 0, **common}
    assert model.training
    seen = evaluate(model, images, [150, 10], confusion=True)
    assert seen["plain"].pop("confusion") == ["0:1 1:1", "0:1 1:1"]
    assert seen["flip"].pop("confusion") == ["0:2", "0:2"]
    assert seen == found


def test_epoch_sums_are_means_over_images_of_head_and_tail():
    sums = EpochSums(torch.tensor([False, True]), torch.device("cpu"))
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    sums.add(torch.tensor(3.0), logits[:2], torch.tensor([0, 1]))
    sums.add(torch.tensor(6.0), logits[2:], torch.tensor([0]))
    ce = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0]), reduction="none").tolist()
    expected = {"loss": 4.0, "head": (ce[0] + ce[2]) / 2, "tail": ce[1], "train_accuracy": 200 / 3}
    assert sums.means() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("dataset", "given", "expected"),
    [
        ("cifar100-lt", {}, {"model": "resnet32", "lr": 0.01, "weight_decay": 1e-3,
                             "batch_size": 64, "epochs": 200, "eta": 100, "rho": 0.05}),
        ("cifar100-lt", {"method": "wb"}, {"weight_decay": 5e-3, "stage2_epochs": 10,
                                           "stage2_lr": 0.01, "stage2_weight_decay": 0.1}),
        ("imagenet-lt", {"method": "lws"}, {"model": "resnext50_32x4d", "batch_size": 64,
                                            "weight_decay": 5e-4, "stage2_epochs": 5,
                                            "stage2_lr": 0.2, "stage2_batch_size": 512}),
        ("inaturalist2018", {}, {"model": "resnet50", "batch_size": 512, "lr": 0.2,
                                 "weight_decay": 1e-4, "momentum": 0.9}),
        ("cifar100-lt", {"preset": "released"}, {"eta": 20, "inclusive": False,
                                                 "tail_weight": 2, "batch_norm": "twice"}),
        ("cifar10-lt", {"images": "full"}, {"eta": 400, "group_borders": (200, 1000)}),
        ("cifar10-lt", {"images": "small", "lr": 0.5}, {"eta": 100, "group_borders": (20, 100),
                                                        "lr": 0.5}),
    ],
)  # fmt: skip
def test_settings_are_the_published_ones(dataset, given, expected):
    base = {"dataset": dataset, "data_dir": "", "optimizer": "imbsam", "seed": 0}
    found = config.resolve(DATASETS[dataset], {**base, **given})
    assert {name: getattr(found, name) for name in expected} == expected
    assert RunConfig.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("changes", "plain", "sharp"),
    [
        ({"optimizer": "sgd"}, [1, 1], [0, 0]),
        ({"optimizer": "sgd-weighted"}, [1, 2], [0, 0]),
        ({"optimizer": "sam"}, [0, 0], [1, 1]),
        ({"optimizer": "sam", "tail_weight": 3.0}, [0, 0], [1, 3]),
        ({"optimizer": "imbsam", "tail_weight": 3.0}, [1, 0], [0, 3]),
        ({"optimizer": "focal-sam", "gamma": 2.0}, [0.95, 0.55], [0.05, 0.45]),
    ],
)
def test_class_weights_are_the_method(changes, plain, sharp):
    chosen = settings(**changes)
    split = sharpness_split(chosen, [9, 3])
    assert split.plain.tolist() == pytest.approx(plain)
    assert split.sharp.tolist() == pytest.approx(sharp)


def test_names_tell_runs_apart():
    runs = [
        settings(**changes)
        for changes in ({}, {"rho": 0.1}, {"eta": 3.0}, {"plan": "split"},
                        {"preset": "released"}, {"method": "wb"}, {"optimizer": "sam"},
                        {"optimizer": "sam", "tail_weight": 3.0}, {"tail_weight": 3.0})
    ]  # fmt: skip
    assert len({run.label() for run in runs}) == len({run.directory_name() for run in runs}) == 9
    assert runs[0].label() == settings(seed=1).label()
    assert runs[0].directory_name() == "imbsam-paper-eta4-seed0"


def test_cheaper_steps_are_a_part_of_the_name():
    released = {"preset": "released"}
    sampled = settings(**released, plan="sampled", perturb_every=2)
    assert sampled.batch_norm == "once"  # the plan knows no other way, whatever the preset
    assert sampled.label() == "ImbSAM, released, eta 4, sampled 0.25, every 2"
    assert sampled.directory_name() == "imbsam-released-eta4-sampled0.25-every2-seed0"
    once = settings(**released, batch_norm="once")
    assert once.label() == "ImbSAM, released, eta 4, statistics once"
    with pytest.raises(ValueError, match="batch_norm is 'twice', expected 'once' with plan 'sampl"):
        settings(plan="sampled", batch_norm="twice")
    with pytest.raises(ValueError, match=r"sample is 0\.5, expected 0\.25 with plan 'auto'"):
        settings(sample=0.5)


def test_a_tail_weight_is_named_once_and_only_where_there_is_one():
    labels = [
        settings(optimizer=optimizer, tail_weight=3.0).label()
        for optimizer in ("sgd", "sgd-weighted", "sam", "focal-sam")
    ]
    assert labels == ["SGD", "SGD, tail weight 3, eta 4", "SAM, tail weight 3", "Focal-SAM"]


def test_warm_up_and_cosine():
    sgd = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    schedule = cosine_with_warmup(sgd, steps=8, warmup_steps=4)
    rates = []
    for _ in range(9):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1, 1.5, 2, 2, 1.7071068, 1, 0.2928932, 0])


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "millions"),
    # The first two of He et al.'s table 6, with a classifier of 100 classes instead of 10.
    [("resnet20", 0.276), ("resnet32", 0.470), ("resnet34-cifar", 21.328), ("resnet50", 23.71),
     ("resnext50_32x4d", 23.18), ("convnext_tiny", 27.90), ("vit_b_16", 85.88)],
)  # fmt: skip
def test_networks_have_the_size_that_they_are_known_for(name, millions):
    assert name in MODELS
    with torch.device("meta"):
        model = make_model(name, 100, "batch", seed=0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert classifier(model).out_features == 100


def test_the_cifar_stems_keep_the_resolution():
    model = make_model("resnet34-cifar", 3, "group", seed=0)
    seen = []
    model.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert seen == [(1, 64, 8, 8)]


def test_a_network_without_batch_norm_has_none_to_replace():
    with pytest.raises(ValueError, match="norm is 'group', expected 'batch': vit_b_16 has no"):
        make_model("vit_b_16", 10, "group", seed=0)
