"""`imbsam-fast analyze`: on which images, with what results, and where they are written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import COUNTS, tiny_data_set, tiny_images, train
from torch import nn
from torch.func import functional_call

from imbsam_fast import cli
from imbsam_fast.recipes.analysis.figures import lines_figure, planes_figure, spectrum_figure
from imbsam_fast.recipes.analysis.measurements import (
    choose_classes,
    draw,
    finite,
    hessian_analysis,
    in_ranges,
    landscape_analysis,
)
from imbsam_fast.recipes.analysis.runs import file_part
from imbsam_fast.recipes.analysis.settings import AnalysisSettings
from imbsam_fast.recipes.figures import styles_of
from imbsam_fast.recipes.models.registry import make_model

pytest.importorskip("torchvision")
pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

SMALL = AnalysisSettings(
    lanczos_steps=30, trace_probes=6, density_probes=2, line_points=5, plane_points=3
)
SMALL_OPTIONS = [
    *("--lanczos-steps", "4", "--trace-probes", "3", "--density-probes", "1"),
    *("--line-points", "5", "--plane-points", "3", "--threads", "1"),
]


def linear_model() -> nn.Module:
    """772 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, len(COUNTS)))


# ---------------------------------------------------------------- classes and images


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("few", [0, 2]),
        ("medium", [3]),
        ("many", [1]),
        ("tail", [2, 3]),
        ("head", [0, 1]),
        ("3", [3]),
        ("2,0", [0, 2]),
        ("1-3", [1, 2, 3]),
        ("0, 2-3,3", [0, 2, 3]),
    ],
)
def test_choose_classes(which, expected):
    assert choose_classes(which, COUNTS, tail=[2, 3]) == expected


def test_choose_classes_by_other_borders():
    assert choose_classes("few", COUNTS, [], borders=(6, 30)) == [2]
    assert choose_classes("many", COUNTS, [], borders=(6, 30)) == [1, 3]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("rare", "classes is 'rare', expected many, medium, few, head, tail or a list"),
        ("1,x", "classes is '1,x', expected .* such as 0,3,7-9"),
        ("", "classes is '', expected"),
        ("-1", "classes is '-1', expected"),
        ("4", "classes holds '4', expected classes from 0 to 3"),
        ("2-1", "classes holds '2-1', expected classes from 0 to 3"),
        ("tail", "classes is 'tail', but no class of this data set is tail"),
    ],
)
def test_choose_classes_refuses(which, message):
    with pytest.raises(ValueError, match=message):
        choose_classes(which, COUNTS, tail=[])


def test_ranges_and_file_names():
    assert in_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and in_ranges([4]) == "4"
    assert file_part("few", [0, 2]) == "few"
    assert file_part("0,1,2,5", [0, 1, 2, 5]) == "classes-0-2_5"
    long, other = (file_part("x", list(range(k, 200, 2))) for k in (0, 1))
    assert long != other and len(long) < 30


def test_draw_takes_every_image_of_the_classes_without_augmentation():
    images = tiny_images().train
    sample = draw(images, [0, 2], replace(SMALL, batch_size=4), "cpu")
    assert [len(y) for _, y in sample.batches] == [4, 4, 4, 1]
    assert (sample.rows, sample.available) == (13, 13)
    targets = torch.cat([y for _, y in sample.batches])
    assert torch.bincount(targets).tolist() == [8, 0, 5]
    again = draw(images, [0, 2], replace(SMALL, batch_size=13), "cpu")
    assert torch.equal(torch.cat([x for x, _ in sample.batches]), again.batches[0][0])


def test_draw_at_random_by_the_seed():
    images = tiny_images().train
    settings = replace(SMALL, rows=20)
    first, same, other = (
        draw(images, [1], replace(settings, seed=seed), "cpu").batches[0][0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert len(first) == 20 and len({x.numpy().tobytes() for x in first}) == 20
    assert draw(images, [1], replace(settings, rows=0), "cpu").rows == 120


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("frozen", [False, True])
def test_hessian_analysis_against_the_exact_hessian(frozen):
    model = linear_model()
    model[1].bias.requires_grad_(not frozen)
    sample = draw(tiny_images().train, [0, 2], SMALL, "cpu")
    ticks: list[int] = []
    found = hessian_analysis(model, sample, SMALL, lambda: ticks.append(1))
    assert len(ticks) == SMALL.hessian_ticks
    assert model[1].bias.requires_grad is not frozen and model[1].weight.requires_grad

    ((x, y),) = sample.batches
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    flat = torch.cat([w.flatten() for w in weights.values()])

    def loss(flat):
        pieces = zip(weights, flat.split([w.numel() for w in weights.values()]))
        named = {name: piece.view_as(weights[name]) for name, piece in pieces}
        return F.cross_entropy(functional_call(model, named, (x.double(),)), y)

    exact = torch.func.hessian(loss)(flat)
    eigenvalues = torch.linalg.eigvalsh(exact)
    assert found["parameters"] == len(flat) == 772
    assert found["lambda_max"]["converged"]
    assert found["lambda_max"]["value"] == pytest.approx(float(eigenvalues[-1]), rel=2e-3)
    variance = 2 * (exact.square().sum() - exact.diagonal().square().sum())
    error = math.sqrt(variance / SMALL.trace_probes)
    assert abs(found["trace"]["value"] - float(exact.trace())) <= 4 * error
    assert found["trace"]["probes"] == SMALL.trace_probes
    # The rank is at most rows * (K - 1) = 39, so that the density is nearly all at zero.
    values, weights = found["density"].values()
    assert len(values) == SMALL.density_probes
    for nodes, shares in zip(values, weights):
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
        at_zero = sum(w for v, w in zip(nodes, shares) if abs(v) < 1e-3 * max(nodes))
        assert at_zero > 0.9


def test_landscape_analysis_has_the_loss_of_the_model_in_the_middle():
    model = make_model("resnet8", len(COUNTS), "batch", seed=0)
    images = tiny_images().train
    samples = {
        "head": draw(images, [1], SMALL, "cpu"),
        "tail": draw(images, [0, 2, 3], SMALL, "cpu"),
    }
    ticks: list[int] = []
    found = landscape_analysis(model, samples, len(COUNTS), SMALL, lambda: ticks.append(1))
    assert len(ticks) == SMALL.landscape_ticks
    model.eval()
    for part, sample in samples.items():
        ((x, y),) = sample.batches
        with torch.no_grad():
            expected = float(F.cross_entropy(model(x), y))
        assert found["line"][part][2] == pytest.approx(expected, rel=1e-5)
        assert found["plane"][part][1][1] == found["line"][part][2]
        ends = [found["line"][part][i] for i in (0, -1)]
        assert found["plane"][part][0][1] == ends[0] and found["plane"][part][2][1] == ends[1]
    assert found["line"]["steps"] == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_what_is_not_finite_is_none():
    assert finite([[1.0, math.inf], [math.nan, -2.0]]) == [[1.0, None], [None, -2.0]]


# ---------------------------------------------------------------- command


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("runs")
    with tiny_data_set():
        for optimizer in ("sgd", "imbsam"):
            train(root, optimizer, epochs=1)
        yield root


@pytest.fixture(scope="module")
def analysed(runs) -> Path:
    assert cli.main(["analyze", str(runs), *SMALL_OPTIONS]) == 0
    return runs


def test_analyses_are_written_beside_each_run(analysed):
    for run in analysed.iterdir():
        names = sorted(path.name for path in (run / "analyses").iterdir())
        assert names == [
            "hessian-few.json",
            "hessian-few.png",
            "landscape-line.png",
            "landscape-plane.png",
            "landscape.json",
        ]
        assert all((run / "analyses" / name).stat().st_size > 1000 for name in names)


def test_the_analysis_is_that_of_the_last_checkpoint(analysed):
    run = analysed / "imbsam-paper-eta100-seed0"
    found = json.loads((run / "analyses" / "landscape.json").read_text())
    model = make_model("resnet8", len(COUNTS), "batch", seed=1)
    model.load_state_dict(torch.load(run / "last.pt", weights_only=True)["model"])
    model.eval()
    images = tiny_images().train
    assert found["class_list"] == {"head": [1], "tail": [0, 2, 3]}  # eta 100
    for part, classes in found["class_list"].items():
        rows = torch.isin(images.targets, torch.tensor(classes)).nonzero().squeeze(1)
        ((x, y),) = images.batches([rows])
        with torch.no_grad():
            expected = float(F.cross_entropy(model(x), y))
        assert found["line"][part][2] == pytest.approx(expected, rel=1e-5)
        assert found["rows"][part] == len(rows)
    hessian = json.loads((run / "analyses" / "hessian-few.json").read_text())
    assert hessian["class_list"] == [0, 2] and hessian["rows"] == 13
    assert hessian["epoch"] == 1 and hessian["settings"]["lanczos_steps"] == 4
    assert "its running statistics" in hessian["about"]


def test_equal_seeds_give_equal_numbers_and_other_ones_others(analysed, tmp_path):
    run = analysed / "sgd-seed0"
    numbers = []
    for i, seed in enumerate(("0", "1")):
        out = tmp_path / str(i)
        arguments = [str(run), "--out", str(out), "--seed", seed, "--only", "hessian"]
        assert cli.main(["analyze", *arguments, *SMALL_OPTIONS]) == 0
        assert sorted(p.name for p in out.iterdir()) == ["hessian-few.json", "hessian-few.png"]
        numbers.append(json.loads((out / "hessian-few.json").read_text()))
    first = json.loads((run / "analyses" / "hessian-few.json").read_text())
    for key in ("lambda_max", "trace", "density"):
        assert numbers[0][key] == first[key] != numbers[1][key]


def test_batch_statistics_classes_and_eta_are_the_users_choice(analysed, tmp_path):
    run = analysed / "sgd-seed0"
    common = ["analyze", str(run), "--out", str(tmp_path), *SMALL_OPTIONS]
    assert cli.main([*common, "--only", "landscape", "--eta", "5"]) == 0
    landscape = json.loads((tmp_path / "landscape.json").read_text())
    assert landscape["class_list"] == {"head": [0, 1, 3], "tail": [2]}
    arguments = ["--only", "hessian", "--classes", "1-2", "--batch-norm", "batch", "--rows", "50"]
    assert cli.main([*common, *arguments]) == 0
    hessian = json.loads((tmp_path / "hessian-classes-1-2.json").read_text())
    assert hessian["rows"] == 50 and "the statistics of each batch of 250" in hessian["about"]
    assert "50 of 125 training images" in hessian["about"]


def test_the_report_shows_the_analyses_of_all_runs(analysed, tmp_path):
    file = tmp_path / "report.html"
    assert cli.main(["report", str(analysed), "--out", str(file)]) == 0
    html = file.read_text()
    assert "Hessian on few classes" in html and "Loss landscapes" in html
    assert "Few (classes 0, 2): all 13 training images." in html


def test_spectra_of_runs_share_their_axes(analysed):
    found = {
        run.name: json.loads((run / "analyses" / "hessian-few.json").read_text())
        for run in analysed.iterdir()
    }
    figure = spectrum_figure(found, styles_of((run, {}) for run in found))
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    for axes, analysis in zip(figure.axes, found.values()):
        x = axes.lines[0].get_xdata()
        values = [v for nodes in analysis["density"]["values"] for v in nodes]
        assert x[0] < min(values) and max(values) < x[-1]


@pytest.mark.quick
def test_a_landscape_of_infinite_losses_can_be_drawn():
    line = {"steps": [-1, 0, 1], "tail": [None, 1.0, None]}
    plane = {"steps": [-1, 0, 1], "tail": [[None] * 3, [None, 1.0, None], [None] * 3]}
    analysis = {"groups": ["tail"], "line": line, "plane": plane}
    figure = lines_figure({"a": analysis}, styles_of([("a", {})]))
    figure.draw_without_rendering()
    planes_figure({"a": analysis}).draw_without_rendering()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "rare"], "classes is 'rare', expected many, medium, few"),
        (["--classes", "9"], "classes holds '9', expected classes from 0 to 3"),
        (["--plane-points", "4"], "--plane-points is 4, expected an odd number from 3"),
        (["--line-points", "1"], "--line-points is 1, expected an odd number from 3"),
        (["--checkpoint", "best"], "best.pt' does not exist"),
    ],
)
def test_refusals_leave_nothing_behind(runs, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    status = cli.main(["analyze", str(runs / "sgd-seed0"), "--out", str(out), *arguments])
    assert status == 2 and message in capsys.readouterr().err
    assert not out.exists()


def test_one_out_for_several_runs_is_refused(runs, tmp_path, capsys):
    assert cli.main(["analyze", str(runs), "--out", str(tmp_path)]) == 2
    assert "expected with one run only" in capsys.readouterr().err


def test_the_second_stage_of_lws_is_analysed_as_it_was_trained(tmp_path):
    """Its scales are weights like others: 4 more than those of the network."""
    with tiny_data_set():
        settings = {"method": "lws", "epochs": 1, "stage2_epochs": 1, "stage2_batch_size": 64}
        run = train(tmp_path, "sgd", **settings)
        assert cli.main(["analyze", str(run.path), "--only", "hessian", *SMALL_OPTIONS]) == 0
    found = json.loads((run.path / "analyses" / "hessian-few.json").read_text())
    network = make_model("resnet8", len(COUNTS), "batch", seed=0)
    assert found["parameters"] == sum(p.numel() for p in network.parameters()) + len(COUNTS)
    assert found["epoch"] == 2


@pytest.mark.parametrize(
    ("setting", "instead", "message"),
    [
        ("dataset: tiny", "dataset: other", "is 'other', expected one of digits"),
        ("model: resnet8", "", "lacks or spoils 'model'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, capsys, setting, instead, message):
    with tiny_data_set():
        run = train(tmp_path, "sgd", epochs=1).path
        config = (run / "config.yaml").read_text()
        assert setting in config
        (run / "config.yaml").write_text(config.replace(setting, instead))
        assert cli.main(["analyze", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "analyses").exists()


@pytest.mark.quick
def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    with tiny_data_set():
        run = train(tmp_path, "sgd", epochs=1)
        state = run.load_checkpoint()
        run.save_checkpoint({**state, "model": linear_model().state_dict()})
        assert cli.main(["analyze", str(run.path)]) == 2
    assert "are not those of its configuration" in capsys.readouterr().err
