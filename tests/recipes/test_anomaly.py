"""Anomaly detection: losses, networks, batches, protocols, detectors and their files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from imbsam_fast import split_loss
from imbsam_fast.recipes import anomaly
from imbsam_fast.recipes.anomaly import DeepSAD, DevNet, TrainingDivergedError, load
from imbsam_fast.recipes.anomaly.deepsad import _centre
from imbsam_fast.recipes.anomaly.detectors import DETECTORS
from imbsam_fast.recipes.anomaly.losses import deepsad_loss, deviation_loss
from imbsam_fast.recipes.anomaly.metrics import detection_metrics
from imbsam_fast.recipes.anomaly.networks import Decoder, Encoder, Scorer
from imbsam_fast.recipes.anomaly.training import (
    anomalies_are_tail,
    balanced_batches,
    shuffled_batches,
)
from tests.recipe_data import features

QUICK = {
    DeepSAD: {"epochs": 6, "pretrain_epochs": 5, "batch_size": 32, "lr": 0.01},
    DevNet: {"epochs": 5, "batches_per_epoch": 5, "batch_size": 32, "lr": 0.02},
}
KINDS = tuple(QUICK)


def quick(kind: type, **changes):
    return kind(**{**QUICK[kind], **changes})


# ---------------------------------------------------------------- losses


def test_deepsad_loss_is_the_distance_or_its_inverse():
    centre = torch.tensor([1.0, -1.0])
    codes = torch.tensor([[1.0, 1.0], [4.0, 3.0], [1.0, -1.0]])
    losses = deepsad_loss(centre, eta=2.0)(codes, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(losses, torch.tensor([4.0, 2 / (25 + 1e-6), 2 / 1e-6]))


def test_deviation_loss_draws_normal_rows_to_the_mean_and_anomalies_beyond_the_margin():
    scores = torch.tensor([3.0, -1.0, 2.0, 11.5])
    losses = deviation_loss(mean=1.0, std=2.0)(scores, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(losses, torch.tensor([1.0, 1.0, 4.5, 0.0]))


def test_losses_part_into_unlabelled_head_and_anomalous_tail():
    criterion = split_loss(deviation_loss(0.0, 1.0), anomalies_are_tail(), tail_weight=2.0)
    loss = criterion(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0, 0, 1]))
    assert loss.head.item() == pytest.approx((1 + 2) / 3)
    assert loss.tail.item() == pytest.approx(2 * (5 - 3) / 3)


# ---------------------------------------------------------------- networks


def test_networks_are_those_of_adbench():
    encoder, decoder, scorer = Encoder(512), Decoder(512), Scorer(512)
    assert [tuple(p.shape) for p in encoder.parameters()] == [(100, 512), (20, 100), (10, 20)]
    assert [tuple(p.shape) for p in decoder.parameters()] == [(20, 10), (100, 20), (512, 100)]
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert [(m.eps, m.affine) for m in norms] == [(1e-4, False)] * 2
    assert [tuple(p.shape) for p in scorer.parameters()] == [(20, 512), (20,), (1, 20), (1,)]
    assert all(not p.any() for p in scorer.parameters() if p.dim() == 1)
    x = torch.randn(5, 512)
    assert scorer(x).shape == (5,)
    restored = decoder(encoder(x))
    assert restored.shape == (5, 512) and restored.min() >= 0 and restored.max() <= 1


def test_the_centre_is_the_mean_code_kept_away_from_zero():
    identity = torch.nn.Identity()
    rows = torch.tensor([[1.0, 0.01, -0.02], [3.0, 0.03, -0.04]])
    expected = torch.tensor([2.0, 0.1, -0.1])
    torch.testing.assert_close(_centre(identity, rows), expected)


def test_the_centre_is_taken_in_eval_mode():
    torch.manual_seed(0)
    encoder, rows = Encoder(8), 3 * torch.randn(6, 8)
    before = encoder[0].norm.running_mean.clone()
    expected = encoder.eval()(rows).mean(dim=0)
    centre = _centre(encoder.train(), rows)
    far = expected.abs() >= 0.1
    assert far.any() and torch.equal(centre[far], expected[far])
    assert torch.equal(encoder[0].norm.running_mean, before)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("rows", "size", "sizes"),
    [
        (10, 4, [4, 4, 2]), (9, 4, [4, 5]), (4, 4, [4]), (3, 4, [3]), (1, 4, [1]),
        (258, 128, [128, 130]), (287, 128, [128, 159]), (288, 128, [128, 128, 32]), (2, 128, [2]),
    ],
)  # fmt: skip
def test_an_epoch_holds_every_row_once_and_leaves_few_rows_to_no_batch(rows, size, sizes):
    batches = shuffled_batches(rows, size, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == sizes
    assert sorted(torch.cat(batches).tolist()) == list(range(rows))


def test_balanced_batches_take_unlabelled_rows_and_anomalies_in_turn():
    labels = torch.tensor([0, 1, 0, 0, 1, 0])
    batches = balanced_batches(labels, 5, 40, torch.Generator().manual_seed(0))
    assert len(batches) == 40
    assert all(labels[b].tolist() == [0, 1, 0, 1, 0] for b in batches)
    assert set(torch.cat(batches).tolist()) == set(range(6))


# ---------------------------------------------------------------- metrics


def test_areas_of_a_ranking_by_hand():
    areas = detection_metrics([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])
    assert areas["aucroc"] == 75  # 3 of 4 pairs in order
    assert areas["aucpr_anomaly"] == pytest.approx(100 * (1 / 1 + 2 / 3) / 2, abs=1e-3)
    assert areas["aucpr_normal"] == pytest.approx(100 * (1 / 1 + 2 / 3) / 2, abs=1e-3)


# ---------------------------------------------------------------- detectors


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "imbsam"])
@pytest.mark.parametrize("base", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("kind", KINDS)
def test_detectors_learn_to_tell_anomalies(kind, base, optimizer):
    X, y = features(300)
    lr = {"sgd": QUICK[kind].get("lr"), "adam": 0.01, "rmsprop": 0.003}[base]
    detector = quick(kind, base=base, optimizer=optimizer, lr=lr)
    assert detector.fit(X[:200], y[:200]) is detector
    scores = detector.decision_function(X[200:])
    assert scores.shape == (100,) and scores.dtype == np.float64
    assert roc_auc_score(y[200:], scores) > 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_labels_follow_the_threshold(kind):
    X, y = features()
    detector = quick(kind, contamination=0.2).fit(X, y)
    assert detector.labels_.sum() == 24 and set(detector.labels_) == {0, 1}
    np.testing.assert_allclose(detector.decision_scores_, detector.decision_function(X), rtol=1e-5)
    assert np.array_equal(detector.predict(X[:7]), detector.labels_[:7])
    shuffled = np.random.default_rng(0).permutation(len(X))  # rows are scored one by one
    np.testing.assert_allclose(
        detector.decision_function(X[shuffled]), detector.decision_scores_[shuffled], rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_perturbation_imbsam_is_its_base(kind):
    X, y = features()
    plain, imbsam = (quick(kind, optimizer=o, rho=0.0).fit(X, y) for o in ("sgd", "imbsam"))
    np.testing.assert_allclose(plain.decision_scores_, imbsam.decision_scores_, rtol=2e-3)
    perturbed = quick(kind, optimizer="imbsam").fit(X, y)
    assert not np.allclose(plain.decision_scores_, perturbed.decision_scores_, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_weight_is_in_both_optimizers(kind):
    X, y = features()
    light, heavy, imbsam = (
        quick(kind, optimizer=o, rho=0.0, tail_weight=w).fit(X, y)
        for o, w in (("sgd", 1.0), ("sgd", 3.0), ("imbsam", 3.0))
    )
    np.testing.assert_allclose(heavy.decision_scores_, imbsam.decision_scores_, rtol=5e-3)
    assert not np.allclose(light.decision_scores_, heavy.decision_scores_, rtol=5e-3)


@pytest.mark.parametrize(("kind", "plan"), [(DeepSAD, "joint"), (DevNet, "joint")])
def test_the_automatic_plan_is_the_exact_one(kind, plan):
    X, y = features()
    automatic, named = (quick(kind, plan=p).fit(X, y) for p in ("auto", plan))
    np.testing.assert_allclose(automatic.decision_scores_, named.decision_scores_, rtol=1e-5)


def test_the_plans_agree_for_devnet():
    X, y = features()
    joint, split = (quick(DevNet, plan=plan, epochs=2).fit(X, y) for plan in ("joint", "split"))
    np.testing.assert_allclose(joint.decision_scores_, split.decision_scores_, rtol=1e-4, atol=1e-5)


def test_a_batch_without_labelled_anomalies_costs_one_step_of_the_base(monkeypatch):
    forwards = []
    forward = Encoder.forward
    monkeypatch.setattr(
        Encoder, "forward", lambda self, x: forwards.append(len(x)) or forward(self, x)
    )
    X, _ = features(128)
    y = np.zeros(128, dtype=int)
    y[5] = 1
    DeepSAD(epochs=1, pretrain_epochs=0, batch_size=32).fit(X, y)
    assert forwards == [128, *[32] * 5, 128]  # the centre, four batches and one again, the scores


def test_devnets_l2_acts_on_the_weights_of_the_hidden_layer_alone():
    X, y = features()
    detector = quick(DevNet, l2=0.03).fit(X, y)
    groups = detector._parameter_groups()
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.06, 1), (0.0, 3)]
    assert groups[0]["params"][0] is detector.network_.hidden.weight


def test_features_are_scaled_by_the_training_rows_alone():
    X, y = features()
    detector = quick(DevNet).fit(X[:100], y[:100])
    assert np.array_equal(detector.low_, X[:100].min(axis=0).astype(np.float64))
    scaled = detector._scaled(X[:100].astype(np.float64))
    assert scaled.min() == 0 and scaled.max() == 1
    others = detector._scaled(10 * X[100:].astype(np.float64))
    assert others.min() < 0 and others.max() > 1  # not clipped
    constant = X.copy()
    constant[:, 2] = 7
    assert np.isfinite(quick(DevNet).fit(constant, y).decision_scores_).all()


@pytest.mark.parametrize("optimizer", ["sgd", "imbsam"])
def test_a_shared_encoder_changes_nothing(optimizer):
    X, y = features()
    encoder = quick(DeepSAD, optimizer="sgd").pretrain(X)
    before = [p.clone() for p in encoder.parameters()]
    own = quick(DeepSAD, optimizer=optimizer).fit(X, y)
    shared = quick(DeepSAD, optimizer=optimizer).fit(X, y, encoder=encoder)
    assert np.array_equal(own.decision_scores_, shared.decision_scores_)
    assert all(map(torch.equal, before, encoder.parameters()))


def test_pretraining_teaches_the_encoder():
    X, _ = features()
    raw, trained = (quick(DeepSAD, pretrain_epochs=n).pretrain(X) for n in (0, 5))
    assert not any(map(torch.equal, raw.parameters(), trained.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_everything(kind):
    X, y = features()
    torch.manual_seed(1)
    first = quick(kind, random_state=1).fit(X, y).decision_scores_
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = quick(kind, random_state=1).fit(X, y).decision_scores_
    assert np.array_equal(first, again)
    assert torch.equal(state, torch.get_rng_state())  # of the user
    assert not np.allclose(first, quick(kind, random_state=2).fit(X, y).decision_scores_)


# ---------------------------------------------------------------- conventions and refusals


@pytest.mark.parametrize("kind", KINDS)
def test_detectors_are_scikit_learn_estimators(kind):
    detector = quick(kind, rho=0.1)
    twin = clone(detector)
    assert twin is not detector and twin.get_params() == detector.get_params()
    assert twin.set_params(rho=0.2).rho == 0.2
    with pytest.raises(NotFittedError, match="not fitted; call fit first"):
        detector.predict(np.zeros((2, 8)))


BAD_PARAMS = [
    ("optimizer", "adam", "expected one of sgd, sam, imbsam"),
    ("base", "sam", "expected one of sgd, adam, rmsprop"),
    ("plan", "both", "expected one of auto, joint, split"),
    ("lr", 0.0, "expected a number from"),
    ("lr", float("nan"), "expected a number from"),
    ("momentum", 1.5, "expected a number from 0 to 1"),
    ("rho", -0.1, "expected a number from 0"),
    ("tail_weight", 0, "expected a number from"),
    ("epochs", 0, "expected a whole number from 1"),
    ("epochs", 2.0, "expected a whole number from 1"),
    ("batch_size", 1, "expected a whole number from 2"),
    ("contamination", 0.6, "to 0.5"),
    ("random_state", None, "expected a whole number from 0"),
    ("epochs", True, "expected a whole number from 1"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_PARAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_unusable_parameters_are_named(kind, name, value, expected):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, .*{expected}"):
        kind(**{name: value}).fit(*features(20))


def test_deepsad_has_no_split_plan():
    with pytest.raises(ValueError, match="plan is 'split', expected auto or joint for DeepSAD"):
        DeepSAD(plan="split").fit(*features(20))


def test_unusable_data_is_refused():
    X, y = features(20)
    fit = quick(DevNet).fit
    with pytest.raises(ValueError, match=r"y has shape \(19,\), expected \(20,\)"):
        fit(X, y[:-1])
    with pytest.raises(ValueError, match=r"y holds \[2, -1\], expected 0 and 1"):
        fit(X, np.array([2, -1, *y[2:]]))
    with pytest.raises(ValueError, match="y holds only 1"):
        fit(X, np.ones(20))
    with pytest.raises(ValueError, match="y holds only 0, expected at least one labelled anomaly"):
        fit(X, np.zeros(20))
    with pytest.raises(ValueError, match="X contains NaN"):
        fit(np.where(X[0, 0] == X, np.nan, X), y)
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        fit(X[:1], y[:1])
    with pytest.raises(ValueError, match="X has 5 features, expected 8 as in fit"):
        fit(X, y).decision_function(X[:, :5])


@pytest.mark.quick
def test_deepsad_does_without_labelled_anomalies():
    X, _ = features()
    detector = quick(DeepSAD).fit(X, np.zeros(len(X)))
    assert np.isfinite(detector.decision_scores_).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_fit_leaves_a_fitted_detector_as_it_was(kind):
    X, y = features()
    detector = quick(kind).fit(X, y)
    before = detector.decision_function(X)
    detector.set_params(lr=1e30)
    with pytest.raises(TrainingDivergedError, match="no longer finite numbers; try an lr below 1e"):
        detector.fit(2 * X[:, :6], y)
    assert np.array_equal(detector.decision_function(X), before)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_detector_scores_as_before(kind, tmp_path):
    X, y = features()
    detector = quick(kind, contamination=0.15).fit(X, y)
    detector.save(tmp_path / "detector.pt")
    loaded = load(tmp_path / "detector.pt")
    assert type(loaded) is kind and loaded.get_params() == detector.get_params()
    assert np.array_equal(loaded.decision_function(X), detector.decision_function(X))
    assert np.array_equal(loaded.predict(X), detector.predict(X))
    assert np.array_equal(loaded.labels_, detector.labels_)
    assert loaded.threshold_ == detector.threshold_
    assert loaded.fit(X, y).train_loss_ == detector.train_loss_


def test_numbers_of_numpy_are_parameters_too(tmp_path):
    X, y = features()
    given = {"lr": np.float64(0.01), "epochs": np.int64(2), "random_state": np.int32(1)}
    quick(DevNet, **given).fit(X, y).save(tmp_path / "detector.pt")
    assert {name: getattr(load(tmp_path / "detector.pt"), name) for name in given} == given


def test_an_unfitted_detector_is_not_saved(tmp_path):
    with pytest.raises(NotFittedError):
        DeepSAD().save(tmp_path / "detector.pt")
    assert not list(tmp_path.iterdir())


class Executed:
    """What a pickle could carry."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.quick
@pytest.mark.parametrize(
    "content",
    [b"no archive", {"format": 1}, {"format": 99}, [1], Executed()],
    ids=["bytes", "format 1", "format 99", "list", "pickle"],
)
def test_other_files_are_refused_and_not_executed(content, tmp_path, capsys):
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"other\.pt is not a saved detector"):
        load(path)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.pt")


def test_the_package_offers_the_detectors():
    assert set(anomaly.__all__) == {
        "DeepSAD",
        "DevNet",
        "Detector",
        "TrainingDivergedError",
        "load",
    }
    assert all(hasattr(anomaly, name) for name in anomaly.__all__)
    assert set(DETECTORS.values()) == {DeepSAD, DevNet}
    with pytest.raises(AttributeError, match="no attribute 'PReNet'"):
        anomaly.PReNet  # noqa: B018
