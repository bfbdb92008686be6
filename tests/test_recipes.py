"""The digits recipe: its data, metrics, methods, timing and picture."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from imbsam_fast import ClassSplit, dispatch
from imbsam_fast.recipes import digits, metrics, timing, training
from imbsam_fast.recipes.models import ConvNet
from imbsam_fast.recipes.presets import PAPER, RELEASED
from imbsam_fast.recipes.training import Settings

pytest.importorskip("sklearn")

COUNTS = [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]
SETTINGS = Settings(
    optimizers=("sgd", "sam", "imbsam"),
    preset="paper",
    eta=20.0,
    inclusive=True,
    tail_weight=1.0,
    batch_norm="once",
    rho=0.05,
    epochs=1,
    batch_size=64,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    norm="batch",
    plan="auto",
    seeds=1,
    imbalance_factor=100.0,
    device="cpu",
)


def settings(**changes) -> Settings:
    return dataclasses.replace(SETTINGS, **changes)


@pytest.fixture(scope="module")
def data() -> digits.LongTailData:
    return digits.load(imbalance_factor=100, seed=0)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("imbalance_factor", "expected"),
    [(100, COUNTS), (1, [124] * 10), (124, [124, 72, 42, 24, 14, 8, 4, 2, 1, 1])],
)
def test_long_tail_counts(imbalance_factor, expected):
    assert digits.long_tail_counts(124, imbalance_factor, 10) == expected


@pytest.mark.parametrize("imbalance_factor", [0.5, 125, float("nan")])
def test_long_tail_counts_refuses_what_would_empty_a_class(imbalance_factor):
    with pytest.raises(ValueError, match=f"imbalance_factor is {imbalance_factor}.* 1 to 124"):
        digits.long_tail_counts(124, imbalance_factor, 10)


def test_split_rows_takes_a_balanced_test_set_and_disjoint_training_rows():
    targets = torch.tensor([0, 1, 2] * 10)
    train, test = digits.split_rows(targets, test_per_class=4, counts=[6, 3, 1], seed=0)
    assert torch.bincount(targets[train]).tolist() == [6, 3, 1]
    assert torch.bincount(targets[test]).tolist() == [4, 4, 4]
    assert len({*train.tolist(), *test.tolist()}) == len(train) + len(test)


def test_split_rows_depends_on_the_seed_alone():
    targets = torch.arange(3).repeat(10)
    first, again, other = (digits.split_rows(targets, 4, [6, 3, 1], seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_the_test_set_does_not_depend_on_the_imbalance():
    long_tailed, balanced = digits.load(100, seed=3), digits.load(1, seed=3)
    assert torch.equal(long_tailed.test_images, balanced.test_images)


def test_split_rows_refuses_a_class_that_is_too_small():
    with pytest.raises(ValueError, match=r"class 1 has 5 rows, expected at least 6: 4 .* and 2"):
        digits.split_rows(torch.tensor([0, 1] * 5), 4, [1, 2], seed=0)


def test_digits_hold_no_test_image_in_the_training_set(data):
    assert data.counts == COUNTS
    assert torch.bincount(data.train_targets).tolist() == COUNTS
    assert torch.bincount(data.test_targets).tolist() == [50] * 10
    train = {image.numpy().tobytes() for image in data.train_images}
    test = {image.numpy().tobytes() for image in data.test_images}
    assert len(train) == sum(COUNTS) and len(test) == 500
    assert not train & test
    assert data.train_images.shape == (304, 1, 8, 8)
    assert (data.train_images.min(), data.train_images.max()) == (-1, 1)


def test_digits_keep_image_and_label_together(data):
    from sklearn.datasets import load_digits

    source = load_digits()
    label_of = {
        (image / 8 - 1).astype("float32").tobytes(): label
        for image, label in zip(source.images, source.target)
    }
    for images, targets in (data[:2], data[2:4]):
        labels = [label_of[image.numpy().tobytes()] for image in images]
        assert labels == targets.tolist()


# ---------------------------------------------------------------- metrics


def test_groups_have_the_borders_of_the_paper():
    groups = [metrics.group_of(n) for n in (101, 100, 20, 19, 0)]
    assert groups == ["many", "medium", "medium", "few", "few"]


def test_per_class_accuracy_by_hand():
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 0, 0, 2, 2, 1, 1])
    assert metrics.per_class_accuracy(predictions, targets, 3) == [75.0, 50.0, 0.0]


def test_per_class_accuracy_refuses_a_class_without_rows():
    with pytest.raises(ValueError, match=r"targets has \[2, 0, 1\] rows per class"):
        metrics.per_class_accuracy(torch.zeros(3), torch.tensor([0, 0, 2]), 3)


def test_group_accuracies_average_classes_not_rows():
    found = metrics.group_accuracies([90.0, 60.0, 40.0, 10.0], [500, 100, 20, 19])
    assert found == {"many": 90.0, "medium": 50.0, "few": 10.0, "all": 50.0}


def test_group_accuracies_of_an_empty_group_are_none():
    found = metrics.group_accuracies([90.0, 70.0], [500, 3])
    assert found == {"many": 90.0, "medium": None, "few": 70.0, "all": 80.0}


def test_mean_and_std_are_those_of_a_sample():
    assert metrics.mean_and_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert metrics.mean_and_std([4.0]) == (4.0, None)


# ---------------------------------------------------------------- model and methods


@pytest.mark.parametrize(("norm", "independent"), [("group", True), ("batch", False)])
def test_rows_influence_each_other_only_through_batch_norm(norm, independent):
    torch.manual_seed(0)
    model, images = ConvNet(norm), torch.randn(6, 1, 8, 8)
    alone, together = model(images[:3]), model(images)[:3]
    assert torch.allclose(alone, together, atol=1e-5) == independent


def test_model_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match="norm is 'layer', expected one of batch, group"):
        ConvNet("layer")


@pytest.mark.parametrize(("preset", "plain", "sharp"), [(PAPER, 0, 1), (RELEASED, 1, 0)])
def test_a_class_of_exactly_eta_images_is_tail_in_the_paper_only(preset, plain, sharp):
    split = settings(eta=20, inclusive=preset.inclusive).split([21, 20, 19])
    assert split.plain.tolist() == [1, plain, 0]
    assert split.sharp.tolist() == [0, sharp, 1]


def test_a_tail_weight_brings_its_control_with_it():
    assert settings().methods() == ["sgd", "sam", "imbsam"]
    weighted = settings(tail_weight=2.0, optimizers=("imbsam",))
    assert weighted.methods() == ["sgd_weighted", "imbsam"]
    assert weighted.label("sgd_weighted") == "SGD, tail weight 2"
    assert settings(tail_weight=2.0, optimizers=("sgd", "sam")).methods() == ["sgd", "sam"]


def weights(trained: training.Trained) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


def test_sgd_is_the_plain_pytorch_loop(data):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = ConvNet("batch", 10)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    shuffle = torch.Generator().manual_seed(5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10)
    for _ in range(2):
        for rows in torch.randperm(304, generator=shuffle).split(64):
            sgd.zero_grad()
            F.cross_entropy(model(data.train_images[rows]), data.train_targets[rows]).backward()
            sgd.step()
            schedule.step()
    trained = training.train("sgd", settings(epochs=2), data, seed=5)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights(trained), expected)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("method", "same_as", "changes"),
    [
        ("imbsam", "sgd", {"eta": 0.0}),
        ("imbsam", "sam", {"eta": 1000.0}),
        # Without a perturbation a tail weight is all that is left of ImbSAM.
        ("imbsam", "sgd_weighted", {"rho": 0.0, "tail_weight": 2.0}),
    ],
)
def test_methods_agree_where_they_are_the_same(data, method, same_as, changes):
    one, other = (training.train(m, settings(**changes), data, 0) for m in (method, same_as))
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-5)
    assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)


def test_methods_differ_with_the_defaults(data):
    changed = settings(tail_weight=2.0, optimizers=("sgd", "sam", "imbsam"))
    vectors = [weights(training.train(m, changed, data, 0)) for m in changed.methods()]
    for i in range(len(vectors)):
        for j in range(i):
            assert (vectors[i] - vectors[j]).norm() > 1e-3 * vectors[i].norm()


def test_presets_update_batch_norm_once_or_twice_a_step(data):
    steps = 5  # batches of 64 in 304 images
    for batch_norm, per_step in (("once", 1), ("twice", 2)):
        trained = training.train("sam", settings(batch_norm=batch_norm), data, 0)
        norms = [m for m in trained.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert [int(m.num_batches_tracked) for m in norms] == [steps * per_step] * 3


@pytest.mark.parametrize(("norm", "passes"), [("batch", [64, 64]), ("group", [56, 8, 8])])
def test_the_plan_follows_from_the_norm(data, norm, passes):
    rows = torch.cat([torch.arange(56), torch.arange(304 - 8, 304)])  # 8 tail rows at the end
    model = training.make_model(settings(norm=norm), seed=0)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    trainer = training.make_trainer("imbsam", model, settings(norm=norm), COUNTS)
    trainer.step(data.train_images[rows], data.train_targets[rows])
    assert seen == passes


def test_training_learns(data):
    trained = training.train("imbsam", settings(epochs=8, batch_size=32), data, seed=0)
    assert trained.train_loss < 0.5
    assert min(trained.per_class[:4]) > 60


def test_training_repeats_bit_for_bit(data):
    changed = settings(tail_weight=2.0)
    one, two = (weights(training.train("imbsam", changed, data, seed=1)) for _ in range(2))
    assert torch.equal(one, two)


def test_training_reports_every_epoch(data):
    losses: list[float] = []
    trained = training.train("sgd", settings(epochs=3), data, 0, losses.append)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2] == trained.train_loss


def test_a_diverged_training_stops_with_advice(data):
    with pytest.raises(training.TrainingDivergedError, match=r"SGD, seed 4, is .* below 1e\+12"):
        training.train("sgd", settings(lr=1e12), data, seed=4)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_uses_running_statistics_and_leaves_the_mode(data, mode):
    model = training.make_model(SETTINGS, seed=0).train(mode)
    accuracy = training.evaluate(model, data)
    assert model.training == mode
    model.eval()
    right = model(data.test_images).argmax(1) == data.test_targets
    assert accuracy == [100 * right[data.test_targets == k].double().mean() for k in range(10)]


# ---------------------------------------------------------------- timing


def test_timings_are_relative_to_the_plain_loop_with_medians(data, monkeypatch):
    calls: dict[str, int] = {}
    factors = [100, 0.5, 50, 1.5, 0.5]  # the first is not counted, the median of the rest is 1

    def timed_step(trainer, backend, batch):
        repetition = calls.get(backend, 0) // 5  # 5 batches
        calls[backend] = calls.get(backend, 0) + 1
        return factors[repetition] * {"": 0.002, "native": 0.005, "reference": 0.008}[backend]

    monkeypatch.setattr(timing, "_timed_step", timed_step)
    monkeypatch.setattr(timing, "backends", lambda device: ["native", "reference"])
    found = timing.time_steps(settings(optimizers=("imbsam",)), data, repetitions=4)
    assert found.sgd_ms == pytest.approx(2)
    assert found.relative == {
        "sgd": {"native": 1, "reference": 1},
        "imbsam": {"native": pytest.approx(2.5), "reference": pytest.approx(4)},
    }
    assert (found.batches, found.repetitions) == (5, 4)
    assert calls == {"": 25, "native": 25, "reference": 25}


def test_timing_runs_each_step_on_the_backend_it_names(data, monkeypatch):
    used: list[str] = []
    select = dispatch.select

    def spy(device):
        used.append(dispatch.backend_name(device.type))
        return select(device)

    monkeypatch.setattr(dispatch, "select", spy)
    found = timing.time_steps(settings(optimizers=("imbsam",)), data, repetitions=1)
    assert list(found.relative["imbsam"]) == timing.backends("cpu")
    assert [*dict.fromkeys(used)] == timing.backends("cpu")
    assert all(ratio > 1 for ratio in found.relative["imbsam"].values())


def test_a_forced_reference_is_timed_once():
    with dispatch.use_backend("reference"):
        assert timing.backends("cpu") == ["reference"]


# ---------------------------------------------------------------- picture


def test_the_picture_shows_the_accuracies():
    pytest.importorskip("matplotlib")
    from imbsam_fast.recipes.plots import per_class_figure

    results = {
        "settings": {"seeds": 2, "imbalance_factor": 100.0},
        "data": {"class_counts": [120, 30, 1], "tail_classes": [2]},
        "results": {
            "sgd": {
                "label": "SGD",
                "seeds": [{"per_class": p} for p in ([90, 50, 0], [94, 60, 0])],
            },
            "imbsam": {"label": "ImbSAM", "seeds": [{"per_class": [80, 70, 60]}] * 2},
        },
    }
    figure = per_class_figure(results)
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [92, 55, 0, 80, 70, 60]
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["digit 0\n120 images", "digit 1\n30 images", "digit 2\n1 image*"]
    assert {text.get_text() for text in axes.texts} == {"Many", "Medium", "Few"}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["SGD", "ImbSAM"]


def test_class_weights_of_the_control_are_those_of_imbsam(data):
    changed = settings(tail_weight=3.0)
    model = training.make_model(changed, seed=0)
    trainer = training.make_trainer("sgd_weighted", model, changed, COUNTS)
    images, targets = data.train_images[-40:], data.train_targets[-40:]
    losses = F.cross_entropy(model(images), targets, reduction="none")
    tail = ClassSplit.from_counts(COUNTS, eta=20).tail_mask(targets)
    assert 0 < tail.sum() < 40
    expected = (losses[~tail].sum() + 3 * losses[tail].sum()) / 40
    torch.testing.assert_close(trainer.step(images, targets).loss, expected.detach())
