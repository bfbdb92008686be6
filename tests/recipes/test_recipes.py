"""The digits, the metrics, and what each method trains, on the digits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from imbsam_fast import ClassSplit
from imbsam_fast.recipes import metrics
from imbsam_fast.recipes.data import digits
from imbsam_fast.recipes.data.datasets import load as load_images
from imbsam_fast.recipes.data.images import LongTailImages, generator
from imbsam_fast.recipes.models.convnet import ConvNet
from imbsam_fast.recipes.models.registry import make_model
from imbsam_fast.recipes.settings.config import RunConfig, resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from imbsam_fast.recipes.train.evaluation import evaluate
from imbsam_fast.recipes.train.methods import make_trainer
from imbsam_fast.recipes.train.training import ORDER, ImageTraining, TrainingDivergedError

pytest.importorskip("sklearn")

COUNTS = [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]


def settings(optimizer: str, **changes) -> RunConfig:
    quick = {"dataset": "digits", "epochs": 1, "batch_size": 64, "seed": 0}
    return resolve(DATASETS["digits"], {**quick, "optimizer": optimizer, **changes})


@pytest.fixture(scope="module")
def data() -> digits.LongTailData:
    return digits.load(imbalance_factor=100, seed=0)


@pytest.fixture(scope="module")
def images() -> LongTailImages:
    return load_images(settings("sgd"))


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


def test_the_recipe_trains_on_these_digits(data, images):
    assert images.counts == COUNTS and images.class_names[3] == "digit 3"
    for found, expected, targets in (
        (images.train, data.train_images, data.train_targets),
        (images.test, data.test_images, data.test_targets),
    ):
        for key in (None, (0, 1)):  # with augmentation too: there is none
            ((x, y),) = found.batches([torch.arange(len(found))], key)
            assert x.shape[1:] == (3, 8, 8)
            for k in range(10):
                same = {image.numpy().tobytes() for image in expected[targets == k]}
                for channel in x[y == k].round(decimals=4).unbind(1):
                    assert {image.numpy().tobytes() for image in channel} == same


def test_validation_digits_are_beside_the_others():
    found = load_images(settings("sgd", validation=10, largest_class=100))
    assert torch.bincount(found.validation.targets).tolist() == [10] * 10
    seen = [{p.numpy().tobytes() for p in part.pixels}
            for part in (found.train, found.validation, found.test)]  # fmt: skip
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]


# ---------------------------------------------------------------- metrics


def test_groups_have_the_borders_of_the_paper():
    groups = [metrics.group_of(n) for n in (101, 100, 20, 19, 0)]
    assert groups == ["many", "medium", "medium", "few", "few"]


def test_shares_by_hand():
    right, rows = torch.tensor([3, 1, 0]), torch.tensor([4, 2, 1])
    assert metrics.shares(right, rows) == [75.0, 50.0, 0.0]


def test_shares_refuse_a_class_without_rows():
    with pytest.raises(ValueError, match=r"targets has \[2, 0, 1\] rows per class"):
        metrics.shares(torch.tensor([1, 0, 0]), torch.tensor([2, 0, 1]))


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


@pytest.mark.parametrize(("preset", "plain", "sharp"), [("paper", 0, 1), ("released", 1, 0)])
def test_a_class_of_exactly_eta_images_is_tail_in_the_paper_only(preset, plain, sharp):
    split = settings("imbsam", preset=preset).split([21, 20, 19])
    assert split.plain.tolist() == [1, plain, 0]
    assert split.sharp.tolist() == [0, sharp, 1]


def train(optimizer: str, images: LongTailImages, **changes) -> ImageTraining:
    training = ImageTraining(settings(optimizer, **changes), images)
    training.rows = []
    while training.epoch < training.epochs:
        training.rows.append(training.train_epoch(lambda training: None))
    return training


def weights(training: ImageTraining) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in training.model.parameters()])


def test_sgd_is_the_plain_pytorch_loop(images):
    model = make_model("convnet", 10, "batch", seed=5).to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10)
    ((x, targets),) = images.train.batches([torch.arange(304)])
    for epoch in range(2):
        shuffled = torch.randperm(304, generator=generator(5, ORDER, epoch))
        for rows in shuffled.split(64):
            sgd.zero_grad()
            F.cross_entropy(model(x[rows]), targets[rows]).backward()
            sgd.step()
            schedule.step()
    training = train("sgd", images, epochs=2, seed=5)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(training), expected, rtol=1e-4, atol=1e-6)
    assert training.rows[-1]["lr"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("optimizer", "same_as", "changes"),
    [
        ("imbsam", "sgd", {"eta": 0.0}),
        ("imbsam", "sam", {"eta": 1000.0}),
        # Without a perturbation a tail weight is all that is left of ImbSAM.
        ("imbsam", "sgd-weighted", {"rho": 0.0, "tail_weight": 2.0}),
        ("focal-sam", "sam", {"gamma": 0.0, "lam": 1.0}),
    ],
)
def test_methods_agree_where_they_are_the_same(images, optimizer, same_as, changes):
    one, other = (train(name, images, **changes) for name in (optimizer, same_as))
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-5)
    assert one.rows[-1]["loss"] == pytest.approx(other.rows[-1]["loss"], rel=1e-4)


def test_methods_differ_with_the_defaults(images):
    names = ("sgd", "sgd-weighted", "sam", "imbsam", "focal-sam")
    vectors = [weights(train(name, images, epochs=3)) for name in names]
    for i in range(len(vectors)):
        for j in range(i):
            assert (vectors[i] - vectors[j]).norm() > 1e-3 * vectors[i].norm()


def test_presets_update_batch_norm_once_or_twice_a_step(images):
    steps = 5  # batches of 64 in 304 images
    for preset, per_step in (("paper", 1), ("released", 2)):
        training = train("imbsam", images, preset=preset, eta=1000.0)
        norms = [m for m in training.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert [int(m.num_batches_tracked) for m in norms] == [steps * per_step] * 3


@pytest.mark.parametrize(("norm", "passes"), [("batch", [64, 64]), ("group", [56, 8, 8])])
def test_the_plan_follows_from_the_norm(images, norm, passes):
    rows = images.train.targets.argsort()
    rows = torch.cat([rows[:56], rows[-8:]])  # 8 tail rows at the end
    config = settings("imbsam", norm=norm)
    model = make_model("convnet", 10, norm, seed=0)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    trainer = make_trainer(model, config, COUNTS)
    ((x, targets),) = images.train.batches([rows])
    trainer.step(x, targets)
    assert seen == passes


def test_class_weights_of_the_control_are_those_of_imbsam(images):
    config = settings("sgd-weighted", tail_weight=3.0)
    model = make_model("convnet", 10, "batch", seed=0)
    trainer = make_trainer(model, config, COUNTS)
    ((x, targets),) = images.train.batches([images.train.targets.argsort()[-40:]])
    losses = F.cross_entropy(model(x), targets, reduction="none")
    tail = ClassSplit.from_counts(COUNTS, eta=20).tail_mask(targets)
    assert 0 < tail.sum() < 40
    expected = (losses[~tail].sum() + 3 * losses[tail].sum()) / 40
    torch.testing.assert_close(trainer.step(x, targets).loss, expected.detach())


def test_training_learns(images):
    training = train("imbsam", images, epochs=8, batch_size=32)
    losses = [row["loss"] for row in training.rows]
    assert losses[0] > losses[3] > losses[7] and losses[7] < 0.5
    assert min(evaluate(training.model, images.test, COUNTS)["plain"]["per_class"][:4]) > 60


def test_training_repeats_bit_for_bit(images):
    one, two = (weights(train("imbsam", images, preset="released", seed=1)) for _ in range(2))
    assert torch.equal(one, two)


def test_a_diverged_training_stops_with_advice(images):
    with pytest.raises(TrainingDivergedError, match=r"SGD, seed 4, is .* below 1e\+12"):
        train("sgd", images, lr=1e12, seed=4)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_uses_running_statistics_and_leaves_the_mode(images, mode):
    model = make_model("convnet", 10, "batch", seed=0).train(mode)
    accuracy = evaluate(model, images.test, COUNTS)
    assert model.training == mode
    model.eval()
    ((x, targets),) = images.test.batches([torch.arange(len(images.test))])
    right = model(x).argmax(1) == targets
    expected = [100 * right[targets == k].double().mean() for k in range(10)]
    assert accuracy["plain"]["per_class"] == expected
    assert accuracy["flip"] == accuracy["plain"]  # a mirrored digit is another sign
